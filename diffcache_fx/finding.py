"""From what a calibration has measured to the schedule that meets a target."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .allotment import JointPlan
from .errors import CacheWarning, CalibrationError
from .filling import Array
from .measure import compiled_baseline
from .recording import Recording
from .schedule import CacheSchedule
from .targets import Latency, Psnr, RelativeL1, Speedup, Target, check_target

if TYPE_CHECKING:
    from .calibration import Calibration

# Share of samples whose error stays below the one asked for.
COVERED = 0.95
# So many refreshes below the fewest that do are tried: one sample that turns to something else fails a whole plan.
_MISSES = 2
# By how much a speed-up by FLOPs should be larger than the one that is asked for.
OVERHEAD = 1.08
_BELIEVED = 1.15  # a measured speed-up that is so much larger is one of the clock


@dataclass(frozen=True)
class Findings:
    """What a calibration measured, beside its schedule. gains: of each selection [steps], how far the final samples
    move for what holding its values does at a step. plan: the chosen one. predicted: mean square error of the final
    samples as planned for, measured: what it was. speedup: measured, None where it was not asked for."""

    schedule: CacheSchedule
    recording: Recording
    gains: tuple[Array, ...]
    plan: JointPlan
    predicted: float
    measured: float
    speedup: float | None


def find(measured: Calibration, target: Target) -> Findings:
    """The schedule of least error that meets a target. Raises CalibrationError where none does."""
    check_target(target)
    speed: float | None = None
    if isinstance(target, (Psnr, RelativeL1)):
        plan = _below(measured, target)
        moved = measured.moved(plan, measured.seed + 1)
    else:
        plan, speed = _faster(measured, target)
        moved = measured.moved(plan)
    predicted = plan.error / measured.reference.numel()
    return Findings(measured.schedule(plan), measured.recording, measured.gains, plan, predicted, moved, speed)


# --- errors ----------------------------------------------------------------------------------------------------------


def _below(measured: Calibration, target: Psnr | RelativeL1) -> JointPlan:
    """The plan with the fewest refreshes whose errors stay below the target, on noise that was not planned on, in the
    share of samples that is to be covered. Raises CalibrationError where there is none."""
    low, high = measured.least, measured.steps
    guess, recipes, found = _expected(measured, target, 1.0, low, high), measured.choice.recipes, None
    tried = 0
    while low < high:
        measured.told("try", tried, 0)
        tried += 1
        made = {recipe.make(guess): recipe for recipe in recipes}
        plan = min(made, key=lambda plan: _covering(measured, plan, target))
        error = _covering(measured, plan, target)
        recipes = (made[plan],)  # the one that did best at first is followed
        if error <= target.largest:
            high, found = guess, plan
        else:
            low = guess + 1
        if low < high:  # the error that was predicted, put right by what it was
            guess = _expected(measured, target, error / _predicted(measured.plan(guess), target), low, high)
    count = high if measured.refine else high - 1
    while count >= max(measured.least, high - _MISSES):  # others may do with fewer
        measured.told("try", tried, 0)
        tried += 1
        plans = [measured.best(count, measured.seed + 1), *(recipe.make(count) for recipe in measured.choice.recipes)]
        plan = min(plans, key=lambda plan: _covering(measured, plan, target))
        if _covering(measured, plan, target) <= target.largest:
            high, found = count, plan
        count -= 1
    measured.told("try", tried, tried)
    every = found or measured.plan(measured.steps)
    error = _covering(measured, every, target)
    if error <= target.largest:
        return every
    raise CalibrationError(
        f"{target} cannot be met: even with a refresh at every step rounding moves the samples by more, {error:.3g}: "
        "ask for less"
    )


def _predicted(plan: JointPlan, target: Psnr | RelativeL1) -> float:
    """A number that the error grows with: a mean square for PSNR, its root for relative L1."""
    error = max(plan.error, 1e-300)
    return error if isinstance(target, Psnr) else math.sqrt(error)


def _expected(measured: Calibration, target: Psnr | RelativeL1, ratio: float, low: int, high: int) -> int:
    """From low to high - 1, the fewest refreshes that should meet the target, given how large an error is over what is
    predicted."""
    first, last = low, high - 1
    while first < last:
        middle = (first + last) // 2
        if ratio * _predicted(measured.plan(middle), target) <= target.largest:
            last = middle
        else:
            first = middle + 1
    return first


def _covering(measured: Calibration, plan: JointPlan, target: Psnr | RelativeL1) -> float:
    """The error that the share of samples which is to be covered stays below."""
    errors = measured.errors(plan, target, measured.seed + 1).sort().values
    rank = min(math.ceil(COVERED * (len(errors) + 1)), len(errors))
    return float(errors[rank - 1])


# --- speed -----------------------------------------------------------------------------------------------------------


def _faster(measured: Calibration, target: Speedup | Latency) -> tuple[JointPlan, float]:
    """The plan with the most refreshes that is fast enough, as measured against the uncached model in turn."""
    uncached = compiled_baseline(measured.model, measured.backend, measured.backend_options)
    least, steps = measured.least, measured.steps
    count, bound, told = _guess(measured, target), steps, 0  # bound: the most that may still be fast enough
    reached: tuple[int, float] | None = None
    while True:
        measured.told("time", told, 0)
        told += 1
        clock = measured.timed(measured.plan(count), uncached)  # how fast it is does not depend on the weights
        wanted = target.seconds if isinstance(target, Latency) else clock.whole / target.times
        if clock.taken <= wanted:
            reached = count, clock.whole / clock.taken
        else:
            bound = count - 1
        if bound < least:
            raise CalibrationError(
                f"{target} cannot be met: with the fewest refreshes allowed ({least} of {steps}) a generation takes "
                f"{clock.expected(least / steps):.3g} s and the uncached one {clock.whole:.3g} s. Allow longer runs of "
                "reuses, or cache more of the model"
            )
        low = least if reached is None else reached[0]
        able = [n for n in range(low, bound + 1) if clock.expected(n / steps) <= wanted]
        count = max(able, default=low)
        if reached is not None and count == reached[0]:
            measured.told("time", told, told)
            _believe(reached[1], measured.ideal(count))
            return measured.best(count), reached[1]


def _guess(measured: Calibration, target: Speedup | Latency) -> int:
    """How many refreshes to time first: as many as should do by FLOPs."""
    if isinstance(target, Latency):
        return max(measured.least, measured.steps // 2)
    able = [n for n in range(measured.least, measured.steps + 1) if measured.ideal(n) >= OVERHEAD * target.times]
    return max(able, default=measured.least)


def _believe(speedup: float, ideal: float) -> None:
    if speedup > _BELIEVED * ideal:
        warnings.warn(
            f"a speed-up of {speedup:.2f} was measured where the work saved allows {ideal:.2f}: something else kept "
            "this machine busy; calibrate again when it is quiet",
            CacheWarning,
            stacklevel=2,
        )
