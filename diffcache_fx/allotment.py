"""Plans for several groups of regions that are refreshed each at steps of its own: how many refreshes each group gets
of a common budget, and when.

Errors of different groups are taken to add up. What each group is off by with n refreshes comes from the dynamic
programme of its own planner; which n to take is a knapsack, solved exactly by merging the groups' fronts of cost
against error one after another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from .errors import CalibrationError
from .filling import Planned
from .planning import Planner


@dataclass(frozen=True)
class JointPlan:
    """A plan for each group of regions, in their order."""

    parts: tuple[Planned, ...]

    @property
    def refreshes(self) -> tuple[int, ...]:
        """The steps at which any group refreshes."""
        return tuple(sorted({step for part in self.parts for step in part.refreshes}))

    @property
    def bits(self) -> tuple[bool, ...]:
        """Of each step, whether any group refreshes."""
        return tuple(any(step) for step in zip(*(part.bits for part in self.parts), strict=True))

    @property
    def error(self) -> float:
        """Squared distance of the final samples, predicted."""
        return sum(part.error for part in self.parts)

    @property
    def objective(self) -> float:
        return sum(part.objective for part in self.parts)


class _Damped(dict[tuple[int, float, int], Planner]):
    """Planners with powers of the measured gains, by group, power and warm-up; made when they are asked for."""

    def __init__(self, planners: Sequence[Planner]) -> None:
        super().__init__()
        self._planners = planners

    def __missing__(self, key: tuple[int, float, int]) -> Planner:
        group, power, warm_up = key
        own = self._planners[group]
        made = Planner(
            own.effects,
            own.gains**power,
            history=own.history,
            longest=own.longest,
            warm_up=max(warm_up, own.warm_up),
        )
        return self.setdefault(key, made)


class Allotment:
    """Shares refreshes among groups. planners: one for each group, of one run. costs: FLOPs that a refresh of each
    group takes. A budget is given as the number of steps at which all groups might refresh."""

    def __init__(self, planners: Sequence[Planner], costs: Sequence[float]) -> None:
        if len(planners) != len(costs) or not planners:
            raise CalibrationError(f"{len(planners)} groups of regions have {len(costs)} costs")
        self.planners, self.costs = tuple(planners), tuple(float(cost) for cost in costs)

    def other(self, **options: float) -> Allotment:
        """One that trusts the linear picture less, or more (`Planner.other`)."""
        made = Allotment([planner.other(**options) for planner in self.planners], self.costs)
        made._damped = self._damped
        return made

    def plan(self, refreshes: int) -> JointPlan:
        """The plan of least error that costs at most so many refreshes of all groups."""
        counts = self.counts(refreshes)
        return JointPlan(tuple(planner.plan(n) for planner, n in zip(self.planners, counts, strict=True)))

    def together(self, refreshes: int) -> JointPlan:
        """All groups refreshed at the same steps, those that are best for them as one; each is filled by itself."""
        steps = self._as_one.plan(refreshes).refreshes
        return self.refilled([steps] * len(self.planners))

    def damped(self, refreshes: int, power: float, warm_up: int = 1, moved: bool = True) -> JointPlan:
        """Refreshed where errors reach the end by a power below 1 of what was measured (0: all steps count alike), and
        at so many first steps: errors that are no longer small even out on their way, and forecasts want to know how
        values turn. moved: refreshes are moved for as long as that lowers E."""
        counts = self.counts(refreshes)
        firsts = [min(warm_up, n, p.most_first(n)) for p, n in zip(self.planners, counts, strict=True)]
        planners = [self._damped[index, power, first] for index, first in enumerate(firsts)]
        chosen = [p.plan(n).refreshes if moved else p.selected(n) for p, n in zip(planners, counts, strict=True)]
        return self.refilled(chosen)

    def refilled(self, refreshes: Sequence[tuple[int, ...]]) -> JointPlan:
        """A plan of these refreshes of each group."""
        return JointPlan(tuple(p.filled(steps) for p, steps in zip(self.planners, refreshes, strict=True)))

    def neighbours(self, plan: JointPlan) -> list[JointPlan]:
        """Plans in which a refresh of one group, or all of its from there on, are a few steps away; best first."""
        found = []
        for index, (planner, part) in enumerate(zip(self.planners, plan.parts, strict=True)):
            for moved in planner.neighbours(part.refreshes):
                found.append(JointPlan((*plan.parts[:index], planner.filled(moved), *plan.parts[index + 1 :])))
        return sorted(found, key=lambda entry: entry.objective)

    def counts(self, refreshes: int) -> tuple[int, ...]:
        """How often each group refreshes. Raises CalibrationError where the budget is too small for the longest
        runs."""
        budget = refreshes * sum(self.costs) * (1 + 1e-9)
        front: list[tuple[float, float, tuple[int, ...]]] = [(0.0, 0.0, ())]
        for planner, cost in zip(self.planners, self.costs, strict=True):
            errors = planner.least_errors
            merged = sorted(
                (spent + n * cost, error + float(errors[n]), (*taken, n))
                for spent, error, taken in front
                for n in np.flatnonzero(np.isfinite(errors)).tolist()
                if spent + n * cost <= budget
            )
            front, least = [], np.inf
            for entry in merged:  # dearer only where the error is less
                if entry[1] < least:
                    front.append(entry)
                    least = entry[1]
        if not front:
            self.planners[0].selected(refreshes)  # says what forbids it
            raise CalibrationError(f"{refreshes} refreshes are too few for runs of this length in every group")
        return front[-1][2]

    @cached_property
    def _damped(self) -> _Damped:
        return _Damped(self.planners)

    @cached_property
    def _as_one(self) -> Planner:
        """Of all values in one, each weighed by its own gains."""
        first = self.planners[0]
        together = np.concatenate([p.effects * p.gains[:, None, None] for p in self.planners], axis=2)
        options = {"history": first.history, "longest": first.longest, "warm_up": first.warm_up}
        return Planner(together, np.ones(first.steps), **options)


__all__ = ["Allotment", "JointPlan"]
