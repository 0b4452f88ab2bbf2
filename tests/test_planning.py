"""Planner: dynamic programming against exhaustive search, weights against least squares, and what E means."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from diffcache_fx.errors import CalibrationError
from diffcache_fx.filling import COHERENCE, differences
from diffcache_fx.planning import Planned, Planner


def values(steps: int, width: int = 40, seed: int = 0) -> np.ndarray:
    """A smooth curve in `width` dimensions that turns faster towards its end, [steps, width]."""
    source = np.random.default_rng(seed)
    time = np.linspace(0.0, 1.0, steps)[:, None] ** 2
    waves = np.sin(time * source.uniform(1, 9, width) + source.uniform(0, 6, width))
    return waves * source.uniform(0.1, 2, width)


def gains(steps: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed + 100).uniform(0.2, 2.0, steps)


def planner(steps: int, seed: int = 0, **options: int) -> Planner:
    curve = values(steps, seed=seed)
    return Planner(differences(curve @ curve.T), gains(steps, seed), **options)


def plans(steps: int, refreshes: int, warm_up: int) -> list[tuple[int, ...]]:
    """All of them."""
    return [
        (*range(warm_up), *rest)
        for count in range(refreshes - warm_up + 1)
        for rest in itertools.combinations(range(warm_up, steps), count)
    ]


def in_runs(found: Planner, refreshes: tuple[int, ...]) -> float:
    """The sum that dynamic programming minimises."""
    total = 0.0
    for index, step in enumerate(refreshes):
        past = tuple(reversed(refreshes[max(0, index + 1 - found.history) : index + 1]))
        end = refreshes[index + 1] if index + 1 < len(refreshes) else found.steps
        total += float(found.run_errors(past)[end - step - 1])
    return total


@pytest.mark.parametrize("history", [1, 2, 3])
@pytest.mark.parametrize("warm_up", [1, 2])
@pytest.mark.parametrize("seed", [0, 1])
def test_dynamic_programming_is_exact(history: int, warm_up: int, seed: int) -> None:
    steps = 9
    found = planner(steps, seed, history=history, warm_up=warm_up)
    for refreshes in range(warm_up, steps + 1):
        least = min(in_runs(found, plan) for plan in plans(steps, refreshes, warm_up))
        selected = found.selected(refreshes)
        assert in_runs(found, selected) == pytest.approx(least, abs=1e-9)
        assert len(selected) <= refreshes
        assert set(range(warm_up)) <= set(selected)


def test_the_gap_to_exhaustive_search() -> None:
    """Of E itself, which is not additive: over 8 curves and all budgets the plan found is the best one, or near."""
    ratios = []
    for seed in range(8):
        found = planner(10, seed)
        for refreshes in (3, 4, 5, 6):
            best = min(found.filled(plan).objective for plan in plans(10, refreshes, 1) if len(plan) == refreshes)
            ratios.append(found.plan(refreshes).objective / best)
    print(f"E over the least: median {np.median(ratios):.3f}, largest {max(ratios):.3f}")
    assert min(ratios) > 1 - 1e-9
    assert np.median(ratios) < 1.02
    assert max(ratios) < 2


def test_all_refreshes_are_exact() -> None:
    found = planner(30)
    assert found.plan(30).objective == found.plan(30).error == 0.0
    assert found.plan(30).rows == ((1.0,),) * 30


def test_no_weights_are_better() -> None:
    """E of the plan's own weights is the least: any others that add up to 1 have more."""
    steps, curve, g = 10, values(10), gains(10)
    found = Planner(differences(curve @ curve.T), g, history=2, ridge=1e-12)
    plan = found.filled((0, 1, 4, 8))
    assert objective(curve, g, plan, plan.rows) == pytest.approx((plan.error, plan.objective), rel=1e-6)
    source = np.random.default_rng(1)
    for _ in range(50):
        off = 0.01 * source.normal(size=steps)
        rows = [(row[0] + d, row[1] - d) if len(row) > 1 else row for row, d in zip(plan.rows, off, strict=True)]
        assert objective(curve, g, plan, rows)[1] > plan.objective
    assert len(plan.rows) == steps


