"""calibrate: targets met, errors of one sentence, and what a calibrated schedule may be used for."""

from __future__ import annotations

import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from diffcache_fx import CacheSchedule, Trunk, compile_with_cache, export, schedules
from diffcache_fx.allotment import JointPlan
from diffcache_fx.calibration import Calibration, calibrate
from diffcache_fx.clock import Clock
from diffcache_fx.errors import CacheError, CacheWarning, CalibrationError
from diffcache_fx.fitting import minimax_plan, segment_errors
from diffcache_fx.forecasts import Linear
from diffcache_fx.measure import relative_error
from diffcache_fx.probing import holding
from diffcache_fx.provenance import hash_of_weights
from diffcache_fx.targets import Latency, Psnr, RelativeL1, Speedup
from diffcache_fx.trial import first_used

from .tiny_pipelines import CASES
from .toy import MODEL, SAMPLES, STEPS, Denoiser, sampler

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return Calibration(MODEL, sampler, backend="eager", describe="Euler")


def drawn(schedule: CacheSchedule, seed: int) -> torch.Tensor:
    with torch.no_grad():
        return sampler(compile_with_cache(MODEL, schedule, backend="eager"), seed)


def mse(schedule: CacheSchedule, seed: int) -> float:
    with torch.no_grad():
        return float((drawn(schedule, seed) - sampler(MODEL, seed)).square().mean())


@pytest.mark.parametrize("target", [Psnr(45.0), Psnr(60.0), RelativeL1(0.003)])
def test_errors_stay_below_the_one_asked_for(calibration: Calibration, target: Any) -> None:
    schedule = calibration.find(target).schedule
    kept = []
    for seed in range(100, 110):  # noise it was not calibrated on
        with torch.no_grad():
            kept += (target.error(drawn(schedule, seed), sampler(MODEL, seed)) <= target.largest).tolist()
    assert sum(kept) >= 0.95 * len(kept)
    bits = schedule.rules[0].guard.bits  # type: ignore[union-attr]
    assert sum(row[0] for row in bits) < STEPS  # and something is reused


def test_stricter_targets_refresh_more(calibration: Calibration) -> None:
    counts = [len(calibration.find(Psnr(db)).plan.refreshes) for db in (35.0, 50.0, 65.0)]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]


