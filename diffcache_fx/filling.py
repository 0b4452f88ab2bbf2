"""The weights that fill the steps of a plan, and what they leave.

For regions refreshed and reused together, let F_t be their value at step t. A reuse step fills it by a weighted sum of
the last values refreshed and is off by d_t = F_t - sum_j w_tj F_(h_j). To first order the final sample moves by
sum_t g_t d_t, where the number g_t, measured, tells how an error of step t reaches the end through sampler and model.
What is minimised is

    E = |sum_t g_t d_t|^2 + steadiness * sum_t g_t^2 |d_t|^2:

the error of the final sample, and a share of what each step is off by itself, since what cancels only in the linear
picture cannot be relied on. All of it follows from the inner products of the F_t. For given refreshes the weights are
the minimiser over all linear forecasts at once (Taylor, Newton, Hermite, BDF and learned rows are points in it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .errors import CalibrationError

Array = NDArray[np.float64]
STEADINESS = 0.3
# Keeps the weights of nearly parallel values from growing beyond what is measured.
RIDGE = 1e-6
_AHEAD = 12  # reuses of a run that are looked at together


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


class Filling:
    """Fills one recorded run of one group of regions. A step that sees one refreshed value holds it.

    gram: [steps, steps] inner products of the values. gains: [steps], g_t. history: how many refreshed values a
    forecast sees.
    """

    def __init__(
        self, gram: Array, gains: Array, *, history: int = 2, steadiness: float = STEADINESS, ridge: float = RIDGE
    ) -> None:
        self.steps = len(gram)
        if gram.shape != (self.steps, self.steps) or gains.shape != (self.steps,):
            raise CalibrationError(f"gram {gram.shape} and gains {gains.shape} are not of one number of steps")
        if not 1 <= history <= 3:
            raise CalibrationError(f"history must be 1, 2 or 3, not {history!r}")
        if not steadiness > 0:
            raise CalibrationError(f"steadiness must be above 0, not {steadiness!r}")
        self.gram, self.gains = gram.astype(np.float64), gains.astype(np.float64)
        self.history, self.steadiness, self.ridge = history, steadiness, ridge
        size, turn = np.linalg.eigh((self.gram + self.gram.T) / 2)
        self._values: Array = turn * np.sqrt(size.clip(min=0.0))  # vectors with these inner products
        self._known: dict[tuple[int, ...], Reuses] = {}

    def filled(self, refreshes: Sequence[int]) -> Planned:
        """The weights that minimise E for given refreshes (the first step among them)."""
        runs, moves = self._balanced(refreshes)
        rows: list[tuple[float, ...]] = [(1.0,)] * self.steps
        total, alone = np.zeros(self.steps), 0.0
        for (known, length), move in zip(runs, moves, strict=True):
            for index in range(length):
                step = known.past[0] + 1 + index
                weights = known.weights[index]
                if len(weights) > 1:
                    weights = weights - (move @ known.directions) / self.gains[step]
                    rows[step] = tuple(float(weight) for weight in weights)
                off = self.gains[step] * (self._values[step] - weights @ self._values[list(known.past)])
                total += off
                alone += float(off @ off)
        error = float(total @ total)
        return Planned(tuple(sorted(refreshes)), tuple(rows), error, error + self.steadiness * alone)

    def _balanced(self, refreshes: Sequence[int]) -> tuple[list[tuple[Reuses, int]], list[Array]]:
        """The runs of reuses, and by how much each of their steps is moved off its own least squares.

        What a step is off by has a part that no weights of what it sees can change, and one that is free. Only the sum
        of the free parts of a run's steps matters to the final sample, and it costs least when they all have the same
        share of it. So there are as many unknowns as runs have directions.
        """
        order = sorted(refreshes)
        ends = [*order[1:], self.steps]
        runs = []
        for index, (step, end) in enumerate(zip(order, ends, strict=True)):
            if end > step + 1:
                past = tuple(reversed(order[max(0, index + 1 - self.history) : index + 1]))
                runs.append((self.after(past, end - step - 1), end - step - 1))
        if not runs:
            return [], []
        total = np.sum([known.sums[length] for known, length in runs], axis=0)
        basis = np.concatenate([known.basis for known, _ in runs])
        price = np.concatenate([np.full(len(known.basis), self.steadiness / length) for known, length in runs])
        found = np.linalg.solve(basis @ basis.T + np.diag(price), -basis @ total) if len(basis) else np.zeros(0)
        moves, start = [], 0
        for known, length in runs:
            moves.append(found[start : start + len(known.basis)] / length)
            start += len(known.basis)
        return runs, moves

    def objective(self, refreshes: Sequence[int]) -> float:
        """E of the best weights."""
        runs, moves = self._balanced(refreshes)
        total, alone = np.zeros(self.steps), 0.0
        for (known, length), move in zip(runs, moves, strict=True):
            total += known.sums[length] + length * (move @ known.basis)
            alone += known.squares[length] + length * float(move @ move)
        return float(total @ total) + self.steadiness * alone

    def after(self, past: tuple[int, ...], length: int) -> Reuses:
        """What is known of runs of reuses after these refreshes, of so many steps at least."""
        known = self._known.get(past)
        if known is None or len(known.weights) < length:
            known = self._known[past] = self._measured(past, min(max(length, _AHEAD), self.steps - 1 - past[0]))
        return known

    def _measured(self, past: tuple[int, ...], length: int) -> Reuses:
        seen, steps = self._values[list(past)], np.arange(past[0] + 1, past[0] + 1 + length)
        weights = self.own_weights(past, steps.tolist())
        off = self.gains[steps, None] * (self._values[steps] - weights @ seen)
        sums, squares = np.zeros((length + 1, self.steps)), np.zeros(length + 1)
        off.cumsum(0, out=sums[1:])
        np.einsum("ts,ts->t", off, off).cumsum(out=squares[1:])
        return Reuses(past, weights, sums, squares, seen, self.ridge)

    def own_weights(self, past: Sequence[int], steps: Sequence[int]) -> Array:
        """By row, the weights of refreshes (newest first) that fill each of some steps best by itself, by least
        squares."""
        rows, wanted = list(past), list(steps)
        if len(rows) == 1:
            return np.ones((len(wanted), 1))
        basis = np.eye(len(rows))
        basis[1:, 0] = -1.0
        inner = basis @ self.gram[np.ix_(rows, rows)] @ basis.T
        target = basis @ (self.gram[np.ix_(rows, wanted)] - self.gram[rows, rows[0]][:, None])
        scale = np.diag(inner).clip(min=np.finfo(np.float64).tiny)
        multiples = np.linalg.solve(inner + self.ridge * np.diag(scale), target)
        return np.eye(len(rows))[0] + multiples.T @ basis


@dataclass
class Reuses:
    """Runs of reuses after the refreshes `past` (newest first), step by step, each filled by its own least squares.

    weights [length, len(past)]: of each step. sums [length + 1, steps]: what the first steps are off by, times their
    gains, added up. squares [length + 1]: the same of the squares of each. seen [len(past), steps]: the past values.
    """

    past: tuple[int, ...]
    weights: Array
    sums: Array
    squares: Array
    seen: Array
    ridge: float

    @cached_property
    def directions(self) -> Array:
        """[len(basis), len(past)]: the weights that make the basis."""
        count = len(self.past)
        if count == 1:  # a single value is held as it is
            return np.zeros((0, 1))
        differences = np.eye(count)
        differences[1:, 0] = -1.0
        inner = differences @ self.seen @ self.seen.T @ differences.T
        scale = np.diag(np.diag(inner).clip(min=np.finfo(np.float64).tiny))
        return np.linalg.solve(np.linalg.cholesky(inner + self.ridge * scale), differences)

    @cached_property
    def basis(self) -> Array:
        """[., steps]: orthonormal, nearly, of what weights of the past can make."""
        return self.directions @ self.seen
