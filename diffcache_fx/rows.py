"""Rows of weights over the refreshed values, newest first: what forecasts return.

A row stands for the linear combination it weighs, so differences of values are differences of rows. All of it runs on
Python floats and on 0-d tensors; weights known to be zero stay Python zeros and add nothing to a graph.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import reduce
from operator import add
from types import MappingProxyType
from typing import Any, ClassVar

from .arithmetic import Number
from .errors import ScheduleError

Row = tuple[Number, ...]
NOTHING: Mapping[str, Number] = MappingProxyType({})


class RowForecast:
    """What every forecast shares.

    kind: its name in saved schedules. slots: how many refreshed values it looks at. wants: numbers that the guard must
    measure for it. in_graph: its row can also be computed inside a graph.
    """

    kind: ClassVar[str]
    wants: ClassVar[tuple[str, ...]] = ()
    in_graph: ClassVar[bool] = True

    @property
    def slots(self) -> int:
        raise NotImplementedError

    def weights(self, positions: Sequence[Number], step: Number, measured: Mapping[str, Number] = NOTHING) -> Row:
        """One weight for each refreshed value, newest first.

        positions: where the values were refreshed on the step axis, newest first; at least one, in any spacing,
        repeated ones included. With fewer than `slots` the forecast is of the lower order that they allow; those beyond
        `slots` get weight 0. step: where the forecast is wanted. measured: numbers by name, see `wants`.
        Weights are Python floats where no tensor enters them.
        """
        used = tuple(positions[: self.slots])
        return self.row(used, step, measured) + (0.0,) * (len(positions) - len(used))

    def row(self, positions: Sequence[Number], step: Number, measured: Mapping[str, Number]) -> Row:
        """The weights, for at most `slots` positions."""
        raise NotImplementedError


def unit(index: int, count: int) -> Row:
    """The row of one refreshed value, 0 the newest, out of `count`."""
    return tuple(float(index == other) for other in range(count))


def combined(factors: Sequence[Number], rows: Sequence[Row]) -> Row:
    """sum_i factors[i] * rows[i]."""

    def column(weights: tuple[Number, ...]) -> Number:
        terms = [f * w for f, w in zip(factors, weights, strict=True) if not (_is_zero(f) or _is_zero(w))]
        return reduce(add, terms) if terms else 0.0

    return tuple(column(weights) for weights in zip(*rows, strict=True))


def _is_zero(value: Number) -> bool:
    return isinstance(value, (int, float)) and value == 0


def check_order(name: str, value: Any, least: int, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ScheduleError(f"{name} must be a whole number from {least} to {most}, not {value!r}")


def check_finite(name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value):
        raise ScheduleError(f"{name} must be a finite number, not {value!r}")


def check_positive(name: str, value: Any) -> None:
    check_finite(name, value)
    if value <= 0:
        raise ScheduleError(f"{name} must be above 0, not {value!r}")