def test_a_plan_beats_even_intervals_at_equal_cost(calibration: Calibration) -> None:
    for every in (2, 3):
        even = schedules.interval(every, forecast=Linear(), regions=Trunk())
        plan = calibration.best(-(-STEPS // every))
        ours = calibration.schedule(plan)
        errors = [sum(mse(schedule, seed) for seed in range(50, 54)) for schedule in (ours, even)]
        assert errors[0] < errors[1]


def test_a_plan_is_refined_by_trying(calibration: Calibration, monkeypatch: pytest.MonkeyPatch) -> None:
    """Towards what does best as tried, with no more trials than were granted, at the same cost."""
    tried: set[JointPlan] = set()

    def level(plan: JointPlan, seed: int | None = None) -> float:
        tried.add(plan)
        return float(np.abs(np.array(plan.refreshes) - [0, 6, 8, 10]).sum())

    plain = calibration.plan(4)
    monkeypatch.setattr(calibration, "level", level)
    found = {}
    for trials in (0, 10, 1000):
        monkeypatch.setattr(calibration, "refine", trials)
        tried.clear()
        found[trials] = calibration.choice.refined(plain, calibration.allotment, [1])
        assert len(tried) <= trials + 1
        assert calibration.ideal(found[trials]) == calibration.ideal(plain)
    assert found[0] == plain
    assert level(found[10]) < level(plain)
    assert found[1000].refreshes == (0, 6, 8, 10)


def test_what_is_moved_does_better_on_each_noise(calibration: Calibration, monkeypatch: pytest.MonkeyPatch) -> None:
    """What does better on one noise alone is not taken."""

    def level(plan: JointPlan, seed: int | None = None) -> float:
        return float(np.abs(np.array(plan.refreshes) - [0, 6, 8, 10]).sum()) * (1 if seed == 1 else -1)

    plain = calibration.plan(4)
    monkeypatch.setattr(calibration, "level", level)
    monkeypatch.setattr(calibration, "refine", 50)
    assert calibration.choice.refined(plain, calibration.allotment, [1]) != plain
    assert calibration.choice.refined(plain, calibration.allotment, [1, 2]) == plain


def test_an_error_is_met_with_the_fewest_refreshes_that_any_plan_tried_needs(
    calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = {0: 9, 1: 7, 2: 8, 3: 10}  # by recipe, in their order

    def covering(_: Calibration, plan: JointPlan, target: Psnr) -> float:
        ways = [index for index in needed for n in (len(plan.refreshes),) if recipes[index].make(n) == plan]
        return target.largest * min(needed[way] / len(plan.refreshes) for way in ways)

    recipes = calibration.choice.recipes
    assert len(recipes) == len(needed)
    monkeypatch.setattr("diffcache_fx.finding._covering", covering)
    monkeypatch.setattr(calibration, "best", lambda count, seed: recipes[1].make(count))
    assert len(calibration.find(Psnr(40.0)).plan.refreshes) == 7


def test_gains_tell_how_errors_reach_the_end(calibration: Calibration) -> None:
    """Predicted and measured errors agree within a small factor, over two orders of magnitude."""
    for count in (3, 5, 8):
        plan = calibration.plan(count)
        predicted, measured = plan.error / calibration.reference.numel(), mse(calibration.schedule(plan), 0)
        assert predicted / 5 < measured < predicted * 5


def test_a_latency_is_met_or_refused() -> None:
    calibration = Calibration(MODEL, sampler, backend="eager", probes=2)
    found = calibration.find(Latency(10.0))
    assert len(found.plan.refreshes) == STEPS
    with pytest.raises(CalibrationError, match="1e-09 s a generation cannot be met"):
        calibration.find(Latency(1e-9))


def test_a_speedup_is_found_from_the_time_of_each_call(
    calibration: Calibration, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often the first guess is wrong: the plan with the most refreshes that is fast enough."""
    seconds = {"uncached": 1.0, "refresh": 1.1, "reuse": 0.1}
    timed: list[int] = []

    def timing(plan: JointPlan, uncached: Any) -> Clock:
        timed.append(sum(plan.bits))
        kinds = {0: [seconds["refresh"]] * sum(plan.bits), 1: [seconds["reuse"]] * (STEPS - sum(plan.bits))}
        return Clock(
            uncached, [seconds["uncached"]] * STEPS, {kind: taken for kind, taken in kinds.items() if taken}, 0.5
        )

    monkeypatch.setattr(calibration, "timed", timing)
    for times in (1.2, 2.0, 3.0):
        timed.clear()
        found = calibration.find(Speedup(times))
        count = len(found.plan.refreshes)
        assert found.speedup is not None
        taken = [12.5 / (0.5 + 1.1 * n + 0.1 * (STEPS - n)) for n in (count, count + 1)]
        assert taken[0] >= times > taken[1]
        assert found.speedup == pytest.approx(taken[0])
        assert len(timed) <= 3


def test_most_calls_are_timed_as_they_run() -> None:
    """One after the other; the uncached model beside the first ones and every third one after them."""
    order: list[str] = []
    clock = Clock(lambda: order.append("uncached"))

    def cached() -> None:
        order.append("cached")
        time.sleep(0.02 if order.count("cached") % 2 else 0.001)

    clock.generation(lambda: [clock.call(cached, lambda: 1 - order.count("cached") % 2) for _ in range(12)])
    assert clock.calls == 12
    assert "".join(kind[0] for kind in order) == "ucucucuc" + "ccuc" + "ccuc" + "cc"
    assert {kind: len(found) for kind, found in clock.cached.items()} == {0: 6, 1: 6}
    assert clock.taken == pytest.approx(6 * 0.021, rel=0.3)
    assert clock.expected(1.0) == pytest.approx(12 * 0.02, rel=0.3)
    assert clock.whole < clock.taken


def test_a_pipeline_is_calibrated_and_left_as_it_was() -> None:
    case = next(case for case in CASES if case.name == "DiTPipeline")
    pipe = case.build()
    before = pipe.transformer

    def sample(pipe: Any, seed: int) -> torch.Tensor:
        made = pipe(
            class_labels=[1, 2], num_inference_steps=6, generator=torch.Generator().manual_seed(seed), output_type="np"
        )
        return torch.from_numpy(made.images)

    schedule = calibrate(pipe, sample, Psnr(30.0, data_range=1.0), backend="eager", probes=2)
    assert pipe.transformer is before
    assert schedule.made_for is not None
    assert (schedule.made_for.model, schedule.made_for.steps) == ("DiTTransformer2DModel", 6)
    pipe.transformer = compile_with_cache(before, schedule, backend="eager", num_steps=6)
    assert sample(pipe, 3).shape[0] == 2


def test_without_a_history_values_are_held() -> None:
    """What is planned is what runs: one slot holds its value as it is."""
    calibration = Calibration(MODEL, sampler, backend="eager", history=1)
    plan = calibration.plan(5)
    assert set(plan.parts[0].rows) == {(1.0,)}
    predicted, measured = plan.error / calibration.reference.numel(), mse(calibration.schedule(plan), 0)
    assert predicted / 5 < measured < predicted * 5


def test_an_error_below_rounding_is_refused(calibration: Calibration, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffcache_fx.finding._covering", lambda *_: 1.0)
    with pytest.raises(CalibrationError, match="200 dB to the uncached samples cannot be met"):
        calibration.find(Psnr(200))


def test_the_cap_on_memory_shortens_the_history() -> None:
    one = sum(region.nbytes for region in Calibration(MODEL, sampler, backend="eager", probes=2).recording.regions)
    found = Calibration(MODEL, sampler, backend="eager", probes=2, memory_cap=one)
    assert found.history == 1
    with pytest.raises(CalibrationError, match="memory_cap is"):
        Calibration(MODEL, sampler, backend="eager", probes=2, memory_cap=one - 1)


# --- what a calibrated schedule may be used for ---


@pytest.fixture(scope="module")
def schedule(calibration: Calibration) -> CacheSchedule:
    return calibration.find(Psnr(45.0)).schedule


def test_it_is_a_file_like_any_other(schedule: CacheSchedule, tmp_path: Path) -> None:
    schedule.save_pretrained(tmp_path)
    again = CacheSchedule.from_pretrained(tmp_path)
    assert again == schedule
    assert torch.equal(drawn(again, 1), drawn(schedule, 1))


def test_it_leaves_python_like_any_other(schedule: CacheSchedule, tmp_path: Path) -> None:
    call = ((torch.zeros(SAMPLES, 16), torch.tensor(1000.0)), {})
    cached = compile_with_cache(MODEL, schedule, backend="eager", example_inputs=call)
    loaded = export.load_bundle(export.to_onnx(cached, tmp_path / "bundle"))
    with torch.no_grad():
        assert relative_error(sampler(loaded, 4), sampler(cached, 4)) < 1e-4
    assert loaded.stats().reused == cached.stats().reused > 0


def test_other_weights_are_refused_in_any_precision_they_are_the_same(schedule: CacheSchedule) -> None:
    call = ((torch.zeros(SAMPLES, 16), torch.tensor(1.0)), {})
    other = Denoiser().eval()
    with torch.no_grad():
        other.blocks[0].inner[0].weight.mul_(2)  # type: ignore[union-attr, operator]
    for model, words in (
        (other, "other weights"),
        (Denoiser(8).eval(), "other weights"),
        (nn.Linear(3, 3), "is a Linear"),
    ):
        with pytest.raises(CalibrationError, match=words):
            compile_with_cache(model, schedule, backend="eager", example_inputs=call)
    assert schedule.made_for is not None
    schedule.made_for.check_model(Denoiser().to(torch.bfloat16))


def test_other_steps_shapes_and_samplers_are_refused(schedule: CacheSchedule) -> None:
    with pytest.raises(CalibrationError, match="calibrated for 12 steps and this run has 20"):
        compile_with_cache(
            MODEL, schedule, backend="eager", num_steps=20, example_inputs=((torch.zeros(2, 16), torch.tensor(1.0)), {})
        )
    cached = compile_with_cache(MODEL, schedule, backend="eager")
    with (
        torch.no_grad(),
        pytest.raises(CalibrationError, match=r"calibrated for Euler whose timestep at step 0 is 1000"),
    ):
        sampler(cached, 0, start=900.0)
    with pytest.raises(CalibrationError, match=r"shape \[24, 16\] and this call has \[3, 2, 16\]"):
        compile_with_cache(
            MODEL, schedule, backend="eager", example_inputs=((torch.zeros(3, 2, 16), torch.tensor(1.0)), {})
        )
    with torch.no_grad():
        assert torch.isfinite(sampler(compile_with_cache(MODEL, schedule, backend="eager"), 5)).all()


def test_bad_input() -> None:
    def other(denoiser: Any, seed: int) -> Any:
        sampler(denoiser, seed)
        return [1.0]

    def broken(denoiser: Any, seed: int) -> torch.Tensor:
        return sampler(denoiser, seed) * torch.inf

    for make, words in (
        (lambda: calibrate("model", sampler, Psnr(30.0)), "an nn.Module"),
        (lambda: calibrate(MODEL, other, Psnr(30.0), backend="eager"), "must return the final samples"),
        (lambda: calibrate(MODEL, broken, Psnr(30.0), backend="eager"), "not finite"),
        (lambda: calibrate(MODEL, lambda d, s: torch.zeros(2, 2), Psnr(30.0), backend="eager"), "nothing was recorded"),
        (
            lambda: calibrate(MODEL, lambda d, s: sampler(d, 0), Psnr(30.0), backend="eager"),
            "same samples for seed 1",
        ),
        (lambda: calibrate(MODEL, sampler, Psnr(30.0), history=4), "history must be a whole number from 1 to 3, not 4"),
        (lambda: calibrate(MODEL, sampler, Psnr(30.0), longest=0), "longest must be a whole number from 1, not 0"),
        (lambda: calibrate(MODEL, sampler, Psnr(30.0), probes=1), "probes must be a whole number from 2, not 1"),
        (lambda: Speedup(0.5), "1 or more"),
        (lambda: Psnr(float("nan")), "positive number"),
        (lambda: RelativeL1("a"), "positive number"),  # type: ignore[arg-type]
        (lambda: Latency(-1), "positive number"),
    ):
        with pytest.raises(CalibrationError, match=words):
            make()


def test_a_target_is_one_of_four(calibration: Calibration) -> None:
    with pytest.raises(CalibrationError, match="a target is one of Speedup, Latency, Psnr, RelativeL1, not 2"):
        calibration.find(2)  # type: ignore[arg-type]


def test_what_cannot_be_is_told_before_anything_runs() -> None:
    def never(denoiser: Any, seed: int) -> torch.Tensor:
        pytest.fail("it was run")

    for make, words in (
        (lambda: calibrate(MODEL, never, 25.0), r"not 25.0: write Psnr\(40.0\)"),  # type: ignore[arg-type]
        (lambda: calibrate(MODEL, lambda denoiser: None, Psnr(30.0)), "called as sampler"),  # type: ignore[arg-type]
        (lambda: calibrate(MODEL, never, Psnr(30.0), backnd="eager"), "no option 'backnd'; did you mean 'backend'"),
    ):
        with pytest.raises(CacheError, match=words):
            make()


def test_a_speedup_that_cannot_be_is_doubted(calibration: Calibration, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan that saves a little is measured as if it saved all."""
    fast = Clock(None, [1.0] * STEPS, {0: [0.01] * STEPS}, 0.0)  # type: ignore[arg-type]
    monkeypatch.setattr(calibration, "timed", lambda *_: fast)
    with pytest.warns(CacheWarning, match="was measured where the work saved allows"):
        calibration.find(Speedup(1.5))


def test_what_is_known_of_the_uncached_run_is_not_computed_again(calibration: Calibration) -> None:
    """Up to the first value that is reused, and with the same samples."""
    plan = holding({7}, STEPS)
    replayed = calibration.tried(plan, 0)
    assert [decision.reason for decision in calibration.trial.stats().decisions][:6] == ["replayed"] * 6
    calibration.trial.follow(plan)
    assert relative_error(replayed, sampler(calibration.trial, 0)) < 1e-6
    (part,) = plan.parts
    assert first_used(part.bits, part.rows) == 6
    assert first_used(part.bits, [(0.5, 0.5)] * STEPS) == 5
    assert first_used((True,) * STEPS, part.rows) == STEPS


def test_a_sampler_of_several_generations_replays_none() -> None:
    """Which of them a call belongs to is not known."""

    def twice(denoiser: Any, seed: int) -> torch.Tensor:
        return torch.cat((sampler(denoiser, seed), sampler(denoiser, seed + 1000)))

    found = Calibration(MODEL, twice, backend="eager", probes=2).find(Psnr(45.0))
    assert sum(found.plan.bits) < STEPS
    assert found.recording.runs == 2
    errors = (twice(compile_with_cache(MODEL, found.schedule, backend="eager"), 7) - twice(MODEL, 7)).square()
    assert float(errors.detach().mean()) < Psnr(42.0).largest


def test_segments_are_measured_one_by_one(calibration: Calibration) -> None:
    """As LeMiCa's graph wants them."""
    errors = segment_errors(calibration, longest=2)
    finite = [(first, end) for first in range(STEPS) for end in range(first + 1, min(first + 3, STEPS) + 1)]
    assert sorted(map(tuple, np.argwhere(np.isfinite(errors)).tolist())) == finite
    bits = [step not in (5, 6) for step in range(STEPS)]
    held = schedules.mask(bits, regions=Trunk(first=0))
    with torch.no_grad():
        moved = (drawn(held, 0) - sampler(MODEL, 0)).abs().mean()
    assert errors[4, 7] == pytest.approx(float(moved), rel=1e-3)
    plan = minimax_plan(errors, 6)
    assert sum(plan) == 6
    assert mse(schedules.mask(plan, regions=Trunk(first=0)), 5) < mse(
        schedules.mask([1] * 6 + [0] * 6, regions=Trunk(first=0)), 5
    )


def test_progress_is_told() -> None:
    told: list[tuple[str, int, int]] = []
    calibrate(MODEL, sampler, Psnr(40.0), backend="eager", probes=3, progress=lambda *stage: told.append(stage))
    assert [stage for stage, _ in itertools.groupby(name for name, _, _ in told)] == ["record", "probe", "try"]


def test_large_weights_are_hashed_within_their_bounds() -> None:
    """Places in a tensor of more elements than float32 counts."""
    model = nn.Linear(3072, 12288, bias=False)
    assert len(hash_of_weights(model)) == 64
