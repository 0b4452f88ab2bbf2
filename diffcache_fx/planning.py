"""Which steps refresh: the plan of least predicted error (`filling`) for a number of refreshes.

By dynamic programming over (step, history), exact where errors of different runs of reuses are uncorrelated and each
step is filled by its own least squares; then refreshes are moved for as long as E itself falls.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import cached_property

import numpy as np

from .errors import CalibrationError
from .filling import COHERENCE, RIDGE, STEADINESS, Array, Filling, Planned, least_squares

LONGEST = 12
_TOGETHER = 64
_FAR = 2  # steps that a refresh is moved by, at the most
_Table = dict[tuple[int, ...], tuple[float, tuple[int, ...] | None]]


class Planner(Filling):
    """Plans for one recorded run. longest: most reuses in a row. warm_up: steps at the start that refresh. Others as in
    `Filling`."""

    def __init__(
        self,
        effects: Array,
        gains: Array,
        *,
        history: int = 2,
        longest: int = LONGEST,
        warm_up: int = 1,
        steadiness: float = STEADINESS,
        coherence: float = COHERENCE,
        polynomial: float = 0.0,
        ridge: float = RIDGE,
    ) -> None:
        super().__init__(
            effects,
            gains,
            history=history,
            steadiness=steadiness,
            coherence=coherence,
            polynomial=polynomial,
            ridge=ridge,
        )
        if not 1 <= warm_up <= self.steps:
            raise CalibrationError(f"warm_up must be from 1 to {self.steps} steps, not {warm_up!r}")
        self.longest, self.warm_up = longest, warm_up
        self._runs: dict[tuple[int, ...], Array] = {}
        self._tables: list[_Table] | None = None

    def other(self, *, coherence: float | None = None, polynomial: float | None = None) -> Planner:
        """One for the same run that trusts the linear picture less, or more."""
        made = Planner(
            self.effects,
            self.gains,
            history=self.history,
            longest=self.longest,
            warm_up=self.warm_up,
            steadiness=self.steadiness,
            coherence=self.coherence if coherence is None else coherence,
            polynomial=self.polynomial if polynomial is None else polynomial,
            ridge=self.ridge,
        )
        made._runs, made._tables, made._known = self._runs, self._solved(), self._known  # what none of them touches
        return made

    def plan(self, refreshes: int) -> Planned:
        """The plan with at most so many refreshes. Raises CalibrationError if the longest run forbids it."""
        found = self.selected(refreshes)
        least = self.objective(found)
        waiting = [self._shifted, self._exchanged]
        while waiting:
            moves, better = waiting[0], False
            for index in range(len(found)):
                tried = {moved: self.objective(moved) for moved in moves(found, index)}
                best = min(tried, key=tried.__getitem__, default=found)
                if tried.get(best, least) < least * (1 - 1e-6):
                    found, least, better = best, tried[best], True
            waiting = [self._shifted, self._exchanged] if better else waiting[1:]
        return self.filled(found)

    def most_first(self, refreshes: int) -> int:
        """How many of so many refreshes can lie at the start, for the others to reach the end in runs that are not too
        long; at least the warm-up."""
        able = [n for n in range(self.warm_up, refreshes + 1) if self._reach(n, refreshes) >= self.steps]
        return max(able, default=self.warm_up)

    def _reach(self, first: int, refreshes: int) -> int:
        return first + self.longest + (refreshes - first) * (self.longest + 1)

    def neighbours(self, refreshes: tuple[int, ...]) -> set[tuple[int, ...]]:
        """What moving one refresh, or all from it on, by a few steps makes of these."""
        return {moved for index in range(len(refreshes)) for moved in self._shifted(refreshes, index)} - {refreshes}

    def _shifted(self, refreshes: tuple[int, ...], index: int) -> Iterator[tuple[int, ...]]:
        """One refresh, or all from it on, a little earlier or later."""
        before, step, after = refreshes[:index], refreshes[index], refreshes[index + 1 :]
        for far in range(-_FAR, _FAR + 1):
            yield from self._allowed((*before, step + far, *after), index)
            yield from self._allowed((*before, step + far, *(later + far for later in after)), index)

    def _exchanged(self, refreshes: tuple[int, ...], index: int) -> Iterator[tuple[int, ...]]:
        """One refresh at any other step."""
        others = refreshes[:index] + refreshes[index + 1 :]
        for step in set(range(self.warm_up, self.steps)) - set(refreshes):
            yield from self._allowed(tuple(sorted((*others, step))), index)

    def _allowed(self, refreshes: tuple[int, ...], index: int) -> Iterator[tuple[int, ...]]:
        """Refreshes in order, in runs that are not too long; those of the warm-up stay."""
        gaps = np.diff([*refreshes, self.steps])
        if (
            index >= self.warm_up
            and refreshes[index] >= self.warm_up
            and 1 <= gaps.min() <= gaps.max() <= self.longest + 1
        ):
            yield refreshes

    def selected(self, refreshes: int) -> tuple[int, ...]:
        """At most so many refreshes, by dynamic programming: exact for the sum of `run_errors`."""
        tables = self._solved()
        ends = [end for count in range(self.warm_up, min(refreshes, self.steps) + 1) for end in self._ends(count)]
        if not ends:
            raise CalibrationError(
                f"{refreshes} refreshes in {self.steps} steps need runs of more than {self.longest} reuses: allow more "
                "refreshes, or longer runs"
            )
        _, count, past = min(ends)
        chosen: set[int] = set(range(self.warm_up))
        state: tuple[int, ...] | None = past
        while state is not None:
            chosen.add(state[0])
            count, state = count - 1, tables[count][state][1]
        return tuple(sorted(chosen))

    def _ends(self, count: int) -> Iterator[tuple[float, int, tuple[int, ...]]]:
        """Whole plans with so many refreshes: error, count and the state at the last of them."""
        for past, (error, _) in self._solved()[count].items():
            tail = self._tail(past)
            if tail is not None:
                yield error + tail, count, past

    @cached_property
    def least_errors(self) -> Array:
        """By number of refreshes, from 0 to all steps: the least sum of `run_errors`; infinite where there is none."""
        counts = range(self.steps + 1)
        return np.array([min((error for error, *_ in self._ends(n)), default=np.inf) for n in counts])

    def run_errors(self, past: tuple[int, ...]) -> Array:
        """|sum_(t in run) g_t d_t|^2 of the run of reuses after the refreshes `past` (newest first), for each length
        from 0 to the longest or the end, each step filled by its own least squares."""
        if past not in self._runs:
            self._prepare([past])
        return self._runs[past]

    def _prepare(self, pasts: Iterable[tuple[int, ...]]) -> None:
        """Find the errors of runs after these; many at a time, since each takes little."""
        alike: dict[tuple[int, int], list[tuple[int, ...]]] = {}
        for past in pasts:
            if past not in self._runs:
                alike.setdefault((past[0], len(past)), []).append(past)
        for (newest, _), found in alike.items():
            length = min(self.longest, self.steps - 1 - newest)
            for start in range(0, len(found), _TOGETHER):
                some = found[start : start + _TOGETHER]
                errors = np.zeros((len(some), length + 1))
                off = least_squares(self.held(np.array(some), length), self.ridge)[1]
                errors[:, 1:] = np.square(off.cumsum(1)).sum(2)
                self._runs |= dict(zip(some, errors, strict=True))

    def _tail(self, past: tuple[int, ...]) -> float | None:
        """Predicted error of reusing to the end; None if that is too long."""
        errors, length = self.run_errors(past), self.steps - 1 - past[0]
        return float(errors[length]) if length < len(errors) else None

    def _solved(self) -> list[_Table]:
        """By number of refreshes so far and the last of them (newest first): the least error up to there, and the state
        that it came from."""
        if self._tables is not None:
            return self._tables
        first = tuple(reversed(range(max(0, self.warm_up - self.history), self.warm_up)))
        tables: list[_Table] = [{} for _ in range(self.steps + 1)]
        tables[self.warm_up][first] = 0.0, None
        for count in range(self.warm_up, self.steps):
            self._prepare(tables[count])
            for past, (error, _) in tables[count].items():
                for length, added in enumerate(self.run_errors(past)):
                    step = past[0] + length + 1
                    if step >= self.steps:
                        break
                    state, total = (step, *past)[: self.history], error + float(added)
                    if state not in tables[count + 1] or total < tables[count + 1][state][0]:
                        tables[count + 1][state] = total, past
        self._tables = tables
        return tables


__all__ = ["LONGEST", "Array", "Planned", "Planner"]
