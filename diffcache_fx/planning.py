"""The plan of least predicted error: which steps refresh, and the weights that fill the others.

For regions refreshed and reused together, let F_t be their value at step t. A reuse step fills it by a weighted sum of
the last values refreshed and is off by d_t = F_t - sum_j w_tj F_(h_j). To first order the final sample moves by
sum_t g_t d_t, where the number g_t, measured, tells how an error of step t reaches the end through sampler and model.
What is minimised is

    E = |sum_t g_t d_t|^2 + steadiness * sum_t g_t^2 |d_t|^2:

the error of the final sample, and a share of what each step is off by itself, since what cancels only in the linear
picture cannot be relied on. All of it follows from the inner products of the F_t. For given refreshes the weights are
the minimiser, a least-squares problem over all linear forecasts at once (Taylor, Newton, Hermite, BDF and learned rows
are points in it). The refreshes come from dynamic programming over (step, history), exact where errors of different
runs of reuses are uncorrelated and each step is filled by its own least squares; then single refreshes are moved for as
long as E falls.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import CalibrationError

Array = NDArray[np.float64]
LONGEST = 12
STEADINESS = 0.3
# Keeps the weights of nearly parallel values from growing beyond what is measured.
RIDGE = 1e-6
_FAR = 2  # steps that a refresh is moved by, at the most
_Table = dict[tuple[int, ...], tuple[float, tuple[int, ...] | None]]


@dataclass(frozen=True)
class Planned:
    """refreshes: the steps that compute. rows: weights of each step, newest refreshed value first (1 where it
    refreshes). error: |sum_t g_t d_t|^2, predicted. objective: E."""

    refreshes: tuple[int, ...]
    rows: tuple[tuple[float, ...], ...]
    error: float
    objective: float

    @property
    def bits(self) -> tuple[bool, ...]:
        return tuple(step in self.refreshes for step in range(len(self.rows)))


class Planner:
    """Plans for one group of regions over one recorded run. A step that sees one refreshed value holds it.

    gram: [steps, steps] inner products of the values. gains: [steps], g_t. history: how many refreshed values a
    forecast sees. longest: most reuses in a row. warm_up: steps at the start that refresh.
    """

    def __init__(
        self,
        gram: Array,
        gains: Array,
        *,
        history: int = 2,
        longest: int = LONGEST,
        warm_up: int = 1,
        steadiness: float = STEADINESS,
        ridge: float = RIDGE,
    ) -> None:
        self.steps = len(gram)
        if gram.shape != (self.steps, self.steps) or gains.shape != (self.steps,):
            raise CalibrationError(f"gram {gram.shape} and gains {gains.shape} are not of one number of steps")
        if not 1 <= history <= 3:
            raise CalibrationError(f"history must be 1, 2 or 3, not {history!r}")
        if not 1 <= warm_up <= self.steps:
            raise CalibrationError(f"warm_up must be from 1 to {self.steps} steps, not {warm_up!r}")
        if not steadiness > 0:
            raise CalibrationError(f"steadiness must be above 0, not {steadiness!r}")
        self.gram, self.gains = gram.astype(np.float64), gains.astype(np.float64)
        self.history, self.longest, self.warm_up = history, longest, warm_up
        self.steadiness, self._ridge = steadiness, ridge
        self._runs: dict[tuple[int, ...], Array] = {}
        self._tables: list[_Table] | None = None

    # --- weights ---------------------------------------------------------------------------------------------------

    def filled(self, refreshes: Sequence[int]) -> Planned:
        """The weights that minimise E for given refreshes (the first step among them)."""
        gram, known = self.gram, self._histories(refreshes)
        # Written as holding the newest value, plus multiples of itself and of its differences to older ones.
        held, bases, owners = {}, [], []
        for step, past in known.items():
            held[step] = self.gains[step] * (_unit(self.steps, step) - _unit(self.steps, past[0]))
            for index, older in enumerate(past if len(past) > 1 else []):  # a single value is held as it is
                moved = _unit(self.steps, older) - (_unit(self.steps, past[0]) if index else 0.0)
                bases.append(self.gains[step] * moved)
                owners.append(step)
        basis, owner = np.array(bases).reshape(-1, self.steps), np.array(owners, dtype=int)
        own = np.array([held[step] for step in owners]).reshape(-1, self.steps)
        inner = basis @ gram @ basis.T
        alike = owner[:, None] == owner[None, :]
        matrix = inner + self.steadiness * np.where(alike, inner, 0.0)
        total = np.sum([np.zeros(self.steps), *held.values()], axis=0)
        target = basis @ gram @ total + self.steadiness * np.einsum("ks,ks->k", basis @ gram, own)
        scale = np.diag(inner).clip(min=np.finfo(np.float64).tiny)
        multiples = np.linalg.solve(matrix + self._ridge * np.diag(scale), target)
        left = total - multiples @ basis
        error = max(float(left @ gram @ left), 0.0)
        rows: list[tuple[float, ...]] = [(1.0,)] * self.steps
        objective = error
        for step, past in known.items():
            mine = owner == step
            off = held[step] - multiples[mine] @ basis[mine]
            objective += self.steadiness * max(float(off @ gram @ off), 0.0)
            if len(past) > 1:
                weights = multiples[mine].copy()
                weights[0] += 1.0 - weights[1:].sum()
                rows[step] = tuple(float(weight) for weight in weights)
        return Planned(tuple(sorted(refreshes)), tuple(rows), error, objective)

    def _histories(self, refreshes: Sequence[int]) -> dict[int, list[int]]:
        """By step that is reused, the refreshes it sees, newest first."""
        found: dict[int, list[int]] = {}
        past: list[int] = []
        for step in range(self.steps):
            if step in refreshes:
                past = [step, *past][: self.history]
            else:
                found[step] = past
        return found

    def own_weights(self, past: Sequence[int], step: int) -> Array:
        """The weights of refreshes (newest first) that fill one step best by itself, by least squares."""
        rows = list(past)
        if len(rows) == 1:
            return np.ones(1)
        basis = np.eye(len(rows))
        basis[1:, 0] = -1.0
        inner = basis @ self.gram[np.ix_(rows, rows)] @ basis.T
        target = basis @ (self.gram[rows, step] - self.gram[rows, rows[0]])
        scale = np.diag(inner).clip(min=np.finfo(np.float64).tiny)
        multiples = np.linalg.solve(inner + self._ridge * np.diag(scale), target)
        return np.eye(len(rows))[0] + basis.T @ multiples

    # --- refreshes -------------------------------------------------------------------------------------------------

    def steadier(self, steadiness: float) -> Planner:
        """One for the same run that trusts the linear picture less, or more."""
        made = Planner(
            self.gram,
            self.gains,
            history=self.history,
            longest=self.longest,
            warm_up=self.warm_up,
            steadiness=steadiness,
            ridge=self._ridge,
        )
        made._runs, made._tables = self._runs, self._tables  # what steadiness does not touch
        return made

    def plan(self, refreshes: int) -> Planned:
        """The plan with at most so many refreshes. Raises CalibrationError if the longest run forbids it."""
        found = self.filled(self.selected(refreshes))
        while True:
            better = min(
                (self.filled(moved) for moved in self._moved(found.refreshes)),
                key=lambda plan: plan.objective,
                default=found,
            )
            if better.objective >= found.objective * (1 - 1e-6):
                return found
            found = better

    def _moved(self, refreshes: Sequence[int]) -> Iterator[tuple[int, ...]]:
        """Each refresh after the warm-up a little earlier or later."""
        for index, step in enumerate(refreshes):
            if step < self.warm_up:
                continue
            for far in range(-_FAR, _FAR + 1):
                moved = sorted({*refreshes[:index], step + far, *refreshes[index + 1 :]})
                fits = self.warm_up <= step + far < self.steps and len(moved) == len(refreshes)
                gaps = np.diff([*moved, self.steps])
                if far and fits and int(gaps.max()) <= self.longest + 1:
                    yield tuple(moved)

    def selected(self, refreshes: int) -> tuple[int, ...]:
        """At most so many refreshes, by dynamic programming: exact for the sum of `run_errors`."""
        tables = self._solved()
        ends = [
            (error + tail, count, past)
            for count in range(self.warm_up, min(refreshes, self.steps) + 1)
            for past, (error, _) in tables[count].items()
            if (tail := self._tail(past)) is not None
        ]
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

    def run_errors(self, past: tuple[int, ...]) -> Array:
        """|sum_(t in run) g_t d_t|^2 of the run of reuses after the refreshes `past` (newest first), for each length
        from 0 to the longest or the end, each step filled by its own least squares."""
        if past not in self._runs:
            moved = np.zeros(self.steps)
            errors = [0.0]
            for step in range(past[0] + 1, min(past[0] + self.longest, self.steps - 1) + 1):
                moved[step] += self.gains[step]
                moved[list(past)] -= self.gains[step] * self.own_weights(past, step)
                used = np.flatnonzero(moved)
                errors.append(max(float(moved[used] @ self.gram[np.ix_(used, used)] @ moved[used]), 0.0))
            self._runs[past] = np.array(errors)
        return self._runs[past]

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


def _unit(count: int, index: int) -> Array:
    made = np.zeros(count)
    made[index] = 1.0
    return made
