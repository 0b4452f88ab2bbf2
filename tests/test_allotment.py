"""Several selections in one plan: the knapsack against exhaustive search, budgets kept, targets met."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from diffcache_fx import Blocks, CacheSchedule, Trunk, compile_with_cache
from diffcache_fx.allotment import Allotment
from diffcache_fx.calibration import Calibration
from diffcache_fx.errors import CalibrationError
from diffcache_fx.filling import differences
from diffcache_fx.measure import executed_flops
from diffcache_fx.planning import Planner
from diffcache_fx.targets import Psnr, Speedup

from .toy import MODEL, STEPS, sampler

pytestmark = pytest.mark.usefixtures("one_thread")


def planner(seed: int, size: float = 1.0, longest: int = 12) -> Planner:
    source = np.random.default_rng(seed)
    time = np.linspace(0.0, 1.0, STEPS)[:, None]
    curve = size * np.sin(time * source.uniform(1, 9, 20) + source.uniform(0, 6, 20))
    return Planner(differences(curve @ curve.T), source.uniform(0.5, 2.0, STEPS), longest=longest)


@pytest.mark.parametrize("costs", [(1.0, 1.0), (3.0, 1.0), (2.0, 5.0, 1.0)])
def test_the_knapsack_is_exact(costs: tuple[float, ...]) -> None:
    made = Allotment([planner(seed, size=10.0**seed) for seed in range(len(costs))], costs)
    errors = [entry.least_errors for entry in made.planners]
    for budget in range(1, STEPS + 1):
        able = [
            counts
            for counts in itertools.product(range(1, STEPS + 1), repeat=len(costs))
            if np.dot(counts, costs) <= budget * sum(costs)
        ]
        sums = {counts: sum(float(own[n]) for own, n in zip(errors, counts, strict=True)) for counts in able}
        found = made.counts(budget)
        assert sums[found] == pytest.approx(min(sums.values()), abs=1e-9)
        assert [len(part.refreshes) for part in made.plan(budget).parts] <= list(found)
    assert made.counts(4)[-1] > made.counts(4)[0]  # whose errors are a hundred times as large


def test_one_group_is_its_planner() -> None:
    alone = planner(3)
    made = Allotment([alone], [7.0])
    for budget in (3, 5, 8):
        assert made.plan(budget).parts == (alone.plan(budget),)
        assert made.plan(budget).parts == (alone.plan(budget),)
        assert made.together(budget).refreshes == alone.plan(budget).refreshes


def test_groups_refreshed_together() -> None:
    made = Allotment([planner(0), planner(1)], [1.0, 1.0])
    plan = made.together(4)
    assert plan.parts[0].refreshes == plan.parts[1].refreshes == plan.refreshes
    assert sum(plan.bits) == 4
    assert plan.error == pytest.approx(sum(part.error for part in plan.parts))


def test_too_small_a_budget() -> None:
    made = Allotment([planner(0, longest=2), planner(1)], [1.0, 1.0])
    with pytest.raises(CalibrationError, match="2 refreshes in 12 steps need runs of more than 2 reuses"):
        made.counts(2)
    with pytest.raises(CalibrationError, match="1 groups of regions have 2 costs"):
        Allotment([planner(0)], [1.0, 2.0])


HALVES = (Blocks(first=0, last=3), Blocks(first=3))


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return Calibration(MODEL, sampler, regions=HALVES, backend="eager", probes=4)


def test_plans_of_halves(calibration: Calibration) -> None:
    """Each half has steps of its own; the plan costs what was asked, and what it says is what runs."""
    plan = calibration.plan(5)
    first, second = plan.parts
    assert first.refreshes != second.refreshes
    assert calibration.ideal(plan) >= calibration.ideal(5) * (1 - 1e-9)
    schedule = calibration.schedule(plan)
    cached = compile_with_cache(MODEL, CacheSchedule.from_dict(schedule.to_dict()), backend="eager", num_steps=STEPS)
    with torch.no_grad():
        samples, reference = sampler(cached, 0), sampler(MODEL, 0)
    spent = executed_flops(cached)
    assert spent.ideal_speedup == pytest.approx(calibration.ideal(plan), rel=1e-6)
    assert float((samples - reference).square().mean()) == pytest.approx(calibration.moved(plan), rel=1e-3)
    for part, name in zip(plan.parts, ("first", "second"), strict=True):
        refreshed = [bool(bit) for bit in part.bits]
        region = [region.name for region in calibration.recording.regions][name == "second"]
        assert [region in decision.refreshed for decision in cached.stats().decisions] == refreshed


def test_each_half_has_its_own_gains(calibration: Calibration) -> None:
    """Predicted and measured errors agree within a small factor."""
    assert len(calibration.gains) == 2
    for budget in (3, 5, 8):
        for plan in (calibration.plan(budget), calibration.allotment.together(budget)):
            predicted, measured = plan.error / calibration.reference.numel(), calibration.moved(plan)
            assert predicted / 8 < measured < predicted * 8


def test_targets_are_met(calibration: Calibration) -> None:
    found = calibration.find(Psnr(50.0))
    kept = []
    for seed in range(100, 110):
        cached = compile_with_cache(MODEL, found.schedule, backend="eager")
        with torch.no_grad():
            kept += (Psnr(50.0).error(sampler(cached, seed), sampler(MODEL, seed)) <= Psnr(50.0).largest).tolist()
    assert sum(kept) >= 0.95 * len(kept)
    assert found.speedup is None
    assert calibration.ideal(found.plan) > 1.0
    fast = calibration.find(Speedup(1.01))
    assert fast.speedup is not None
    assert fast.speedup >= 1.01


def test_bad_selections() -> None:
    with pytest.raises(CalibrationError, match="regions must be from 1 to 4 selections, not 0"):
        Calibration(MODEL, sampler, regions=(), backend="eager")
    with pytest.raises(CalibrationError, match="regions must be from 1 to 4 selections, not 5"):
        Calibration(MODEL, sampler, regions=(Trunk(),) * 5, backend="eager")
