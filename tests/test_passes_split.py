"""Probe and RestOfStep: together they are the whole step, and compute nothing twice."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from diffcache_fx.passes.flops import program_flops
from diffcache_fx.passes.inline import inline
from diffcache_fx.passes.signals import AddSignals
from diffcache_fx.passes.specialize import Specialize
from diffcache_fx.passes.split import Probe, RestOfStep, live_names, owns_memory

from diffcache_fx import Trunk, Whole
from diffcache_fx.adaptive import AdaptiveGuard, OutputChange, ProbeChange, RelativeChange
from diffcache_fx.compile import run_passes
from diffcache_fx.errors import VerificationError
from diffcache_fx.program import InputKind, OutputKind, StepProgram, output_node
from diffcache_fx.references import BlocksOutput
from diffcache_fx.selection import Selection

from .conftest import equal, sample, storages
from .test_passes_signals import FBC, TEA, Net, T, Values, X, evaluate, measuring

pytestmark = pytest.mark.usefixtures("one_thread")
SPLIT = ("plain-dit-shared-adaln", "DiTTransformer2DModel", "PixArtTransformer2DModel", "FluxTransformer2DModel")
GUARDS: dict[str, tuple[AdaptiveGuard, Selection]] = {
    "first_block": (FBC, Trunk(first=1)),
    "modulated": (TEA, Trunk(first=0)),
    "probe": (ProbeChange(0.1, 2, minus_input=True), Trunk(first=0)),
    "output": (OutputChange(0.1), Whole()),
}
CASES = [
    *((name, kind) for name in SPLIT for kind in ("modulated", "probe")),
    ("plain-dit-shared-adaln", "first_block"),
    ("FluxTransformer2DModel", "first_block"),
    ("plain-vit", "first_block"),
    ("plain-mlp", "output"),
    ("WanTransformer3DModel", "modulated"),
]


@cache
def split(name: str, kind: str) -> tuple[StepProgram, StepProgram, StepProgram, StepProgram, StepProgram]:
    """Whole refresh, whole reuse, probe, rest of a refresh, rest of a reuse."""
    guard, selection = GUARDS[kind]
    program = run_passes(sample(name).with_regions(selection, "residual"), (AddSignals(((0, guard),)),))
    every = frozenset(region.name for region in program.regions)
    whole = [run_passes(program, (Specialize(reused),)) for reused in (frozenset[str](), every)]
    rest = [run_passes(entry, (RestOfStep(),)) for entry in whole]
    return whole[0], whole[1], run_passes(program, (Probe(live_names(rest[0])),)), rest[0], rest[1]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_probe_and_rest_are_the_whole_step(name: str, kind: str) -> None:
    model, (refresh, reuse, probe, fresh, held) = sample(name), split(name, kind)
    generator = torch.Generator().manual_seed(3)
    given: Values = {}
    for entry, node in zip(reuse.inputs, reuse.graph.find_nodes(op="placeholder"), strict=True):
        if entry.kind in (InputKind.HISTORY, InputKind.MEMORY):
            given[entry.kind, entry.target] = torch.randn(node.meta["val"].shape, generator=generator)
    early = evaluate(probe, model.module, model.users(1), given)
    signals = [value for (kind, _), value in early.items() if kind is OutputKind.SIGNAL]
    assert signals
    assert all(value.shape == () and value > 0 for value in signals)
    given |= {(InputKind.LIVE, target): value for (kind, target), value in early.items() if kind is OutputKind.LIVE}
    for whole, rest in ((refresh, fresh), (reuse, held)):
        expected = evaluate(whole, model.module, model.users(1), given)
        late = evaluate(rest, model.module, model.users(1), given)
        assert {*early, *late} - {key for key in early if key[0] is OutputKind.LIVE} == set(expected)
        assert not set(early) & set(late)
        assert equal(list(expected.values()), [{**early, **late}[key] for key in expected])


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_nothing_is_computed_twice(name: str, kind: str) -> None:
    refresh, reuse, probe, fresh, held = split(name, kind)
    for whole, rest in ((refresh, fresh), (reuse, held)):
        assert program_flops(probe) + program_flops(rest) == program_flops(whole)
        parts = [{node.name for node in part.graph.nodes if owns_memory(node)} for part in (probe, rest)]
        assert not parts[0] & parts[1]
        assert parts[0] | parts[1] == {node.name for node in whole.graph.nodes if owns_memory(node)}
    assert set(live_names(held)) <= set(live_names(fresh))
    assert kind == "output" or program_flops(probe) > 0
    assert program_flops(held) < program_flops(fresh)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_what_is_handed_on_and_kept_lies_in_memory_of_its_own(name: str, kind: str) -> None:
    model, (refresh, _, probe, _, _), users = sample(name), split(name, kind), sample(name).users(1)
    early, found = (evaluate(program, model.module, users, {}) for program in (probe, refresh))
    live = {target: value for (what, target), value in early.items() if what is OutputKind.LIVE}
    nodes = refresh.named_nodes()
    assert all(owns_memory(nodes[target]) for target in live)
    assert len(storages(live.values())) == len(live)
    assert bool(live) == (kind != "output")
    kept = [value for (what, _), value in found.items() if what is OutputKind.MEMORY]
    outputs = [value for (what, _), value in found.items() if what in (OutputKind.USER, OutputKind.STATE)]
    assert len(storages(kept)) == len(kept) > 0
    assert not storages(kept) & storages([*users, *outputs, *model.module.parameters()])


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_what_is_kept_lies_as_the_next_step_takes_it(name: str, kind: str) -> None:
    """Compiled programs take their inputs in the layout that the placeholder has."""
    for program in split(name, kind)[:3]:
        taken = zip(program.graph.find_nodes(op="placeholder"), program.inputs, strict=True)
        layouts = {entry.target: node.meta["val"].stride() for node, entry in taken if entry.kind is InputKind.MEMORY}
        guard, found = GUARDS[kind][0], evaluate(program, sample(name).module, sample(name).users(1), {})
        for target, layout in layouts.items():
            source = target.partition("/")[2]
            while source not in guard.references:
                source = guard.kept[source].of
            value = found.get((OutputKind.MEMORY, f"0/{source}"))
            assert value is None or value.stride() == layout, target


def test_what_is_kept_is_no_view_that_the_caller_holds() -> None:
    class Two(Net):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> Any:
            first = self.blocks[0](self.enter(x), t + 1)
            return self.head(self.blocks[2](self.blocks[1](first, t + 1), t + 1)), first.view(4, 4)

    net = Two()
    program = measuring(RelativeChange(BlocksOutput(1, residual=False)), Trunk(first=1), net)
    found = evaluate(program, net, [X, T], {})
    assert not storages([found[OutputKind.MEMORY, "0/p"]]) & storages([found[OutputKind.USER, "1"]])


# --- inline ---


def test_inline_takes_code_without_constants() -> None:
    program = measuring(FBC, Trunk(first=1)).copy()
    nodes = program.named_nodes()
    with program.graph.inserting_before(output_node(program.graph)):
        found = inline(program.graph, lambda values: {"twice": values["a"] * 2, "plain": 3}, {"a": nodes["add_1"]})
        assert found["plain"] == 3
        assert found["twice"].args == (nodes["add_1"], 2)
        inline(program.graph, lambda values: values["a"] * torch.tensor(2.0), {"a": nodes["add_1"]})
        assert program.graph.find_nodes(op="call_function", target=torch.ops.aten.full.default)  # one number: a call
        with pytest.raises(VerificationError, match="makes a tensor of its own"):
            inline(program.graph, lambda values: values["a"] * torch.tensor([2.0]), {"a": nodes["add_1"]})
