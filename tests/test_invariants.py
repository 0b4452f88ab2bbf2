"""The invariants of the design (1 to 4, and 6), on every denoiser of the core corpus."""

from __future__ import annotations

import os
import threading
from typing import Any

import pytest
import torch
from diffcache_fx.passes.flops import program_flops
from diffcache_fx.passes.guard import InsertGuards
from diffcache_fx.passes.reach import Reach
from diffcache_fx.passes.specialize import Specialize
from diffcache_fx.passes.verify import Verify
from torch import fx
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from bench.zoo import CORE, tensors
from diffcache_fx import Blocks, Linear, Scale, Sublayers, Trunk, compile_with_cache, schedules
from diffcache_fx.program import InputKind, StepProgram, returned

from .conftest import Sample, equal, history, hold_rows, run, sample, steps_of, storages, worst

pytestmark = pytest.mark.usefixtures("one_thread")

# U-Nets whose scales hold whole stages have no chain of blocks.
UNETS = {
    "UNet2DModel",
    "UNet2DConditionModel",
    "UNet2DConditionModel-sdxl",
    "UNetSpatioTemporalConditionModel",
    "plain-unet",
}
SELECTIONS = {
    "trunk": Trunk(),
    "sublayers": Sublayers(),
    "blocks": Blocks(each=True),
    "scale": Scale(1),
}
NO_ATTENTION = {"plain-mlp", "plain-unet"}
CASES = [
    (name, kind)
    for name in CORE
    for kind in SELECTIONS
    if not (kind == "sublayers" and name in NO_ATTENTION)
    and not (kind == "blocks" and name in UNETS)
    and not (kind == "scale" and name not in UNETS)
]
SMALL = ("plain-mlp", "plain-dit-shared-adaln", "plain-unet")


def regions_of(name: str, kind: str, storage: str = "value", slots: int = 1) -> tuple[Sample, StepProgram]:
    model = sample(name)
    return model, model.with_regions(SELECTIONS[kind], storage, slots)


def checked(program: StepProgram) -> StepProgram:
    return Verify(after="the test")(program)


def all_of(program: StepProgram) -> frozenset[str]:
    return frozenset(region.name for region in program.regions)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_refresh_and_reuse_by_value(name: str, kind: str) -> None:
    """Identity, consistency, deadness, and that no output shares memory with the cache."""
    model, program = regions_of(name, kind)
    users = model.users()
    refresh = checked(Specialize(frozenset())(program))
    with flop_counter() as counter:
        full = run(refresh, model.module, users)
    assert equal(full.outputs, model.reference)
    assert counter.get_total_flops() == pytest.approx(program_flops(refresh), rel=0.01)
    given = storages([*users, *model.module.parameters(), *model.module.buffers(), *program.constants.values()])
    memory = storages(full.state.values())
    assert len(memory) == len(full.state)
    assert not memory & (storages(full.outputs) | given)

    state = history(program, full.state)
    names = all_of(program)
    reuse = checked(Specialize(names)(program))
    with flop_counter() as counter:
        again = run(reuse, model.module, users, state)
    assert equal(again.outputs, model.reference)
    assert not again.state
    assert not storages(again.outputs) & memory
    assert_dead(program, refresh, reuse)
    assert counter.get_total_flops() == pytest.approx(program_flops(reuse), rel=0.01)

    half = frozenset(sorted(names)[::2])
    if half != names:
        part = run(checked(Specialize(half)(program)), model.module, users, state)
        assert equal(part.outputs, model.reference)
        assert set(part.state) == {key for key in full.state if key.rpartition("/")[0] not in half}
        assert all(torch.equal(value, full.state[key]) for key, value in part.state.items())

    # the test can fail: state of another step gives another output
    other = run(refresh, model.module, model.users(1))
    stale = run(reuse, model.module, users, history(program, other.state))
    assert not equal(stale.outputs, model.reference)


