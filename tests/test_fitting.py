"""What published methods fit to a model: from a recorded run, against the plain model with hooks."""

from __future__ import annotations

import pytest
import torch

from bench import method_calibration
from diffcache_fx import Blocks, Sublayers, Trunk, compile_with_cache, schedules
from diffcache_fx.demo.demo import Demo
from diffcache_fx.demo.digits import load_digits
from diffcache_fx.errors import CalibrationError
from diffcache_fx.fitting import block_plan, magnitude_ratios, smooth_plans, tea_coefficients
from diffcache_fx.recording import Recording, RecordingDenoiser
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
