"""What published methods fit to a model: from a recorded run, against the plain model with hooks."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from bench import method_calibration
from diffcache_fx import Blocks, Sublayers, Trunk, compile_with_cache, schedules
from diffcache_fx.demo.demo import Demo
from diffcache_fx.demo.digits import load_digits
from diffcache_fx.errors import CalibrationError
from diffcache_fx.fitting import (
    block_plan,
    dynamic_plan,
    learned_rows,
    magnitude_ratios,
    minimax_plan,
    smooth_plans,
    tea_coefficients,
)
from diffcache_fx.forecasts import Taylor
from diffcache_fx.recording import Recording, RecordingDenoiser, RegionRecord
from diffcache_fx.selection import Selection

STEPS, IMAGES = 12, 2


@pytest.fixture(scope="module")
def demo() -> Demo:
    return load_digits()


@pytest.fixture(scope="module")
def expected(demo: Demo) -> method_calibration.Calibration:
    return method_calibration.calibrate(demo, STEPS, IMAGES)


def recorded(demo: Demo, *rules: tuple[Selection, str], steps: int = STEPS) -> Recording:
    recorder = RecordingDenoiser(demo.model, rules, backend="eager")
    seed = method_calibration.SEED
    demo.draw(recorder, range(IMAGES), num_steps=steps, seed=seed, batch_size=IMAGES)
    return recorder.recording()


@pytest.fixture(scope="module")
def trunk(demo: Demo) -> Recording:
    return recorded(demo, (Trunk(first=0), "residual"))


def test_magnitude_ratios(trunk: Recording, expected: method_calibration.Calibration) -> None:
    assert magnitude_ratios(trunk) == pytest.approx(expected.ratios, rel=1e-3)
    schedules.mag_cache(ratios=magnitude_ratios(trunk))


def test_the_polynomial_gives_the_same_changes(trunk: Recording, expected: method_calibration.Calibration) -> None:
    ours, theirs = tea_coefficients(trunk), expected.coefficients
    change, size = trunk.quantities["modulated_input"]
    for x in (change[1:] / size[:-1]).tolist():
        values = [sum(c * x ** (4 - i) for i, c in enumerate(fitted)) for fitted in (ours, theirs)]
        assert values[0] == pytest.approx(values[1], rel=0.05, abs=1e-3)
    schedules.tea_cache(coefficients=ours)


@pytest.mark.parametrize("alpha", [0.2, 0.5])
def test_smooth_plans(demo: Demo, expected: method_calibration.Calibration, alpha: float) -> None:
    found = smooth_plans(recorded(demo, (Sublayers(("attention",)), "value"), (Sublayers(("mlp",)), "value")), alpha)
    plans = expected.smooth_plan(alpha)
    assert [list(bits) for bits in found] == [plans["attention"], plans["mlp"]]
    assert 0 < sum(found[0]) < STEPS


@pytest.mark.parametrize("delta", [0.3, 0.8])
def test_block_plan(demo: Demo, expected: method_calibration.Calibration, delta: float) -> None:
    found = block_plan(recorded(demo, (Blocks(first=0, each=True), "residual")), delta)
    assert [list(row) for row in found] == expected.block_plan(delta)
    assert 0 < sum(map(sum, found)) < 12 * STEPS
    cached = compile_with_cache(
        demo.model, schedules.block_cache(found), backend="eager", num_steps=STEPS, max_programs=None
    )
    images = demo.draw(cached, range(IMAGES), num_steps=STEPS)
    assert torch.isfinite(images).all()
    assert cached.stats().reused > 0


def test_refusals(demo: Demo, trunk: Recording) -> None:
    few = recorded(demo, (Trunk(first=0), "residual"), steps=4)
    with pytest.raises(CalibrationError, match="degree 4 needs a run of 6 steps or more, not 4"):
        tea_coefficients(few)
    with pytest.raises(CalibrationError, match="recorded with 3 lags, and 4 are needed"):
        smooth_plans(trunk, 0.2, lookahead=4)
    with pytest.raises(CalibrationError, match="caches 1 region, and 12 were recorded"):
        magnitude_ratios(recorded(demo, (Blocks(first=0, each=True), "residual"), steps=4))


def of_curve(steps: int, seed: int = 0) -> tuple[np.ndarray, Recording]:
    """A smooth curve [steps, 40], and a recording of one region that went along it."""
    source = np.random.default_rng(seed)
    time = np.linspace(0.0, 1.0, steps)[:, None] ** 2
    curve = np.sin(time * source.uniform(1, 9, 40) + source.uniform(0, 6, 40)) * source.uniform(0.1, 2, 40)
    empty = torch.zeros(steps)
    region = RegionRecord("trunk", 0, 1.0, 1, empty, empty, empty, torch.from_numpy(curve @ curve.T))
    return curve, Recording(steps, 2.0, (region,), {}, 1, (None,) * steps)


def test_learned_rows_are_the_least_squares_of_each_step() -> None:
    curve, recording = of_curve(12)
    bits = (1, 1, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0)
    rows = learned_rows(recording, bits)
    assert [len(row) for row in rows] == [1, 1, 2, 2, 1, 3, 3, 3, 1, 3, 3, 3]
    for step in (5, 7, 11):
        past = [s for s in range(step) if bits[s]][-3:][::-1]
        expected, *_ = np.linalg.lstsq(curve[past].T, curve[step], rcond=None)
        off = [float(np.linalg.norm(curve[step] - w @ curve[past])) for w in (np.array(rows[step]), expected)]
        assert off[0] == pytest.approx(off[1], rel=1e-2)
        assert off[0] < np.linalg.norm(curve[step] - curve[past[0]])
    schedules.l2p(rows, interval=4)
    with pytest.raises(CalibrationError, match="one entry for each of the 12 recorded steps"):
        learned_rows(recording, bits[1:])


@pytest.mark.parametrize("order", [1, 2])
def test_the_dynamic_plan_is_the_best_of_all(order: int) -> None:
    steps, refreshes = 10, 5
    curve, recording = of_curve(steps, seed=order)

    def off(chosen: tuple[int, ...]) -> float:
        total = 0.0
        for step in set(range(steps)) - set(chosen):
            past = [s for s in chosen if s < step][-order - 1 :][::-1]
            weights = Taylor(order).weights([float(s) for s in past], float(step), {})
            total += float(np.linalg.norm(curve[step] - np.array(weights) @ curve[past]))
        return total

    plans = [(0, 1, 2, *rest) for count in range(3) for rest in itertools.combinations(range(3, steps), count)]
    bits = dynamic_plan(recording, refreshes, order=order)
    assert sum(bits) <= refreshes
    assert off(tuple(np.flatnonzero(bits))) == pytest.approx(min(map(off, plans)))
    schedules.mask(bits, forecast=Taylor(order))


def test_the_minimax_plan_is_the_best_of_all() -> None:
    steps, refreshes = 9, 4
    errors = np.full((steps, steps + 1), np.inf)
    for first in range(steps):
        for end in range(first + 1, min(first + 5, steps) + 1):
            errors[first, end] = 0.0 if end == first + 1 else np.random.default_rng(100 * first + end).uniform()

    def worst_first(chosen: tuple[int, ...]) -> list[float]:
        weights = [float(errors[a, b]) for a, b in itertools.pairwise((*chosen, steps))]
        return sorted(weights, reverse=True) + [0.0] * (refreshes - len(chosen))

    plans = [(0, *rest) for count in range(refreshes) for rest in itertools.combinations(range(1, steps), count)]
    bits = minimax_plan(errors, refreshes)
    assert worst_first(tuple(np.flatnonzero(bits))) == min(map(worst_first, plans))
    with pytest.raises(CalibrationError, match="1 refreshes do not span 9 steps"):
        minimax_plan(errors, 1)