def assert_dead(program: StepProgram, refresh: StepProgram, reuse: StepProgram) -> None:
    """A reuse program holds nothing of the reused regions, and nothing that only fed them."""
    inside = {node for region in program.regions for node in region.nodes}
    assert not inside & {node.name for node in reuse.graph.nodes}
    assert weights(reuse) == weights_needed(program)
    assert weights(reuse) < weights(refresh)
    assert program_flops(reuse) < program_flops(refresh)


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, kind in CASES if kind == "trunk"])
def test_consistency_by_residual_and_two_slots(name: str, kind: str) -> None:
    model, program = regions_of(name, kind, storage="auto", slots=2)
    users = model.users()
    refresh = checked(Specialize(frozenset())(program))
    full = run(refresh, model.module, users)
    assert equal(full.outputs, model.reference)
    reuse = checked(Specialize(all_of(program))(program))
    rows = hold_rows(program)
    again = run(reuse, model.module, users, history(program, full.state), rows)
    assert worst(again.outputs, model.reference) < 1e-4

    other = run(refresh, model.module, model.users(1))
    stale = run(reuse, model.module, users, history(program, other.state), rows)
    assert worst(stale.outputs, model.reference) > 1e-3


def flop_counter() -> FlopCounterMode:
    """PyTorch's counter, which knows attention on accelerators only, taught the operator that runs on the CPU."""

    def attention(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return FlopCounterMode(display=False, custom_mapping={on_cpu: attention})


WEIGHTS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT)


def weights(program: StepProgram) -> set[str]:
    return {entry.target for entry in program.inputs if entry.kind in WEIGHTS}


def weights_needed(program: StepProgram) -> set[str]:
    """By walking back from the outputs, stopping at the cuts: what a reuse of all regions must read."""
    nodes = program.named_nodes()
    held = {nodes[value.node] for region in program.regions for value in region.cut}
    seen: set[fx.Node] = set()
    stack = [node for node in returned(program.graph) if isinstance(node, fx.Node)]
    while stack:
        node = stack.pop()
        if node in seen or node in held:
            continue
        seen.add(node)
        stack.extend(node.all_input_nodes)
    inputs = {entry.name: entry for entry in program.inputs if entry.kind in WEIGHTS}
    return {inputs[node.name].target for node in seen if node.name in inputs}


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, kind in CASES if kind in ("trunk", "sublayers")])
def test_branches_agree_with_the_specialised_programs(name: str, kind: str) -> None:
    model, program = regions_of(name, kind, storage="auto", slots=2)
    users, rows = model.users(), hold_rows(program)
    rows[:, 1] = 0.25
    refresh = Specialize(frozenset())(program)
    old = history(program, run(refresh, model.module, model.users(1)).state)
    guarded = checked(InsertGuards()(program))
    (predicate,) = (entry.target for entry in guarded.inputs if entry.kind is InputKind.PREDICATE)

    fresh = run(refresh, model.module, users)
    taken = run(guarded, model.module, users, old, rows, {predicate: True})
    assert equal(taken.outputs, fresh.outputs)
    assert_shifted(program, taken.state, fresh.state, old)

    reuse = run(Specialize(all_of(program))(program), model.module, users, old, rows)
    kept = run(guarded, model.module, users, old, rows, {predicate: False})
    assert equal(kept.outputs, reuse.outputs)
    assert all(torch.equal(kept.state[key], value) for key, value in old.items())
    assert set(kept.state) == set(old)
    for result in (taken, kept):
        assert not storages(result.state.values()) & storages([*result.outputs, *old.values()])


def assert_shifted(
    program: StepProgram,
    new: dict[str, torch.Tensor],
    fresh: dict[str, torch.Tensor],
    old: dict[str, torch.Tensor],
) -> None:
    """After a refresh: the fresh value first, the rest moved by one slot."""
    for region in program.regions:
        for index, value in enumerate(region.cut):
            key = f"{region.name}/{index}"
            assert torch.equal(new[f"{key}/0"], fresh[key])
            assert all(torch.equal(new[f"{key}/{slot}"], old[f"{key}/{slot - 1}"]) for slot in range(1, value.slots))


@pytest.mark.parametrize(("name", "kind"), [(name, kind) for name, kind in CASES if kind in ("blocks", "sublayers")])
def test_branches_of_each_region_on_its_own(name: str, kind: str) -> None:
    model, program = regions_of(name, kind)
    reach, nodes = Reach(program.graph), program.named_nodes()
    convex = [r for r in program.regions if reach.is_convex(nodes[node] for node in r.nodes)]
    assert len(convex) >= 3
    program = program.replace(regions=tuple(convex))
    groups = tuple((region.name,) for region in convex)
    guarded = checked(InsertGuards(groups)(program))
    users = model.users()
    old = history(program, run(Specialize(frozenset())(program), model.module, model.users(1)).state)
    names = sorted(region.name for region in convex)
    for reused in (frozenset(), frozenset(names), frozenset(names[::2])):
        expected = run(Specialize(reused)(program), model.module, users, old)
        choice = {name: name not in reused for name in names}
        got = run(guarded, model.module, users, old, None, choice)
        assert equal(got.outputs, expected.outputs)
        for key, value in got.state.items():
            region = key.rsplit("/", 2)[0]
            assert torch.equal(value, old[key] if region in reused else expected.state[key.rpartition("/")[0]])
        assert not storages(got.state.values()) & storages([*got.outputs, *old.values()])


