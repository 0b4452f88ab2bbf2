"""Forecasts on the refreshed values as they lie: the polynomial and the rational function through them, and FoCa.

F_0, F_1, ... are the refreshed values, newest first, p_0, p_1, ... their positions, x the steps ahead of the newest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add, mul
from typing import ClassVar

from .arithmetic import Number, Truth, both, differs, divide, either, minimum, where
from .rows import Row, RowForecast, check_order, check_positive, combined, unit


@dataclass(frozen=True)
class Newton(RowForecast):
    """The polynomial through the last order + 1 refreshed values, in Newton's form: sum_k F[p_0..p_k] N_k(step).

    N_k = (step - p_0) ... (step - p_{k-1}), F[...] the divided differences over the real intervals. Of several values
    at one position the newest counts. The textbook form that `Taylor` departs from; order 1 is `Linear`.
    """

    kind: ClassVar[str] = "newton"
    order: int = 1

    def __post_init__(self) -> None:
        check_order("order", self.order, 1, 4)

    @property
    def slots(self) -> int:
        return self.order + 1

    def row(self, positions: Sequence[Number], step: Number, measured: Mapping[str, Number]) -> Row:
        return combined(newton_basis(positions[:-1], step), divided_differences(positions))


@dataclass(frozen=True)
class Lagrange(RowForecast):
    """The polynomial through the last `nodes` refreshed values, in Lagrange's form; the same as Newton(nodes - 1).

    Weight of F_j: prod_{k != j} (step - p_k) / (p_j - p_k). Of several values at one position the newest counts.
    """

    kind: ClassVar[str] = "lagrange"
    nodes: int = 2

    def __post_init__(self) -> None:
        check_order("nodes", self.nodes, 1, 5)

    @property
    def slots(self) -> int:
        return self.nodes

    def row(self, positions: Sequence[Number], step: Number, measured: Mapping[str, Number]) -> Row:
        kept = distinct(positions)

        def weight(j: int) -> Number:
            # For a repeated position one factor is over no interval, so 0, and with it the weight.
            factors = [
                where(keep, divide(step - other, positions[j] - other), 1.0)
                for k, (keep, other) in enumerate(zip(kept, positions, strict=True))
                if k != j
            ]
            return reduce(mul, factors, 1.0)

        return tuple(weight(j) for j in range(len(positions)))


@dataclass(frozen=True)
class Barycentric(RowForecast):
    """ChebBooster: weights (rho_j / (step - p_j)) / sum_k (rho_k / (step - p_k)), rho = 1/2, -1, 1, ..., +-1/2.

    Lu et al., 2026, arXiv 2608.23429, equations 8 and 9: the weights of Chebyshev points used at the refreshed steps as
    they lie, which makes it Berrut's second rational interpolant (1988) and not a polynomial. Defaults there: 2 values
    (FLUX, where it is `Linear`), 3 (DiT). Of several values at one position the newest counts.

    Meant for regular refreshes: from 3 values on, where an older interval is longer than a newer one, the sum may pass
    through 0 ahead of the newest value, and weights grow without bound around that step (at it, the newest is held).
    """

    kind: ClassVar[str] = "barycentric"
    history: int = 2

    def __post_init__(self) -> None:
        check_order("history", self.history, 1, 8)

    @property
    def slots(self) -> int:
        return self.history

    def row(self, positions: Sequence[Number], step: Number, measured: Mapping[str, Number]) -> Row:
        kept = distinct(positions)
        rho = _alternating(kept)
        # Both sides times prod_k (step - p_k): no division by zero where the step is that of a value.
        aways = [where(keep, step - p, 1.0) for keep, p in zip(kept, positions, strict=True)]
        terms = [rho[j] * reduce(mul, aways[:j] + aways[j + 1 :], 1.0) for j in range(len(positions))]
        total = reduce(add, terms)
        sound, newest = differs(total, 0.0), unit(0, len(positions))
        return tuple(where(sound, divide(term, total), held) for term, held in zip(terms, newest, strict=True))


@dataclass(frozen=True)
class FoCa(RowForecast):
    """FoCa: a BDF2 forecast, calibrated by Heun's rule: F_0 + x/2 (d_full + d_curr).

    Zheng et al., "Forecast then Calibrate", AAAI 2026, arXiv 2508.16211. Its equations, for steps of equal length h, as
    quoted by the author of cache-dit (the paper itself was not at hand):
    (6) F'_k = (3 F_k - 4 F_{k-1} + F_{k-2}) / 2h; (7) F^_{k+1} = 4/3 F_k - 1/3 F_{k-1} + 2h/3 F'_k;
    (8) F_{k+1} = F_k + h/2 (F'_full + F'_{k+1}), F'_full the slope at the last refreshed step.

    From the paper: d_full is (6) at the newest refreshed value; `predicted` is (7), and as far ahead as the refreshed
    steps lie apart it is 7/3 F_0 - 5/3 F_1 + 1/3 F_2 (the row that L2P quotes for FoCa, arXiv 2604.26365); the result
    is (8). Our reading: F'_{k+1} is the slope to the forecast, d_curr = (F^ - F_0) / x. k runs over refreshed values
    only; the paper also feeds forecasts back, which no row of positions can know. For unequal steps (6) and (7) are
    BDF2 of variable step, with w = x / (p_0 - p_1): F^ = F_0 + x (w F[p_0, p_1] + (1 + w) F'_0) / (1 + 2 w), so that
    a straight line is continued exactly. With two values so far it is `Linear`, within the horizon.

    horizon, in steps, is cache-dit's, not the paper's (calibrators/foca.py, 3 there): beyond it the change at the
    horizon is scaled by horizon / x, back towards the newest value. A large number switches it off.
    """

    kind: ClassVar[str] = "foca"
    slots: ClassVar[int] = 3
    horizon: float = 3

    def __post_init__(self) -> None:
        check_positive("horizon", self.horizon)

    def row(self, positions: Sequence[Number], step: Number, measured: Mapping[str, Number]) -> Row:
        ahead = step - positions[0]
        reach = minimum(ahead, self.horizon)
        half = divide(reach, ahead) * reach / 2
        return combined((1.0, half, half), (unit(0, len(positions)), *self._slopes(positions, reach)))

    def predicted(self, positions: Sequence[Number], step: Number) -> Row:
        """The forecast before it is calibrated, equation (7), as weights newest first; no horizon."""
        ahead = step - positions[0]
        return combined((1.0, ahead), (unit(0, len(positions)), self._slopes(positions, ahead)[1]))

    def _slopes(self, positions: Sequence[Number], ahead: Number) -> tuple[Row, Row]:
        """d_full and d_curr."""
        differences = divided_differences(positions)
        if len(positions) == 1:
            flat = combined((0.0,), differences)
            return flat, flat
        apart = positions[0] - positions[1]
        # The slope at p_0 of the parabola through the last three values, which is (6) where they are evenly spaced.
        full = combined((1.0, where(distinct(positions)[1], apart, 1.0))[: len(positions) - 1], differences[1:])
        w = divide(ahead, apart)
        return full, combined((divide(w, 1 + 2 * w), divide(1 + w, 1 + 2 * w)), (differences[1], full))


def distinct(positions: Sequence[Number]) -> list[Truth]:
    """Whether a value is the newest of its position: a sampler may refine at one timestep."""
    found: list[Truth] = []
    for index, position in enumerate(positions):
        keep: Truth = True
        for newer in positions[:index]:
            keep = both(keep, differs(position, newer))
        found.append(keep)
    return found


def newton_basis(positions: Sequence[Number], x: Number) -> list[Number]:
    """N_0 = 1, N_{k+1} = N_k (x - p_k), without the factors of repeated positions; one more than positions."""
    basis: list[Number] = [1.0]
    for keep, position in zip(distinct(positions), positions, strict=True):
        basis.append(basis[-1] * where(keep, x - position, 1.0))
    return basis


def divided_differences(positions: Sequence[Number]) -> list[Row]:
    """c_k = F[p_0, ..., p_k], such that P(x) = sum_k c_k N_k(x) runs through the values; 0 for a repeated position.

    Found from c_k = (F_k - P_{k-1}(p_k)) / N_k(p_k), which needs no table and lets repeated positions drop out.
    """
    found: list[Row] = []
    for k, position in enumerate(positions):
        *lower, own = newton_basis(positions[:k], position)
        missed = combined([1.0, *(-value for value in lower)], [unit(k, len(positions)), *found])
        found.append(combined([divide(1.0, own)], [missed]))
    return found


def _alternating(kept: Sequence[Truth]) -> list[Number]:
    """1/2, -1, 1, ..., +-1/2 over the kept values, 0 for the others."""
    sign: Number = 1.0
    signs: list[Number] = []
    for keep in kept:
        signs.append(where(keep, sign, 0.0))
        sign = where(keep, -sign, sign)
    inner: Truth = False  # whether an older value is kept
    for index in reversed(range(len(kept))):
        signs[index] = signs[index] * where(inner, 1.0, 0.5)
        inner = either(inner, kept[index])
    return [0.5 * signs[0], *signs[1:]] if len(signs) > 1 else signs
