"""Every published method against a straight hand-written reference of its formula, hooked into the plain module: equal
decisions step by step, outputs within rounding, over a generation of 20 steps."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.zoo import corpus
from diffcache_fx import CachedDenoiser, CacheSchedule, Trunk, compile_with_cache, schedules
from diffcache_fx.demo.digits import load_digits
from diffcache_fx.measure import compiler_use

from . import references as ref
from .conftest import worst

pytestmark = pytest.mark.usefixtures("one_thread")

STEPS = 20
BLOCKS = [f"transformer_blocks.{i}" for i in range(12)]
LAYERS = [f"{block}.{kind}" for block in BLOCKS for kind in ("attn1", "ff")]
ATTENTION, MLP = LAYERS[::2], LAYERS[1::2]
TEXT_BLOCKS = [f"transformer_blocks.{i}" for i in range(6)]
CROSS, OWN = [f"{b}.attn2" for b in TEXT_BLOCKS], [f"{b}.attn1" for b in TEXT_BLOCKS]
POLYNOMIAL = (-2.0, 1.5, -0.5, 1.2, 0.01)
RATIOS = [1.0, *(1.0 + 0.02 * (i % 5) - 0.01 * (i % 3) for i in range(1, 28))]
BITS = [[int(step == 0 or (step + block) % 3 == 0) for block in range(12)] for step in range(STEPS)]
ROWS = [[1.0 + 0.1 * (step % 4), -0.1 * (step % 4)] for step in range(STEPS)]
FULL_WINDOW = (-1.0, 1001.0)


@dataclass(frozen=True)
class Case:
    """A schedule, the reference that it must equal, and which of its regions belong to each part of the reference's
    decisions (by the number of the rule; None: all of them, or the region of the same name)."""

    schedule: CacheSchedule
    reference: Callable[[nn.Module], ref.Reference]
    model: str = "digits"
    parts: dict[str, int] = field(default_factory=dict)


def forecasting(schedule: CacheSchedule, interval: int, warm_up: int, rule: ref.Rule) -> Case:
    return Case(schedule, lambda m: ref.Forecasting(m, LAYERS, interval, warm_up, rule))


def bdf2_heun(history: Any, step: int) -> Tensor:
    """FoCa for evenly spaced refreshes: BDF2 of the slope at the newest value, then Heun's mean of two slopes."""
    ahead = step - history[0][0]
    if len(history) == 1:
        return history[0][1]
    newest, second = history[0][1], history[1][1]
    apart = history[0][0] - history[1][0]
    slope = (newest - second) / apart
    if len(history) > 2:
        slope = (3 * newest - 4 * second + history[2][1]) / (2 * apart)
    w = ahead / apart
    predicted = newest + ahead * (w * (newest - second) / apart + (1 + w) * slope) / (1 + 2 * w)
    return newest + ahead / 2 * (slope + (predicted - newest) / ahead)


