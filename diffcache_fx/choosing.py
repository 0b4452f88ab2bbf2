"""Which of the plans of one cost to take: those that trust the linear picture more or less are tried."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from .allotment import Allotment, JointPlan

if TYPE_CHECKING:
    from .calibration import Calibration

# Powers of the gains, refreshes at the start and whether they are moved, of further plans that are tried.
DAMPED = ((0.5, 1, True), (0.5, 1, False), (0.0, 3, True))


class Choice:
    """Among the plans of a calibration, as they do in generations."""

    def __init__(self, measured: Calibration) -> None:
        self._measured = measured

    def best(self, refreshes: int, seed: int) -> JointPlan:
        """The best plan tried, and moved on from there where the calibration may refine; of several selections one that
        refreshes them together is among them."""
        measured, own = self._measured, self._measured.allotment
        planned = measured.plan(refreshes)
        plans = {planned: own, self._sure.plan(refreshes): self._sure}
        plans[self._mixed.refilled([part.refreshes for part in planned.parts])] = self._mixed
        for options in DAMPED[: None if measured.refine else 1]:
            plans[self._mixed.damped(refreshes, *options)] = self._mixed
        if len(measured.groups) > 1:
            plans[own.together(refreshes)] = own
        best = self._least(plans, seed)
        if measured.refine:
            steps = [part.refreshes for part in best.parts]
            plans |= {way.refilled(steps): way for way in (own, self._sure, self._mixed, self._polynomial)}
            best = self._least(plans, seed)
        return self.refined(best, plans[best], seed)

    def refined(self, plan: JointPlan, way: Allotment, seed: int) -> JointPlan:
        """Moved to a neighbour, filled the same way, for as long as one does better, of those that should do best."""
        measured, left = self._measured, self._measured.refine
        while left > 0:
            better = None
            for other in way.neighbours(plan):
                if left == 0:
                    break
                measured.told("refine", measured.refine - left, measured.refine)
                left -= not measured.was_tried(other, seed)
                if measured.level(other, seed) < measured.level(plan, seed):
                    better = other
                    break
            if better is None:
                break
            plan = better
        return plan

    def _least(self, plans: dict[JointPlan, Allotment], seed: int) -> JointPlan:
        return min(plans, key=lambda plan: self._measured.level(plan, seed))

    # --- ways to fill steps that trust the linear picture more, or less --------------------------------------------

    @cached_property
    def _sure(self) -> Allotment:
        return self._measured.allotment.other(coherence=1e6)

    @cached_property
    def _mixed(self) -> Allotment:
        return self._measured.allotment.other(polynomial=0.5)

    @cached_property
    def _polynomial(self) -> Allotment:
        return self._measured.allotment.other(polynomial=1.0)


__all__ = ["Choice"]
