"""Forecasts that expand around the newest refreshed value: TaylorSeer, HiCache, and a control for both.

F_0, F_1, ... are the refreshed values, newest first, x the steps ahead of the newest.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import pairwise
from typing import ClassVar

from .arithmetic import Number, divide
from .errors import ScheduleError
from .rows import Row, RowForecast, check_order, check_positive, combined, unit


@dataclass(frozen=True)
class Taylor(RowForecast):
    """TaylorSeer: sum_i d_i x^i / i!, with d_i the recursive differences over the last interval.

    Liu et al., "From Reusing to Forecasting", ICCV 2025, arXiv 2503.06923; as in the authors' code: at a refreshed step
    d_0 = F and d_{i+1} = (d_i - d_i before) / (steps since the refresh before), with as many d_i as there are by then
    (the authors build none before the end of their warm-up). From order 2 on this is no interpolating polynomial;
    `Newton` is. Defaults there: order 1 (FLUX), 4 (DiT).
    """

    kind: ClassVar[str] = "taylor"
    order: int = 1

    def __post_init__(self) -> None:
        check_order("order", self.order, 1, 4)

    @property
    def slots(self) -> int:
        return self.order + 1

    def row(self, positions: Sequence[Number], step: Number, measured: Mapping[str, Number]) -> Row:
        return expansion(powers(step - positions[0], len(positions)), positions)


@dataclass(frozen=True)
class Damped(RowForecast):
    """Taylor with the i-th difference scaled by factor^i.

    No published method but the control for HiCache, whose slope is 2 sigma^2 times Taylor's: the default factor has the
    slope of `Hermite` with its default sigma.
    """

    kind: ClassVar[str] = "damped"
    order: int = 1
    factor: float = 0.5

    def __post_init__(self) -> None:
        check_order("order", self.order, 1, 4)
        check_positive("factor", self.factor)

    @property
    def slots(self) -> int:
        return self.order + 1

    def row(self, positions: Sequence[Number], step: Number, measured: Mapping[str, Number]) -> Row:
        return expansion(powers(self.factor * (step - positions[0]), len(positions)), positions)


@dataclass(frozen=True)
class Hermite(RowForecast):
    """HiCache: Taylor's sum with scaled Hermite polynomials for the powers, sum_i d_i H~_i(x) / i!.

    H~_i(x) = sigma^i H_i(sigma x), H_i the physicists' Hermite polynomials: H~_0 = 1, H~_1 = 2 sigma^2 x,
    H~_{i+1} = 2 sigma^2 (x H~_i - i H~_{i-1}). x is positive ahead, as the differences are.
    Feng et al., 2025, arXiv 2508.16984. Defaults there: order 2, sigma 0.5 (0.3 for FLUX.1-schnell).
    """

    kind: ClassVar[str] = "hermite"
    order: int = 2
    sigma: float = 0.5

    def __post_init__(self) -> None:
        check_order("order", self.order, 1, 4)
        check_positive("sigma", self.sigma)
        if self.sigma > 1:
            raise ScheduleError(f"sigma must be at most 1, not {self.sigma!r}: it shrinks the steps ahead")

    @property
    def slots(self) -> int:
        return self.order + 1

    def row(self, positions: Sequence[Number], step: Number, measured: Mapping[str, Number]) -> Row:
        x, twice = step - positions[0], 2 * self.sigma**2
        basis: list[Number] = [1.0, twice * x]
        for i in range(1, len(positions) - 1):
            basis.append(twice * (x * basis[i] - i * basis[i - 1]))
        return expansion(basis[: len(positions)], positions)


def recursive_differences(positions: Sequence[Number]) -> list[Row]:
    """d_0, d_1, ... as TaylorSeer updates them at a refreshed step: d_0 = F; d_{i+1} = (d_i - d_i before) / interval.

    The interval is the last one, whatever the order; over an interval of 0 the difference counts as 0.
    """
    inverse = [divide(1.0, newer - older) for newer, older in pairwise(positions)]
    level = [unit(index, len(positions)) for index in range(len(positions))]  # d_i at each refreshed step
    newest = [level[0]]
    while len(level) > 1:
        level = [combined((h, -h), rows) for h, rows in zip(inverse, pairwise(level), strict=False)]
        newest.append(level[0])
    return newest


def powers(x: Number, count: int) -> list[Number]:
    """1, x, x^2, ..."""
    return reduce(lambda found, _: [*found, found[-1] * x], range(count - 1), [1.0])


def expansion(basis: Sequence[Number], positions: Sequence[Number]) -> Row:
    """sum_i d_i basis[i] / i!, with TaylorSeer's d_i."""
    factors = [value / math.factorial(i) for i, value in enumerate(basis)]
    return combined(factors, recursive_differences(positions))