# --- isolation ---


def cached(name: str, schedule: Any, **options: Any) -> Any:
    return compile_with_cache(sample(name).module, schedule, backend="eager", **options)


def generate(model: Any, calls: Any, context: str | None = None) -> list[list[torch.Tensor]]:
    """Outputs of all steps, copied as they come."""
    results = []
    with torch.no_grad():
        for args, kwargs in calls:
            if context is None:
                output = model(*args, **kwargs)
            else:
                with model.cache_context(context):
                    output = model(*args, **kwargs)
            results.append([value.clone() for value in tensors(output)])
    return results


def same(left: list[list[torch.Tensor]], right: list[list[torch.Tensor]]) -> bool:
    return len(left) == len(right) and all(equal(a, b) for a, b in zip(left, right, strict=True))


@pytest.mark.parametrize("name", CORE)
def test_refreshing_at_every_step_is_the_model_itself(name: str) -> None:
    model = sample(name)
    calls = steps_of(model.entry, 4)
    expected = generate(model.module, calls)
    for schedule in (schedules.always(), schedules.interval(1)):
        denoiser = cached(name, schedule)
        assert same(generate(denoiser, calls), expected)
        assert denoiser.stats().refreshed == 4


@pytest.mark.parametrize("name", CORE)
def test_reusing_every_second_step_differs_there_alone(name: str) -> None:
    model = sample(name)
    calls = steps_of(model.entry, 4)
    expected = generate(model.module, calls)
    denoiser = cached(name, schedules.interval(2))
    got = generate(denoiser, calls)
    assert [bool(d.reused) for d in denoiser.stats().decisions] == [False, True, False, True]
    assert [equal(a, b) for a, b in zip(got, expected, strict=True)] == [True, False, True, False]


@pytest.mark.parametrize("decide", ["host", "graph"])
@pytest.mark.parametrize("name", ["plain-mlp", "plain-dit-shared-adaln", "DiTTransformer2DModel", "plain-unet"])
def test_what_the_caller_does_to_an_output_does_not_reach_the_cache(name: str, decide: str) -> None:
    calls = steps_of(sample(name).entry, 5)
    schedule = schedules.interval(3, forecast=Linear())
    expected = generate(cached(name, schedule, decide=decide), calls)
    denoiser = cached(name, schedule, decide=decide)
    got = []
    with torch.no_grad():
        for args, kwargs in calls:
            output = tensors(denoiser(*args, **kwargs))
            got.append([value.clone() for value in output])
            for value in output:
                value.add_(1e3)
    assert same(got, expected)


@pytest.mark.parametrize("name", SMALL)
def test_two_contexts_are_two_generations(name: str) -> None:
    entry = sample(name).entry
    first, second = steps_of(entry, 6, seed=0), steps_of(entry, 6, seed=1)
    schedule = schedules.interval(3, forecast=Linear())
    alone = [generate(cached(name, schedule), calls) for calls in (first, second)]
    denoiser = cached(name, schedule)
    mixed: list[list[list[torch.Tensor]]] = [[], []]
    for a, b in zip(first, second, strict=True):
        mixed[0] += generate(denoiser, [a], "cond")
        mixed[1] += generate(denoiser, [b], "uncond")
    assert same(mixed[0], alone[0])
    assert same(mixed[1], alone[1])
    assert not same(alone[0], alone[1])


@pytest.mark.parametrize("name", SMALL)
def test_two_instances_share_nothing(name: str) -> None:
    entry = sample(name).entry
    first, second = steps_of(entry, 6, seed=0), steps_of(entry, 6, seed=1)
    schedule = schedules.interval(3)
    alone = [generate(cached(name, schedule), calls) for calls in (first, second)]
    left, right = cached(name, schedule), cached(name, schedule)
    mixed: list[list[list[torch.Tensor]]] = [[], []]
    for a, b in zip(first, second, strict=True):
        mixed[0] += generate(left, [a])
        mixed[1] += generate(right, [b])
    assert same(mixed[0], alone[0])
    assert same(mixed[1], alone[1])


