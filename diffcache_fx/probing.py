"""How an error at one step reaches the final samples: generations that hold single values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .allotment import JointPlan
from .errors import CalibrationError
from .filling import Array, Planned

if TYPE_CHECKING:
    from .calibration import Calibration


def holding(held: set[int], steps: int, group: int = 0, groups: int = 1) -> JointPlan:
    """Compute everything but one selection at these steps, where its value before is held."""
    rows, every = ((1.0,),) * steps, tuple(range(steps))
    computed = tuple(step for step in every if step not in held)
    return JointPlan(tuple(Planned(computed if index == group else every, rows, 0.0, 0.0) for index in range(groups)))


def gains(measured: Calibration, grams: Sequence[Array], probes: int) -> tuple[Array, ...]:
    """Of each selection, [steps]: how far the final samples move when the value of the step before is held, over how
    far that is off. Measured at some steps; in between, by interpolation of logarithms."""
    steps, first = measured.steps, max(measured.warm_up, 1)
    if first >= steps:
        raise CalibrationError(f"a run of {steps} steps with {measured.warm_up} to warm up leaves none to reuse")
    places = np.unique(np.linspace(first, steps - 1, probes).round().astype(int)).tolist()
    found, told = [], 0
    for group, gram in enumerate(grams):
        own = []
        for step in places:
            measured.told("probe", told, len(grams) * len(places))
            told += 1
            samples = measured.tried(holding({step}, steps, group, len(grams)), measured.seed)
            moved = float((samples - measured.reference).norm())
            inner = gram[step, step] - 2 * gram[step, step - 1] + gram[step - 1, step - 1]
            own.append(max(moved, 1e-12) / math.sqrt(max(float(inner), 1e-24)))
        found.append(np.exp(np.interp(np.arange(steps), places, np.log(own))))
    measured.told("probe", told, told)
    return tuple(found)


__all__ = ["gains", "holding"]
