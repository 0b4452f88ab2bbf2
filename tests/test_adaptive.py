"""Adaptive guards' decisions on Python floats, and that the same code on 0-d tensors decides alike."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from diffcache_fx.adaptive import AdaptiveGuard, DraftError, OutputChange, ProbeChange, RelativeChange
from diffcache_fx.judgement import relative_l1
from diffcache_fx.limits import Limits, decide, numbers_of, settled
from diffcache_fx.references import Latents, ModulatedInput

pytestmark = pytest.mark.usefixtures("one_thread")
NAN, INF = float("nan"), float("inf")
FREE = Limits()
Numbers = dict[str, float]


@dataclass
class Step:
    """What is measured at one step: before the decision, after it; whether the refresh is forced."""

    before: Numbers = field(default_factory=dict)
    after: Numbers = field(default_factory=dict)
    force: bool = False


@dataclass
class Taken:
    """One decision: refreshed or not, what was compared with what, the numbers for the next step."""

    refresh: bool
    signal: float
    limit: float
    memory: Numbers


Decide = Callable[[Numbers, Numbers, bool, Sequence[float]], Any]
Settle = Callable[[Numbers, Numbers, bool], Mapping[str, Any]]


def play(guard: AdaptiveGuard, steps: Sequence[Step], limits: Limits = FREE, traced: bool = False) -> list[Taken]:
    """Decide step by step as the driver does, on Python floats or by the traced code."""
    on_host: tuple[Decide, Settle] = (
        lambda before, memory, force, moment: decide(guard, limits, before, memory, force, moment),
        lambda after, memory, refresh: settled(guard, after, memory, refresh),
    )
    decides, settles = on_tensors(guard, limits, tuple(steps[0].before), tuple(steps[0].after)) if traced else on_host
    memory = dict.fromkeys(numbers_of(guard), 0.0)
    taken = []
    for index, step in enumerate(steps):
        force = step.force or index == 0  # nothing is kept yet
        verdict = decides(step.before, memory, force, (float(index), (index + 1) / len(steps)))
        refresh = bool(verdict.refresh)
        late = settles(step.after, {name: float(value) for name, value in verdict.memory.items()}, refresh)
        memory = {name: float(value) for name, value in late.items()}
        taken.append(Taken(refresh, float(verdict.signal), float(verdict.limit), memory))
    return taken


@cache
def on_tensors(
    guard: AdaptiveGuard, limits: Limits, before: tuple[str, ...], after: tuple[str, ...]
) -> tuple[Decide, Settle]:
    """The same two functions, traced on 0-d tensors: what the graph of a guarded program holds."""
    names, made, late = numbers_of(guard), [], []

    def first(*given: torch.Tensor) -> list[torch.Tensor]:
        supply = iter(given)
        measured = {name: next(supply) for name in before}
        memory = {name: next(supply) for name in names}
        verdict = decide(guard, limits, measured, memory, next(supply), [next(supply), next(supply)])
        made.append(list(verdict.memory))
        assert isinstance(verdict.refresh, torch.Tensor)
        plain = (verdict.refresh, verdict.signal, verdict.limit, *verdict.memory.values())
        return [value if isinstance(value, torch.Tensor) else torch.zeros(()) + value for value in plain]

    def second(*given: torch.Tensor) -> list[torch.Tensor]:
        supply = iter(given)
        measured = {name: next(supply) for name in after}
        found = settled(guard, measured, {name: next(supply) for name in names}, next(supply))
        late.append(list(found))
        return list(found.values())

    def number(value: float) -> torch.Tensor:
        return torch.tensor(value, dtype=torch.float32)

    def examples(*kinds: int) -> list[torch.Tensor]:
        after = kinds[1] if kinds[1:] else 0
        return [*(number(0.0) for _ in range(kinds[0])), torch.tensor(False), *(number(0.0) for _ in range(after))]

    graphs = [
        make_fx(first)(*examples(len(before) + len(names), 2)),
        make_fx(second)(*examples(len(after) + len(names))),
    ]
    for graph in graphs:
        assert not [node for node in graph.graph.nodes if node.op == "get_attr"]  # no constants in the graph

    def decides(measured: Numbers, memory: Numbers, force: bool, moment: Sequence[float]) -> Any:
        numbers = [number(measured[name]) for name in before] + [number(memory[name]) for name in names]
        refresh, signal, limit, *rest = graphs[0](*numbers, torch.tensor(force), *map(number, moment))
        assert refresh.dtype == torch.bool
        return Taken(refresh, signal, limit, dict(zip(made[0], rest, strict=True)))

    def settles(measured: Numbers, memory: Numbers, refresh: bool) -> Mapping[str, Any]:
        numbers = [number(measured[name]) for name in after] + [number(memory[name]) for name in names]
        return dict(zip(late[0], graphs[1](*numbers, torch.tensor(refresh)), strict=True))

    return decides, settles


def bits(taken: Sequence[Taken]) -> str:
    """R refreshed, u reused."""
    return "".join("R" if step.refresh else "u" for step in taken)


def changes(*values: float) -> list[Step]:
    return [Step({"change": value}) for value in values]


FBC = RelativeChange(threshold=0.25)
TEA = RelativeChange(ModulatedInput(), 0.25, "step", accumulate=True)


# --- on floats ---


def test_a_change_is_compared_with_the_threshold() -> None:
    taken = play(FBC, changes(0.0, 0.0, 0.2, 0.25, 0.24, 3.0))
    assert bits(taken) == "RuuRuR"
    assert [step.signal for step in taken] == [0.0, 0.0, 0.2, 0.25, 0.24, 3.0]
    assert {step.limit for step in taken} == {0.25}
    assert taken[-1].memory == {"run": 0.0, "reuses": 3.0, "refreshes": 3.0}


def test_changes_are_added_up_until_a_refresh() -> None:
    taken = play(TEA, changes(9.0, 0.125, 0.0625, 0.125, 0.125, 0.0625))
    assert bits(taken) == "RuuRuu"
    assert [step.signal for step in taken] == [9.0, 0.125, 0.1875, 0.3125, 0.125, 0.1875]
    assert [step.memory["total"] for step in taken] == [0.0, 0.125, 0.1875, 0.0, 0.125, 0.1875]


@pytest.mark.parametrize("guard", [TEA, ProbeChange(0.25)])
def test_a_forced_refresh_clears_the_sum(guard: AdaptiveGuard) -> None:
    steps = [Step({"change": 0.125, "ratio": 1.0}) for _ in range(5)]
    assert bits(play(guard, steps)) == "RuRuR"
    steps[3].force = True
    taken = play(guard, steps)
    assert bits(taken) == "RuRRu"
    assert taken[3].memory["total"] == 0.0
    assert taken[4].signal == 0.125
    steps[2].force = steps[3].force = False
    limited = play(guard, steps, Limits(longest_reuse=1))
    assert bits(limited) == "RuRuR"


def test_a_polynomial_comes_before_the_sum() -> None:
    guard = RelativeChange(ModulatedInput(), 1.0, "step", accumulate=True, coefficients=(2.0, 0.0, -0.25))
    taken = play(guard, changes(0.0, 0.5, 0.25, 1.0, 0.5))
    assert [step.signal for step in taken] == [-0.25, 0.25, 0.125, 1.875, 0.25]
    assert bits(taken) == "RuuRu"


NEVER: list[AdaptiveGuard] = [
    RelativeChange(threshold=0.0),
    RelativeChange(ModulatedInput(), 0.0, "step", accumulate=True, coefficients=(0.0, -1.0)),
    ProbeChange(0.0),
    OutputChange(0.0),
    DraftError(0.0, decay=1.0, floor=0.5),
]


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("guard", NEVER)
def test_threshold_zero_never_reuses(guard: AdaptiveGuard, traced: bool) -> None:
    before = {"change": 0.0, "ratio": 1.0, "moved": 0.0}
    steps = [Step(before, {"k": 1.0, "norm": 1.0, "error": 0.0})] * 6
    taken = play(guard, steps, traced=traced)
    assert bits(taken) == "RRRRRR"
    assert taken[-1].memory["refreshes"] == 6.0


@pytest.mark.parametrize("guard", [FBC, TEA, ProbeChange(0.25)])
def test_what_cannot_be_compared_is_refreshed(guard: AdaptiveGuard) -> None:
    steps = [Step({"change": value, "ratio": 1.0}) for value in (0.0, 0.125, NAN, 0.125, INF, 0.0)]
    taken = play(guard, steps)
    assert bits(taken) == "RuRuRu"
    assert math.isnan(taken[2].signal)
    assert not any(math.isnan(value) for step in taken for value in step.memory.values())


def test_the_output_change_takes_two_refreshes_to_know_its_rate() -> None:
    guard = OutputChange(0.5)
    after = {"k": 2.0, "norm": 8.0}
    steps = [Step({"moved": 1.0}, after) for _ in range(6)]
    steps[0].after = {"k": 100.0, "norm": 8.0}
    taken = play(guard, steps)
    assert bits(taken) == "RRuRuR"  # 2 * 1 / 8 at each step
    assert [step.signal for step in taken[2:]] == [0.25, 0.5, 0.25, 0.5]
    steps[2].after = {"k": NAN, "norm": NAN}  # nothing that a reuse step returns counts
    assert bits(play(guard, steps)) == "RRuRuR"
    steps[1].after = {"k": 2.0, "norm": 0.0}
    assert play(guard, steps)[2].signal == 0.0
    steps[1].after = {"k": NAN, "norm": 8.0}
    assert bits(play(guard, steps)) == "RRRRuR"


def test_a_draft_is_trusted_unseen_a_few_times() -> None:
    guard = DraftError(0.25, decay=1.0, floor=0.125, least=2)

    def drafts(*errors: float) -> list[Step]:
        return [Step({}, {"error": error}) for error in errors]

    assert bits(play(guard, drafts(*[0.0] * 8))) == "Ruuuuuuu"
    assert bits(play(guard, drafts(*[0.25] * 8))) == "RuuuRuuu"  # the verdicts on drafts 1 and 2 do not count
    assert bits(play(guard, drafts(*[0.25, 0.25, 0.25, 0.0, 0.25, 0.0]))) == "Ruuuu" + "R"
    assert bits(play(guard, drafts(*[0.2] * 8))) == "Ruuuuuuu"
    assert bits(play(guard, drafts(*[NAN] * 8))) == "RuuuRuuu"
    taken = play(guard, drafts(*[0.25] * 8), Limits(longest_reuse=2))
    assert bits(taken) == "RuuRuuRu"
    assert [step.memory["drafts"] for step in taken] == [0.0, 1.0, 2.0, 0.0, 1.0, 2.0, 0.0, 1.0]


def test_the_bound_of_drafts_falls_to_its_floor() -> None:
    taken = play(DraftError(1.0, decay=0.25, floor=0.3, least=0), [Step({}, {"error": 0.0})] * 4)
    assert [step.limit for step in taken] == pytest.approx([0.25**0.25, 0.5, 0.25**0.75, 0.3])


@pytest.mark.parametrize("traced", [False, True])
def test_limits_hold_whatever_the_guard_says(traced: bool) -> None:
    still = changes(*[0.0] * 8)
    assert bits(play(FBC, still, traced=traced)) == "Ruuuuuuu"
    assert bits(play(FBC, still, Limits(longest_reuse=2), traced)) == "RuuRuuRu"
    assert bits(play(FBC, still, Limits(most_reuses=3), traced)) == "RuuuRRRR"
    assert bits(play(FBC, still, Limits(2, 3), traced)) == "RuuRuRRR"
    taken = play(FBC, still, Limits(2, 3), traced)
    assert taken[-1].memory == {"run": 0.0, "reuses": 3.0, "refreshes": 5.0}


def test_signals_are_relative_mean_changes() -> None:
    now, before = torch.tensor([1.0, -3.0, 2.0]), torch.tensor([1.0, -1.0, 4.0])
    assert relative_l1(now, before) == pytest.approx(4 / 6)
    assert relative_l1(now, torch.zeros(3)) == 0.0  # nothing to compare with
    assert relative_l1(now.to(torch.bfloat16), before.to(torch.bfloat16)).dtype == torch.float32
    found = FBC.before({"p": now}, {"p": before})
    assert found["change"] == pytest.approx(4 / 6)
    probe = ProbeChange(0.4, minus_input=True)
    kept = {"y": before, "p1": 3 * before, "p2": before, "x": 2 * before}
    found = probe.before({"y": now, "p": now, "x": before}, kept)
    assert found["change"] == pytest.approx(abs(4 / 6 - 1 / 2))
    assert found["ratio"] == pytest.approx(4 / 12)
    output = OutputChange(0.1)
    assert output.before({"x": now}, {"x": before})["moved"] == pytest.approx(4 / 3)
    late = output.after({"x": now, "v": 2 * now}, {"x_full": before, "v_full": now})
    assert (float(late["k"]), float(late["norm"])) == pytest.approx((6 / 4, 4.0))


# --- on tensors ---

LATENTS = Latents()
GUARDS: list[AdaptiveGuard] = [
    RelativeChange(LATENTS, 0.25),
    RelativeChange(LATENTS, 0.0),
    RelativeChange(LATENTS, 0.5, accumulate=True),
    RelativeChange(LATENTS, 1.0, "step", accumulate=True, coefficients=(2.0, -1.0, 0.25)),
    RelativeChange(LATENTS, 0.0, "step", accumulate=True, coefficients=(-1.0, 0.0)),
    ProbeChange(0.75),
    OutputChange(0.5),
    DraftError(0.25, decay=1.0, floor=0.125, least=1),
    DraftError(0.3, decay=0.2, floor=0.07, least=2),
]
LIMITS = [FREE, Limits(longest_reuse=2), Limits(most_reuses=3), Limits(3, 5)]
# Sums and products of these are exact in float32, so that no decision hangs on rounding.
sixteenths = st.integers(0, 16).map(lambda n: n / 16)
signals = st.one_of(sixteenths, sixteenths, sixteenths, st.sampled_from([NAN, INF]))
powers = st.sampled_from([0.0, 0.5, 1.0, 2.0, NAN])
steps = st.builds(
    Step,
    st.fixed_dictionaries({"change": signals, "ratio": signals, "moved": signals}),
    st.fixed_dictionaries({"k": powers, "norm": powers, "error": signals}),
    st.sampled_from([False, False, False, True]),
)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.sampled_from(GUARDS), st.sampled_from(LIMITS), st.lists(steps, min_size=2, max_size=20))
def test_the_graph_decides_as_the_host_does(guard: AdaptiveGuard, limits: Limits, run: list[Step]) -> None:
    host, graph = play(guard, run, limits), play(guard, run, limits, traced=True)
    for a, b in zip(host, graph, strict=True):
        assert a.refresh == b.refresh
        assert b.signal == pytest.approx(a.signal, nan_ok=True)
        assert b.limit == pytest.approx(a.limit)
        assert b.memory == pytest.approx(a.memory, nan_ok=True)
    # what holds for every guard and any signals
    longest = max(map(len, bits(host).split("R")))
    assert host[0].refresh
    assert limits.longest_reuse is None or longest <= limits.longest_reuse
    assert limits.most_reuses is None or bits(host).count("u") <= limits.most_reuses
    assert all(a.refresh for a, step in zip(host, run, strict=True) if step.force)
    assert guard.threshold > 0 or "u" not in bits(host)
    assert host[-1].memory["refreshes"] + host[-1].memory["reuses"] == len(run)


def always(signal: float) -> list[Step]:
    before = {"change": signal, "ratio": 1.0, "moved": signal}
    return [Step(before, {"k": 1.0, "norm": 1.0, "error": signal})] * 8


@pytest.mark.parametrize("guard", GUARDS)
def test_the_guards_above_reuse_in_a_still_run_and_refresh_in_a_lively_one(guard: AdaptiveGuard) -> None:
    still, lively = (bits(play(guard, always(signal))) for signal in (0.0, 1.0))
    assert ("u" in still) == (guard.threshold > 0)
    assert lively.count("R") > still.count("R") or guard.threshold == 0
