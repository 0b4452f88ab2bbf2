"""What published methods fit to a model, from a recorded run: ratios, polynomials, rows, plans.

Each takes a `Recording` of the regions that the method caches (`RecordingDenoiser`), and returns what the method's
factory in `schedules` is given.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import CalibrationError
from .filling import RIDGE
from .forecasts import Taylor
from .planning import LONGEST, Array, Planner
from .probing import holding
from .recording import Recording, RegionRecord

if TYPE_CHECKING:
    from .calibration import Calibration

TEA_DEGREE = 4
LOOKAHEAD = 3
DELTA = 0.5


def magnitude_ratios(recording: Recording) -> tuple[float, ...]:
    """MagCache (Ma et al., 2025): by step, the mean ratio of the residual's magnitude to that of the step before; 1 at
    the first. For `schedules.mag_cache(ratios=)`; record `(Trunk(first=0), "residual")`."""
    (region,) = _regions(recording, 1)
    return tuple(float(ratio) for ratio in region.growth)


def tea_coefficients(recording: Recording, degree: int = TEA_DEGREE) -> tuple[float, ...]:
    """TeaCache (Liu et al., CVPR 2025): the polynomial, highest power first, from the relative change of the first
    block's modulated input to that of the output, fitted over the steps. For `schedules.tea_cache(coefficients=)`.
    Raises CalibrationError for a model without such an input, or a run of too few steps."""
    if "modulated_input" not in recording.quantities:
        raise CalibrationError(
            "this model's first block has no input that the timestep modulates, so TeaCache's polynomial cannot be "
            "fitted: take first_block_cache, or a calibrated plan"
        )
    if recording.steps < degree + 2:
        raise CalibrationError(
            f"a polynomial of degree {degree} needs a run of {degree + 2} steps or more, not {recording.steps}"
        )
    x, y = (_changes(recording, name) for name in ("modulated_input", "output"))
    return tuple(float(c) for c in np.polyfit(x, y, degree))


def _changes(recording: Recording, name: str) -> np.ndarray[Any, Any]:
    """Of a quantity, from each step to the next, over its size at the first of the two."""
    change, size = recording.quantities[name]
    return (change[1:] / size[:-1]).numpy()


def smooth_plans(recording: Recording, alpha: float, lookahead: int = LOOKAHEAD) -> tuple[tuple[int, ...], ...]:
    """SmoothCache (Liu et al., 2024): one plan for each recorded rule, a bit per step, 1 to compute. From each computed
    step on, as many reuses (`lookahead` at most) as keep the layers' mean relative change at `alpha` or less. For
    `schedules.smooth_cache`; record `(Sublayers(("attention",)), "value")` and so on, a rule for each type."""
    plans = []
    for rule in sorted({region.rule for region in recording.regions}):
        own = [region for region in recording.regions if region.rule == rule]
        if lookahead > own[0].change.shape[1]:
            raise CalibrationError(
                f"the run was recorded with {own[0].change.shape[1]} lags, and {lookahead} are needed"
            )
        changes = np.mean([(region.change / region.size[:, None]).numpy() for region in own], axis=0)
        bits, step = [0] * recording.steps, 0
        while step < recording.steps:
            bits[step] = 1
            reuses = [
                ahead
                for ahead in range(1, lookahead + 1)
                if step + ahead < recording.steps and changes[step + ahead, ahead - 1] <= alpha
            ]
            step += max(reuses, default=0) + 1
        plans.append(tuple(bits))
    return tuple(plans)


def block_plan(recording: Recording, delta: float = DELTA) -> tuple[tuple[int, ...], ...]:
    """Block Caching (Wimbauer et al., CVPR 2024, eq. 7): bits[step][block], 1 to compute; a block is held for as long
    as its relative L1 changes since it was computed add up to `delta` at the most. For `schedules.block_cache`; record
    `(Blocks(first=0, each=True), "residual")`."""
    changes = np.stack([region.relative().numpy() for region in recording.regions], axis=1)
    bits, total = [], np.zeros(changes.shape[1])
    for step in range(recording.steps):
        total = total + changes[step]
        computed = total > delta
        total[computed] = 0.0
        bits.append(tuple(int(bit) for bit in computed))
    return tuple(bits)


def learned_rows(recording: Recording, bits: Sequence[int], history: int = 3) -> tuple[tuple[float, ...], ...]:
    """L2P (Shen et al., CVPR 2026, arXiv 2604.26365): for each step that `bits` does not compute, the weights of the
    last refreshed values (newest first) that come nearest to what it computes. There the weights of all earlier steps
    are learned by gradient descent from hold; the squares are the same, and solved here. For `schedules.l2p`."""
    (region,) = _regions(recording, 1)
    if len(bits) != recording.steps or not bits[0]:
        raise CalibrationError(
            f"bits must have one entry for each of the {recording.steps} recorded steps, and compute the first"
        )
    gram = region.gram.numpy()
    rows: list[tuple[float, ...]] = []
    past: list[int] = []
    for step, computed in enumerate(bits):
        if computed:
            past = [step, *past][:history]
        alone = computed or len(past) == 1
        rows.append((1.0,) if alone else tuple(float(weight) for weight in _nearest(gram, past, step)))
    return tuple(rows)


def _nearest(gram: Array, past: Sequence[int], step: int) -> Array:
    """The weights of past values that come nearest to a step's, found as changes of holding the newest one."""
    basis = np.eye(len(past))
    basis[1:, 0] = -1.0
    inner = basis @ gram[np.ix_(past, past)] @ basis.T
    target = basis @ (gram[past, step] - gram[past, past[0]])
    scale = np.diag(inner).clip(min=np.finfo(np.float64).tiny)
    found: Array = np.eye(len(past))[0] + np.linalg.solve(inner + RIDGE * np.diag(scale), target) @ basis
    return found


