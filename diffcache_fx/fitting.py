"""What published methods fit to a model, from a recorded run: ratios, polynomials, plans.

Each takes a `Recording` of the regions that the method caches (`RecordingDenoiser`), and returns what the method's
factory in `schedules` is given.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .errors import CalibrationError
from .recording import Recording, RegionRecord

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


def _regions(recording: Recording, count: int) -> tuple[RegionRecord, ...]:
    if len(recording.regions) != count:
        raise CalibrationError(f"this method caches {count} region, and {len(recording.regions)} were recorded")
    return recording.regions


__all__ = ["block_plan", "magnitude_ratios", "smooth_plans", "tea_coefficients"]