CASES: dict[str, Case] = {
    "deep_cache": Case(schedules.deep_cache(3), lambda m: ref.DeepCache(m, "up_blocks.2.resnets.2", 3), "UNet2DModel"),
    "fora": Case(schedules.fora(3), lambda m: ref.FORA(m, 3, LAYERS)),
    "delta_dit": Case(
        schedules.delta_dit(3, gate=10),
        lambda m: ref.DeltaDiT(m, 3, 10, BLOCKS[6:], BLOCKS[:6]),
        parts={"rear": 0, "front": 1},
    ),
    "pab": Case(
        schedules.pab(2, 6, window=(800, 975)),
        lambda m: ref.PAB(m, {"own": OWN, "cross": CROSS}, {"own": 2, "cross": 6}, (800, 975)),
        "PixArtTransformer2DModel",
        {"own": 0, "cross": 1},
    ),
    "t_gate": Case(
        schedules.t_gate(10, 4, halves=True),
        lambda m: ref.TGATE(m, CROSS, OWN, gate_step=10, self_interval=4),
        "PixArtTransformer2DModel",
        {"cross": 0, "self": 1},
    ),
    "first_block_cache": Case(schedules.first_block_cache(0.2), lambda m: ref.FBCache(m, BLOCKS, 0.2)),
    "db_cache": Case(
        schedules.db_cache(4, 2, 0.2, warm_up=3, longest_reuse=2, most_reuses=8),
        lambda m: ref.DBCache(m, BLOCKS, 0.2, 4, 2, 3, max_cached=8, longest=2),
    ),
    "tea_cache": Case(schedules.tea_cache(0.3, POLYNOMIAL), lambda m: ref.TeaCache(m, BLOCKS, POLYNOMIAL, 0.3, STEPS)),
    "mag_cache": Case(
        schedules.mag_cache(0.1, RATIOS, longest=3, retention=0.2),
        lambda m: ref.MagCache(m, BLOCKS, RATIOS, 0.1, 3, 0.2, STEPS),
    ),
    "easy_cache": Case(schedules.easy_cache(0.15, warm_up=3), lambda m: ref.EasyCache(m, 0.15, 3, STEPS)),
    "di_cache": Case(schedules.di_cache(0.3, warm_up=5), lambda m: ref.DiCache(m, BLOCKS, 0.3, 0.2, STEPS)),
    "smooth_cache": Case(
        schedules.smooth_cache(attention=[1, 0] * 10, mlp=[1, 0, 0, 0] * 5),
        lambda m: ref.SmoothCache(
            m, {"attention": ATTENTION, "mlp": MLP}, {"attention": [1, 0] * 10, "mlp": [1, 0, 0, 0] * 5}
        ),
        parts={"attention": 0, "mlp": 1},
    ),
    "block_cache": Case(schedules.block_cache(BITS), lambda m: ref.BlockCaching(m, BLOCKS, BITS)),
    "taylor_seer": forecasting(schedules.taylor_seer(4, 2, warm_up=3), 4, 3, ref.taylor(2)),
    "hi_cache": forecasting(schedules.hi_cache(4, 2, 0.5), 4, 3, ref.hermite(2, 0.5)),
    "foca": forecasting(schedules.foca(3, warm_up=1), 3, 1, bdf2_heun),
    "ab_cache": forecasting(schedules.ab_cache(3, 3), 3, 2, ref.adams_bashforth(3)),
    "cheb_booster": forecasting(schedules.cheb_booster(4, 3, warm_up=1), 4, 1, ref.berrut(3)),
    "l2p": forecasting(schedules.l2p(ROWS, 3), 3, 1, lambda h, s: ref.rows(ROWS)(h, s) if len(h) > 1 else h[0][1]),
    "speca": Case(
        schedules.speca(0.2, decay=0.5, least=1, longest_reuse=4, order=1),
        lambda m: ref.SpeCa(m, BLOCKS, STEPS, 0.2, 0.5, 1, 4, 1, 3, error=ref.ratio, plain_warm_up=True),
    ),
    "faster_cache": Case(
        schedules.faster_cache(branch_window=(860, 985), window=FULL_WINDOW, high_window=(-1.0, 930.0)),
        lambda m: ref.FasterCache(
            m, [*OWN, *CROSS], window=(860, 985), attention_window=FULL_WINDOW, high_window=(-1.0, 930.0)
        ),
        "PixArtTransformer2DModel",
    ),
}
# Under Inductor in `make test`: one of each form (straight programs, split at the decision, verified draft).
FEW = ("taylor_seer", "first_block_cache", "speca")
SWEEP = bool(os.environ.get("DIFFCACHE_FX_SWEEP"))  # `make sweep` compiles all of them
COMPILED = tuple(CASES) if SWEEP else FEW
ADAPTIVE = tuple(name for name, case in CASES.items() if case.schedule.adaptive)


@cache
def model_of(name: str) -> nn.Module:
    return load_digits().model if name == "digits" else corpus()[name].build()


def generation(call: Callable[..., Any], case: Case, steps: int = STEPS) -> list[Tensor]:
    """The model's outputs in one generation: each step's latents follow from the output before."""
    if case.model == "digits":
        scheduler = load_scheduler()
        scheduler.set_timesteps(steps)
        x = torch.randn(4, 1, 32, 32, generator=torch.Generator().manual_seed(0))
        outputs = []
        for t in scheduler.timesteps:
            labels = torch.tensor([3, 7, 10, 10])
            outputs.append(call(x, timestep=t.expand(4), class_labels=labels, return_dict=False)[0])
            x = scheduler.step(outputs[-1], t, x).prev_sample
        return outputs
    entry = corpus()[case.model]
    args, kwargs = entry.inputs(0)
    named = dict(zip(("sample", "timestep"), args, strict=False)) if case.model.startswith("UNet") else {}
    x, outputs = args[0], []
    for step in range(steps):
        moment = torch.full((x.shape[0],), 990 - 7 * step, dtype=torch.int64)
        given = {**kwargs, "timestep": moment} if not named else kwargs
        rest = (moment,) if named else ()
        output = call(x, *rest, **given)
        output = output[0] if isinstance(output, tuple) else output.sample
        outputs.append(output[:, : x.shape[1]])
        x = x - 0.05 * outputs[-1]
    return outputs