def dynamic_plan(
    recording: Recording, refreshes: int, *, order: int = 2, warm_up: int = 3, longest: int = LONGEST
) -> tuple[int, ...]:
    """DPCache (arXiv 2602.22654): a bit for each step, 1 to compute, `refreshes` at the most, that minimise what
    Taylor's forecast of this order (1 or 2) is off by, summed over the steps; the first `warm_up` compute. By dynamic
    programming over the refreshes that a forecast sees, where theirs follows the best path to the last of them; in L2
    norms, which a recording keeps, where theirs are L1. For `schedules.mask(bits=, forecast=Taylor(order))`."""
    (region,) = _regions(recording, 1)
    planner = _TaylorPlanner(region.gram.numpy(), order, longest, warm_up)
    chosen = planner.selected(refreshes)
    return tuple(int(step in chosen) for step in range(recording.steps))


class _TaylorPlanner(Planner):
    """Fills steps by Taylor's forecast, and adds up what each is off by."""

    def __init__(self, gram: Array, order: int, longest: int, warm_up: int) -> None:
        super().__init__(
            np.zeros((*gram.shape, 1)), np.ones(len(gram)), history=order + 1, longest=longest, warm_up=warm_up
        )
        self.gram = gram
        self._forecast = Taylor(order)

    def _prepare(self, pasts: Iterable[tuple[int, ...]]) -> None:
        for past in pasts:
            if past in self._runs:
                continue
            errors = [0.0]
            for step in range(past[0] + 1, min(past[0] + self.longest, self.steps - 1) + 1):
                off = np.zeros(self.steps)
                off[step] = 1.0
                off[list(past)] -= np.array(self._forecast.weights([float(p) for p in past], float(step), {}))
                errors.append(math.sqrt(max(float(off @ self.gram @ off), 0.0)))
            self._runs[past] = np.cumsum(errors)


def minimax_plan(errors: Array, refreshes: int) -> tuple[int, ...]:
    """LeMiCa (Gao et al., 2025, arXiv 2511.00090): a bit for each step, 1 to compute: the path of at most so many
    refreshes whose worst run of reuses is least, then its second worst, and so on. errors: of `segment_errors`, [steps,
    steps + 1]. For `schedules.mask(bits=)`."""
    steps = len(errors)
    best: dict[int, tuple[tuple[float, ...], tuple[int, ...]]] = {0: ((), (0,))}
    found: list[tuple[tuple[float, ...], tuple[int, ...]]] = []
    for _ in range(min(refreshes, steps)):
        reached: dict[int, tuple[tuple[float, ...], tuple[int, ...]]] = {}
        for last, (worst, path) in best.items():
            for following in range(last + 1, steps + 1):
                if not np.isfinite(errors[last, following]):
                    continue
                weights = tuple(sorted((*worst, float(errors[last, following])), reverse=True))
                if following == steps:
                    found.append((weights, path))
                elif following not in reached or weights < reached[following][0]:
                    reached[following] = weights, (*path, following)
        best = reached
    if not found:
        raise CalibrationError(f"{refreshes} refreshes do not span {steps} steps with the runs that were measured")
    width = max(len(weights) for weights, _ in found)
    _, path = min(found, key=lambda entry: (*entry[0], *[0.0] * (width - len(entry[0]))))
    return tuple(int(step in path) for step in range(steps))


def segment_errors(calibration: Calibration, longest: int = LONGEST) -> Array:
    """What LeMiCa weighs its graph with: [steps, steps + 1], the mean absolute change of the final samples when the
    value computed at step i is held up to step j, and all other steps compute; 0 for j = i + 1, infinite where the run
    is longer than `longest`. Each is the rest of a generation."""
    steps = calibration.steps
    if len(calibration.groups) > 1:
        raise CalibrationError("segments are measured of one selection, and this calibration has several")
    errors = np.full((steps, steps + 1), np.inf)
    for first in range(steps):
        errors[first, first + 1] = 0.0
        for end in range(first + 2, min(first + longest + 1, steps) + 1):
            calibration.told("segments", first, steps)
            held = set(range(first + 1, end))
            samples = calibration.tried(holding(held, steps), calibration.seed)
            errors[first, end] = float((samples - calibration.reference).abs().mean())
    calibration.told("segments", steps, steps)
    return errors


def _regions(recording: Recording, count: int) -> tuple[RegionRecord, ...]:
    if len(recording.regions) != count:
        raise CalibrationError(f"this method caches {count} region, and {len(recording.regions)} were recorded")
    return recording.regions


__all__ = [
    "block_plan",
    "dynamic_plan",
    "learned_rows",
    "magnitude_ratios",
    "minimax_plan",
    "segment_errors",
    "smooth_plans",
    "tea_coefficients",
]
