"""Which of the plans of one cost to take: those that trust the linear picture more or less are tried."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING

from .allotment import Allotment, JointPlan

if TYPE_CHECKING:
    from .calibration import Calibration

# Powers of the gains, refreshes at the start and whether they are moved, of further plans that are tried.
DAMPED = ((0.5, 1, True), (0.5, 1, False), (0.0, 3, True))


@dataclass(frozen=True)
class Recipe:
    """A way to come to a plan of so many refreshes. way: how its steps are filled."""

    make: Callable[[int], JointPlan]
    way: Allotment


class Choice:
    """Among the plans of a calibration, as they do in generations."""

    def __init__(self, measured: Calibration) -> None:
        self._measured = measured

    @cached_property
    def recipes(self) -> tuple[Recipe, ...]:
        """What is tried: the best plan by the objective first; of several selections one that refreshes them together
        is among them."""
        measured, own, sure, mixed = self._measured, self._measured.allotment, self._sure, self._mixed

        def mixing(refreshes: int) -> JointPlan:
            return mixed.refilled([part.refreshes for part in measured.plan(refreshes).parts])

        found = [Recipe(measured.plan, own), Recipe(sure.plan, sure), Recipe(mixing, mixed)]
        for power, first, moved in DAMPED[: None if measured.refine else 1]:
            found.append(Recipe(partial(mixed.damped, power=power, warm_up=first, moved=moved), mixed))
        if len(measured.groups) > 1:
            found.append(Recipe(own.together, own))
        return tuple(found)

    def best(self, refreshes: int, seed: int) -> JointPlan:
        """The best plan tried, and moved on from there where the calibration may refine: on two noises then, since what
        is moved to do best on one does worse on others."""
        measured = self._measured
        seeds = (seed, seed + 1) if measured.refine else (seed,)
        plans = {recipe.make(refreshes): recipe.way for recipe in self.recipes}
        best = self._least(plans, seeds)
        if measured.refine:
            steps = [part.refreshes for part in best.parts]
            ways = (measured.allotment, self._sure, self._mixed, self._polynomial)
            plans |= {way.refilled(steps): way for way in ways}
            best = self._least(plans, seeds)
        return self.refined(best, plans[best], seeds)

    def refined(self, plan: JointPlan, way: Allotment, seeds: Sequence[int]) -> JointPlan:
        """Moved to a neighbour, filled the same way, for as long as one does better on each noise, of those that should
        do best."""
        measured, left = self._measured, self._measured.refine
        while left > 0:
            better = None
            for other in way.neighbours(plan):
                if left == 0:
                    break
                measured.told("refine", measured.refine - left, measured.refine)
                left -= not measured.tries.known(other, seeds[0])
                if all(measured.level(other, seed) < measured.level(plan, seed) for seed in seeds):
                    better = other
                    break
            if better is None:
                break
            plan = better
        return plan

    def _least(self, plans: Iterable[JointPlan], seeds: Sequence[int]) -> JointPlan:
        return min(plans, key=lambda plan: sum(self._measured.level(plan, seed) for seed in seeds))

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


__all__ = ["Choice", "Recipe"]