def objective(curve: np.ndarray, g: np.ndarray, plan: Planned, rows: object) -> tuple[float, float]:
    """From the values themselves: the errors of runs as they add up, and E."""
    sums: dict[int, np.ndarray] = {}
    middles: dict[int, list[int]] = {}
    alone = 0.0
    for step, row in enumerate(rows):  # type: ignore[var-annotated, arg-type]
        if step in plan.refreshes:
            assert row == (1.0,)
            continue
        past = [known for known in reversed(plan.refreshes) if known < step][: len(row)]
        off = g[step] * (curve[step] - sum(w * curve[known] for w, known in zip(row, past, strict=True)))
        sums[past[0]] = sums.get(past[0], 0.0) + off
        middles.setdefault(past[0], []).append(step)
        alone += float(off @ off)
    error = 0.0
    for one, other in itertools.product(sums, sums):
        apart = abs(np.mean(middles[one]) - np.mean(middles[other]))
        error += float(np.exp(-apart / COHERENCE) * (sums[one] @ sums[other]))
    return error, error + 0.3 * alone


def test_a_straight_line_is_continued_without_error() -> None:
    start, slope = np.random.default_rng(0).normal(size=(2, 30))
    curve = start + np.arange(12.0)[:, None] * slope
    found = Planner(differences(curve @ curve.T), np.ones(12), history=2, ridge=1e-12)
    plan = found.filled((0, 1, 4))
    assert plan.objective < 1e-6 * float(np.trace(curve @ curve.T))
    assert plan.rows[7] == pytest.approx((2.0, -1.0), abs=1e-3)


@pytest.mark.parametrize("refreshes", [3, 4, 5, 9])
def test_refreshes_at_the_start_leave_enough_for_the_rest(refreshes: int) -> None:
    found = planner(30, longest=6)
    least = 1 + -(-(30 - 1 - 6) // 7)
    if refreshes < least:
        assert found.most_first(refreshes) == 1
        return
    first = found.most_first(refreshes)
    assert planner(30, longest=6, warm_up=first).plan(refreshes).refreshes[:first] == tuple(range(first))
    with pytest.raises(CalibrationError, match="runs of more than 6 reuses"):
        planner(30, longest=6, warm_up=first + 1).plan(refreshes)


def test_polynomials_have_their_share_of_the_weights() -> None:
    steps = (0, 2, 5)
    found = {share: planner(10, history=3).other(polynomial=share).filled(steps) for share in (0.0, 0.5, 1.0)}
    for step in (6, 8, 9):
        expected = [  # Lagrange's
            np.prod([(step - other) / (one - other) for other in steps if other != one]) for one in reversed(steps)
        ]
        assert found[1.0].rows[step] == pytest.approx(expected)
        halves = (np.array(found[0.0].rows[step]) + found[1.0].rows[step]) / 2
        assert found[0.5].rows[step] == pytest.approx(halves)
    assert found[0.0].objective <= found[0.5].objective


def test_runs_far_apart_add_up_less() -> None:
    """With a large coherence E is that of the sum of all errors."""
    g = gains(10)
    surely = planner(10).other(coherence=1e9)
    plan = surely.filled((0, 3, 6))
    total = np.zeros(surely.effects.shape[2])
    for step, row in enumerate(plan.rows):
        if step not in plan.refreshes:
            past = [known for known in reversed(plan.refreshes) if known < step][: len(row)]
            total += g[step] * (np.array(row) @ surely.effects[step, past])
    assert plan.error == pytest.approx(float(total @ total))
    assert planner(10).other(coherence=1e-9).filled((0, 3, 6)).error != pytest.approx(plan.error, rel=1e-3)


def test_long_runs_are_forbidden() -> None:
    found = planner(20, longest=3)
    steps = found.plan(6).refreshes
    assert max(later - before for before, later in itertools.pairwise([*steps, 20])) <= 4
    with pytest.raises(CalibrationError, match="runs of more than 3 reuses"):
        found.plan(4)


def test_bad_input() -> None:
    square = differences(np.eye(4))
    for options, words in (
        ({"history": 4}, "history must be 1, 2 or 3"),
        ({"warm_up": 0}, "warm_up must be from 1 to 4"),
        ({"warm_up": 5}, "warm_up must be from 1 to 4"),
        ({"steadiness": 0.0}, "steadiness must be above 0"),
    ):
        with pytest.raises(CalibrationError, match=words):
            Planner(square, np.ones(4), **options)  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match="not of one number of steps"):
        Planner(square, np.ones(3))
