"""The weights that fill the steps of a plan, and what they leave.

For regions refreshed and reused together, a reuse step fills their value by a weighted sum of the last values refreshed
(weights that add up to 1), and what the sampler makes of that is off by d_t = sum_j w_tj e_(t, h_j), where e_(t, s) is
what holding the value of step s at step t would do (`effects`). To first order the final sample moves by sum_t g_t d_t,
where the number g_t, measured, tells how an error of step t reaches the end. What is minimised is

    E = sum_(r, q) c_rq <D_r, D_q> + steadiness * sum_t g_t^2 |d_t|^2,

where D_r is the sum of g_t d_t over a run of reuses and c_rq = exp(-|steps between the runs| / coherence): the error of
the final sample, to which runs that lie far apart add less surely, since the way to the end turns errors (with an
infinite coherence it is |sum_t g_t d_t|^2), and a share of what each step is off by itself. For given refreshes the
weights start from those that fill each step best by itself, and the steps of a run are moved off them together, by the
same multiples of what its refreshes can change. Taylor, Newton, Hermite, BDF and learned rows are points among all
these weights; what errors do beyond the linear picture can be in favour of polynomials (Taylor's, on even intervals),
so that weights may be mixed with theirs.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .errors import CalibrationError

Array = NDArray[np.float64]
STEADINESS = 0.3
COHERENCE = 24.0
# Keeps the weights of nearly parallel values from growing beyond what is measured.
RIDGE = 1e-6
_AHEAD = 12  # reuses of a run that are looked at together


@dataclass(frozen=True)
class Planned:
    """refreshes: the steps that compute. rows: weights of each step, newest refreshed value first (1 where it
    refreshes). error: the first sum of E, the squared error of the final samples as predicted. objective: E."""

    refreshes: tuple[int, ...]
    rows: tuple[tuple[float, ...], ...]
    error: float = field(compare=False)
    objective: float = field(compare=False)

    @property
    def bits(self) -> tuple[bool, ...]:
        return tuple(step in self.refreshes for step in range(len(self.rows)))


def differences(gram: Array) -> Array:
    """[steps, steps, steps]: of each pair (t, s) a vector F_s - F_t, given the inner products of the F: the effects of
    holding a value where nothing tells what becomes of it."""
    size, turn = np.linalg.eigh((gram + gram.T) / 2)
    counts = size > size.max() * 1e-15
    values: Array = turn[:, counts] * np.sqrt(size[counts])
    return values[None, :] - values[:, None]


class Filling:
    """Fills one recorded run of one group of regions. A step that sees one refreshed value holds it.

    effects: [steps, steps, width], e_(t, s) for s before t. gains: [steps], g_t. history: how many refreshed values a
    forecast sees. coherence: in steps. polynomial: share of the weights that continue values by polynomials.
    """

    def __init__(
        self,
        effects: Array,
        gains: Array,
        *,
        history: int = 2,
        steadiness: float = STEADINESS,
        coherence: float = COHERENCE,
        polynomial: float = 0.0,
        ridge: float = RIDGE,
    ) -> None:
        self.steps = len(effects)
        if effects.ndim != 3 or effects.shape[:2] != (self.steps, self.steps) or gains.shape != (self.steps,):
            raise CalibrationError(f"effects {effects.shape} and gains {gains.shape} are not of one number of steps")
        if not 1 <= history <= 3:
            raise CalibrationError(f"history must be 1, 2 or 3, not {history!r}")
        if not steadiness > 0:
            raise CalibrationError(f"steadiness must be above 0, not {steadiness!r}")
        self.effects, self.gains = np.asarray(effects, dtype=np.float64), gains.astype(np.float64)
        self.history, self.steadiness, self.ridge = history, steadiness, ridge
        self.coherence, self.polynomial = coherence, polynomial
        self._known: dict[tuple[int, ...], Reuses] = {}

    def filled(self, refreshes: Sequence[int]) -> Planned:
        """The weights for given refreshes (the first step among them): those of least E among the ones that move the
        steps of a run together, and polynomials' in the share that they have."""
        runs, moves = self._balanced(refreshes)
        rows: list[tuple[float, ...]] = [(1.0,)] * self.steps
        totals, alone = [], 0.0
        for (known, length), move in zip(runs, moves, strict=True):
            weights = known.weights[:length] + move @ known.directions[:length]
            weights += self.polynomial * (_continued(known.past, length) - weights)
            for index, row in enumerate(weights):
                rows[known.past[0] + 1 + index] = tuple(float(weight) for weight in row)
            off = np.einsum("tk,tkw->tw", weights, self.held(np.array([known.past]), length)[0])
            totals.append(off.sum(0))
            alone += float(np.square(off).sum())
        error = self._added(runs, np.array(totals))
        return Planned(tuple(sorted(refreshes)), tuple(rows), error, error + self.steadiness * alone)

    def objective(self, refreshes: Sequence[int]) -> float:
        """E of the weights that minimise it, where the steps of a run are moved together."""
        runs, moves = self._balanced(refreshes)
        both = list(zip(runs, moves, strict=True))
        totals = np.array([known.sums[length] + move @ known.reach[length] for (known, length), move in both])
        alone = [known.squares[length] + length * float(move @ move) for (known, length), move in both]
        return self._added(runs, totals) + self.steadiness * sum(alone)

    def _added(self, runs: list[tuple[Reuses, int]], totals: Array) -> float:
        """The first sum of E, from what runs are off by [runs, width]."""
        return float((self._alike(runs) * (totals @ totals.T)).sum()) if runs else 0.0

    def _alike(self, runs: list[tuple[Reuses, int]]) -> Array:
        """[runs, runs], c of their middles."""
        middles = np.array([known.past[0] + (length + 1) / 2 for known, length in runs])
        return np.exp(-np.abs(middles[:, None] - middles) / self.coherence)

    def _balanced(self, refreshes: Sequence[int]) -> tuple[list[tuple[Reuses, int]], list[Array]]:
        """The runs of reuses, and by how much the steps of each are moved off their own least squares.

        What a step is off by has a part that no weights of what it sees can change, and one that is free. Only the sum
        of the free parts of a run's steps matters to the final sample, and it costs least when they all have the same
        share of it: exactly so where a run's steps are free in the same directions, as those of one value are. So there
        are as many unknowns as runs have directions.
        """
        order = sorted(refreshes)
        ends = [*order[1:], self.steps]
        runs = []
        for index, (step, end) in enumerate(zip(order, ends, strict=True)):
            if end > step + 1:
                past = tuple(reversed(order[max(0, index + 1 - self.history) : index + 1]))
                runs.append((self.after(past, end - step - 1), end - step - 1))
        counts = [len(known.past) - 1 for known, _ in runs]
        if not sum(counts):
            return runs, [np.zeros(0)] * len(runs)
        owner = np.repeat(np.arange(len(runs)), counts)
        alike = self._alike(runs)[owner]
        totals = np.stack([known.sums[length] for known, length in runs])
        reach = np.concatenate([known.reach[length] for known, length in runs])
        price = self.steadiness * np.repeat([length for _, length in runs], counts)
        left = ((reach @ totals.T) * alike).sum(1)
        found = np.linalg.solve((reach @ reach.T) * alike[:, owner] + np.diag(price), -left)
        return runs, np.split(found, np.cumsum(counts)[:-1])

    def after(self, past: tuple[int, ...], length: int) -> Reuses:
        """What is known of runs of reuses after these refreshes, of so many steps at least."""
        known = self._known.get(past)
        if known is None or len(known.weights) < length:
            known = self._known[past] = self._measured(past, min(max(length, _AHEAD), self.steps - 1 - past[0]))
        return known

    def _measured(self, past: tuple[int, ...], length: int) -> Reuses:
        held = self.held(np.array([past]), length)[0]
        weights, off, inner, change = least_squares(held, self.ridge)
        width = self.effects.shape[2]
        sums, squares = np.zeros((length + 1, width)), np.zeros(length + 1)
        reach = np.zeros((length + 1, len(past) - 1, width))
        off.cumsum(0, out=sums[1:])
        np.einsum("ts,ts->t", off, off).cumsum(out=squares[1:])
        turn = np.linalg.cholesky(inner) if len(past) > 1 else inner
        np.linalg.solve(turn, held[:, 1:] - held[:, :1]).cumsum(0, out=reach[1:])
        directions = np.linalg.solve(turn, np.broadcast_to(change, (length, *change.shape)))
        return Reuses(past, weights, sums, squares, reach, directions)

    def held(self, pasts: NDArray[np.int64], length: int) -> Array:
        """What holding each value would do, times the gains, in the steps after the newest: pasts
        [plans, past], all with one newest refresh; [plans, length, past, width]."""
        steps = np.arange(pasts[0, 0] + 1, pasts[0, 0] + 1 + length)
        found: Array = self.effects[steps[:, None], pasts[:, None, :]] * self.gains[steps, None, None]
        return found