def test_two_threads_share_nothing() -> None:
    name = "plain-dit-shared-adaln"
    entry = sample(name).entry
    runs = [steps_of(entry, 8, seed=seed) for seed in range(4)]
    schedule = schedules.interval(3, forecast=Linear())
    alone = [generate(cached(name, schedule), calls) for calls in runs]
    denoiser = cached(name, schedule)
    got: dict[int, Any] = {}
    start = threading.Barrier(len(runs))

    def work(index: int) -> None:
        torch.set_num_threads(1)  # counts for the thread that calls it, and sums differ with the number
        start.wait()
        try:
            got[index] = generate(denoiser, runs[index])
        except BaseException as error:
            got[index] = error

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(runs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, expected in enumerate(alone):
        assert not isinstance(got[index], BaseException), got[index]
        assert same(got[index], expected)


@pytest.mark.parametrize("decide", ["host", "graph"])
@pytest.mark.parametrize("name", SMALL)
def test_an_exception_leaves_nothing_stale(name: str, decide: str) -> None:
    entry = sample(name).entry
    first, second = steps_of(entry, 6, seed=0), steps_of(entry, 6, seed=1)
    schedule = schedules.interval(3, forecast=Linear())
    expected = generate(cached(name, schedule, decide=decide), second)
    denoiser = cached(name, schedule, decide=decide)
    generate(denoiser, first[:4])  # a pipeline that raises between two calls never resets
    assert same(generate(denoiser, second), expected)

    denoiser = cached(name, schedule, decide=decide)
    generate(denoiser, first[:2])
    state = denoiser._driver.recognizer.contexts["#0"].payload
    broken = state.histories[next(iter(state.histories))]
    broken.slots[0][0] = torch.zeros(7, 11, 13)  # makes the next reuse fail in the middle of the program
    with pytest.raises(RuntimeError):
        generate(denoiser, first[2:3])
    again = generate(denoiser, second)
    assert same(again, expected)


# --- other backends ---

FEW = ("plain-unet", "DiTTransformer2DModel", "FluxTransformer2DModel", "plain-mlp")
COMPILED = CORE if os.environ.get("DIFFCACHE_FX_SWEEP") else FEW  # `make sweep` compiles all of them


@pytest.mark.inductor
@pytest.mark.parametrize("name", COMPILED)
def test_inductor_agrees_with_eager(name: str) -> None:
    model = sample(name)
    calls = steps_of(model.entry, 2)
    schedule = schedules.interval(2)
    expected = generate(cached(name, schedule), calls)
    denoiser = compile_with_cache(model.module, schedule, backend="inductor")
    got = generate(denoiser, calls)
    assert [bool(d.reused) for d in denoiser.stats().decisions] == [False, True]
    for a, b in zip(got, expected, strict=True):
        assert worst(a, b) < 1e-4


@pytest.mark.inductor
@pytest.mark.parametrize("name", ["plain-mlp", "plain-dit-shared-adaln"])
def test_every_program_is_one_full_graph(name: str) -> None:
    model, program = regions_of(name, "trunk", storage="auto", slots=2)
    users, rows = model.users(), hold_rows(program)
    old = history(program, run(Specialize(frozenset())(program), model.module, model.users(1)).state)
    guarded = InsertGuards()(program)
    (predicate,) = (entry.target for entry in guarded.inputs if entry.kind is InputKind.PREDICATE)
    for form, choices in (
        (Specialize(frozenset())(program), [None]),
        (Specialize(all_of(program))(program), [None]),
        (guarded, [{predicate: True}, {predicate: False}]),
    ):
        torch._dynamo.reset()
        compiled = torch.compile(form.module, fullgraph=True)
        for choice in choices:
            expected = run(form, model.module, users, old, rows, choice)
            got = run(form, model.module, users, old, rows, choice, call=compiled)
            assert worst(got.outputs, expected.outputs) < 1e-4
            assert got.state.keys() == expected.state.keys()
            for key, value in got.state.items():
                assert worst([value], [expected.state[key]]) < 1e-4
