"""How an error at one step reaches the final samples: generations that hold single values."""

from __future__ import annotations

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


def gains(measured: Calibration, effects: Sequence[Array], probes: int) -> tuple[Array, ...]:
    """Of each selection, [steps]: how far the final samples move when the value of the step before is held, over how
    far its effect on that step reaches. Measured at some steps, more of them early, where it changes most, and at the
    last, where samplers stride otherwise; in between, by interpolation of logarithms."""
    steps, first = measured.steps, max(measured.warm_up, 1)
    if first >= steps:
        raise CalibrationError(f"a run of {steps} steps with {measured.warm_up} to warm up leaves none to reuse")
    spread = np.linspace(0.0, 1.0, probes - 1) ** 1.5 * max(steps - 2 - first, 0)
    places = np.unique([*(first + spread.round().astype(int)), steps - 1]).tolist()
    found, told = [], 0
    for group, table in enumerate(effects):
        own = []
        for step in places:
            measured.told("probe", told, len(effects) * len(places))
            told += 1
            samples = measured.tried(holding({step}, steps, group, len(effects)), measured.seed)
            moved = float((samples - measured.reference).norm())
            own.append(max(moved, 1e-12) / max(float(np.linalg.norm(table[step, step - 1])), 1e-12))
        found.append(np.exp(np.interp(np.arange(steps), places, np.log(own))))
    measured.told("probe", told, told)
    return tuple(found)


__all__ = ["gains", "holding"]