def _continued(past: tuple[int, ...], length: int) -> Array:
    """[length, past]: the weights that continue past values (newest first) by the polynomial through them."""
    points, steps = np.array(past, dtype=np.float64), past[0] + 1.0 + np.arange(length)
    table = np.ones((length, len(past)))
    for one, other in itertools.permutations(range(len(past)), 2):
        table[:, one] *= (steps - points[other]) / (points[one] - points[other])
    return table


def least_squares(held: Array, ridge: float) -> tuple[Array, Array, Array, Array]:
    """held: [..., past, width], what holding each past value does. The weights of least squares that add up to 1
    [..., past]; what they leave [..., width]; the inner products of what can change it, the differences to the first
    [..., past - 1, past - 1]; and the changes of weights that make these [past - 1, past]."""
    count = held.shape[-2]
    change = np.eye(count)[1:]
    change[:, 0] = -1.0
    moved = held[..., 1:, :] - held[..., :1, :]
    inner = moved @ moved.swapaxes(-1, -2)
    scale = np.diagonal(inner, axis1=-2, axis2=-1).clip(min=np.finfo(np.float64).tiny)
    inner = inner + ridge * scale[..., None] * np.eye(count - 1)
    if count == 1:
        return np.ones(held.shape[:-1]), held[..., 0, :], inner, change
    multiples = np.linalg.solve(inner, -(moved @ held[..., 0, :, None]))
    off = held[..., 0, :] + (multiples.swapaxes(-1, -2) @ moved)[..., 0, :]
    return np.eye(count)[0] + multiples[..., 0] @ change, off, inner, change


@dataclass
class Reuses:
    """Runs of reuses after the refreshes `past` (newest first), step by step, each filled by its own least squares.

    weights [length, len(past)]: of each step. sums [length + 1, width]: what the first steps are off by, times their
    gains, added up. squares [length + 1]: the same of the squares of each. reach [length + 1, len(past) - 1, width]:
    what moving each of the first steps by 1 along its directions adds up to. directions
    [length, len(past) - 1, len(past)]: the changes of weights that do so.
    """

    past: tuple[int, ...]
    weights: Array
    sums: Array
    squares: Array
    reach: Array
    directions: Array