def two_branches(call: Callable[..., Any], steps: int = STEPS) -> list[Tensor]:
    """Sequential guidance: the conditional branch first, then the unconditional one, in contexts of these names."""
    args, kwargs = corpus()["PixArtTransformer2DModel"].inputs(0)
    x, outputs = args[0], []
    text = kwargs["encoder_hidden_states"]
    for step in range(steps):
        moment = torch.full((x.shape[0],), 990 - 7 * step, dtype=torch.int64)
        pair = []
        for name, states in (("cond", text), ("uncond", 0.1 * text)):
            output = call(name, x, **{**kwargs, "encoder_hidden_states": states, "timestep": moment})
            pair.append((output[0] if isinstance(output, tuple) else output.sample).clone())
        outputs += pair
        x = x - 0.05 * (pair[1] + 2.0 * (pair[0] - pair[1]))[:, : x.shape[1]]
    return outputs


@cache
def load_scheduler() -> Any:
    return load_digits().scheduler()


@pytest.fixture
def attach() -> Iterator[Callable[[Case], ref.Reference]]:
    made: list[ref.Reference] = []

    def make(case: Case) -> ref.Reference:
        made.append(case.reference(model_of(case.model)))
        return made[-1]

    yield make
    for reference in made:
        reference.remove()


def expected_of(case: Case, reference: ref.Reference) -> tuple[list[Tensor], Any]:
    """Outputs and decisions of the reference, which is taken off the model again."""
    if isinstance(reference, ref.FasterCache):
        outputs = two_branches(lambda name, *a, **k: reference(*a, context=name, **k))
    else:
        outputs = generation(reference, case)
    reference.remove()
    return outputs, reference.decisions


def outputs_of(denoiser: CachedDenoiser, case: Case, steps: int = STEPS) -> list[Tensor]:
    if denoiser._own["schedule"].branch is None:
        outputs = generation(denoiser, case, steps)
    else:

        def call(name: str, *args: Any, **kwargs: Any) -> Any:
            with denoiser.cache_context(name):
                return denoiser(*args, **kwargs)

        outputs = two_branches(call, steps)
    denoiser.reset()
    return outputs


def decided(denoiser: CachedDenoiser, case: Case, expected: Any) -> Any:
    """Our decisions in the shape of the reference's."""
    decisions = denoiser.stats().decisions
    if isinstance(expected, list):
        return [not decision.reused for decision in decisions]
    if "uncond" in expected:
        own = [d for d in decisions if d.context == "cond"]
        return {
            "uncond": [not d.rebuilt for d in decisions if d.context == "uncond"],
            "attention": [not d.reused for d in own],
        }
    regions = denoiser._captured().program.regions  # type: ignore[union-attr]
    found = {}
    for part in expected:
        names = {r.name for r in regions if (r.rule == case.parts[part] if case.parts else r.name == part)}
        assert names
        found[part] = [names <= set(decision.refreshed) for decision in decisions]
    return found


def flat(decisions: Any) -> list[bool]:
    return [bit for part in decisions.values() for bit in part] if isinstance(decisions, dict) else decisions


def cached(case: Case, backend: str = "eager", decide: Any = "host") -> CachedDenoiser:
    model = model_of(case.model)
    return compile_with_cache(model, case.schedule, backend=backend, decide=decide, num_steps=STEPS, max_programs=None)


def agree(got: Sequence[Tensor], expected: Sequence[Tensor], bound: float) -> None:
    for step, (ours, theirs) in enumerate(zip(got, expected, strict=True)):
        assert worst([ours], [theirs]) < bound, f"output {step}"


@pytest.mark.parametrize("name", CASES)
def test_a_method_is_its_formula(name: str, attach: Any) -> None:
    case = CASES[name]
    expected, decisions = expected_of(case, attach(case))
    assert True in flat(decisions)
    assert False in flat(decisions)
    denoiser = cached(case)
    got = outputs_of(denoiser, case)
    assert decided(denoiser, case, decisions) == decisions
    agree(got, expected, 2e-4)


@pytest.mark.inductor
@pytest.mark.parametrize("name", COMPILED)
def test_a_method_is_its_formula_compiled(name: str, attach: Any) -> None:
    """And the compiler is not called again after the first generation, over three more of different length."""
    case = CASES[name]
    expected, decisions = expected_of(case, attach(case))
    denoiser = cached(case, "inductor")
    got = outputs_of(denoiser, case)
    assert decided(denoiser, case, decisions) == decisions
    agree(got, expected, 1e-3)
    with compiler_use() as use:
        for steps in (7, 20, 13):
            outputs_of(denoiser, case, steps)
    assert use.compilations == 0


@pytest.mark.parametrize("name", ADAPTIVE)
def test_the_graph_decides_as_the_host_does(name: str) -> None:
    case = CASES[name]
    host, graph = cached(case), cached(case, decide="graph")
    expected, got = outputs_of(host, case), outputs_of(graph, case)
    ours, theirs = graph.stats(), host.stats()
    assert [d.reused for d in ours.decisions] == [d.reused for d in theirs.decisions]
    for mine, other in zip(ours.decisions, theirs.decisions, strict=True):
        assert (mine.signal is None) == (other.signal is None)
        if other.signal is not None:
            assert mine.signal == pytest.approx(other.signal, rel=1e-4, abs=1e-6)
    assert ours.reads == 0
    assert 0 < theirs.reads <= 2 * STEPS
    agree(got, expected, 1e-4)


@pytest.mark.parametrize("name", CASES if SWEEP else ("first_block_cache", "speca", "delta_dit"))
def test_the_guarded_program_is_one_full_graph(name: str) -> None:
    """The conditionals, and the decision of adaptive guards, inside: no graph break, and the same outputs."""
    case = CASES[name]
    expected = outputs_of(cached(case, decide="graph"), case, 6)
    torch._dynamo.reset()

    def whole(module: Any, examples: Any) -> Any:
        return torch.compile(module, fullgraph=True, backend="inductor" if SWEEP else "eager")

    model = model_of(case.model)
    denoiser = compile_with_cache(
        model, case.schedule, backend=whole, decide="graph", num_steps=STEPS, max_programs=None
    )
    agree(outputs_of(denoiser, case, 6), expected, 1e-3)


NEVER = {
    "deep_cache": schedules.deep_cache(1),
    "fora": schedules.fora(1),
    "delta_dit": schedules.delta_dit(1, gate=10),
    "pab": schedules.pab(1, 1, window=FULL_WINDOW),
    "first_block_cache": schedules.first_block_cache(0),
    "db_cache": schedules.db_cache(4, 2, 0, warm_up=1),
    "tea_cache": schedules.tea_cache(0, POLYNOMIAL),
    "mag_cache": schedules.mag_cache(0, RATIOS),
    "easy_cache": schedules.easy_cache(0, warm_up=3),
    "di_cache": schedules.di_cache(0),
    "smooth_cache": schedules.smooth_cache(attention=[1] * STEPS),
    "block_cache": schedules.block_cache([[1] * 12] * STEPS),
    "taylor_seer": schedules.taylor_seer(1, 2),
    "hi_cache": schedules.hi_cache(1),
    "foca": schedules.foca(1),
    "ab_cache": schedules.ab_cache(1),
    "cheb_booster": schedules.cheb_booster(1),
    "l2p": schedules.l2p(ROWS, 1),
    "speca": schedules.speca(0),
    "faster_cache": schedules.faster_cache(1, branch_interval=1),
}


@pytest.mark.parametrize("name", NEVER)
def test_never_reusing_is_the_uncached_model(name: str) -> None:
    case = Case(NEVER[name], CASES[name].reference, CASES[name].model)
    model = model_of(case.model)
    denoiser = cached(case)
    got = outputs_of(denoiser, case)
    with torch.no_grad():
        plain = two_branches(lambda _, *a, **k: model(*a, **k)) if case.schedule.branch else generation(model, case)
    assert all(not decision.reused for decision in denoiser.stats().decisions)
    assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))


def test_every_method_has_a_reference() -> None:
    own = {"always", "default", "interval", "mask"}
    assert set(CASES) == set(schedules.list()) - own
    assert set(NEVER) == set(CASES) - {"t_gate"}  # it has no interval or threshold that means never


def test_a_fixed_forecast_on_fewer_values() -> None:
    """Trunk(first=0) keeps one value where the layers keep one each, with the same decisions."""
    case = Case(schedules.taylor_seer(4, 1, regions=Trunk(first=0)), CASES["taylor_seer"].reference)
    lite, full = cached(case), cached(CASES["taylor_seer"])
    outputs_of(lite, case)
    outputs_of(full, case)
    assert [bool(d.reused) for d in lite.stats().decisions] == [bool(d.reused) for d in full.stats().decisions]
    assert 0 < lite.stats().cache_bytes < full.stats().cache_bytes / 10
