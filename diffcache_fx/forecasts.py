"""Forecasts: rows of weights over the history of refreshed values.

`weights(positions, step)` gets the positions of the refreshed values, newest first, on the step axis, and returns one
weight for each. The compiled programs take the row as an input, so changing the forecast compiles nothing. The same
code computes the row inside a graph, where positions and step are 0-d tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from .arithmetic import Number, clip, divide
from .errors import ScheduleError
from .expansions import Damped, Hermite, Taylor
from .interpolants import Barycentric, FoCa, Lagrange, Newton
from .rows import Row, RowForecast, check_finite, check_order, unit


@dataclass(frozen=True)
class Hold(RowForecast):
    """The last refreshed value as it is."""

    kind: ClassVar[str] = "hold"
    slots: ClassVar[int] = 1

    def row(self, positions: Sequence[Number], step: Number, measured: Mapping[str, Number]) -> Row:
        return (1.0,)


@dataclass(frozen=True)
class Linear(RowForecast):
    """The straight line through the last two refreshed values: (1 + r, -r) with r = steps ahead / steps between.

    With one value so far, or two at the same position, it holds.
    """

    kind: ClassVar[str] = "linear"
    slots: ClassVar[int] = 2

    def row(self, positions: Sequence[Number], step: Number, measured: Mapping[str, Number]) -> Row:
        if len(positions) < 2:
            return (1.0,)
        ahead = divide(step - positions[0], positions[0] - positions[1])
        return 1.0 + ahead, -ahead


@dataclass(frozen=True)
class Extrapolate(RowForecast):
    """F_0 + weight (F_0 - F_1), however far ahead; with one value so far, F_0.

    FasterCache's attention outputs (Lv et al., ICLR 2025, arXiv 2410.19355; there the weight grows from 0 to 1 over the
    run, in diffusers it is 0.5, the default here). GOC with 1.2 (ICCV 2025, arXiv 2503.05156; there not at the steps
    listed as points of inflection).
    """

    kind: ClassVar[str] = "extrapolate"
    slots: ClassVar[int] = 2
    weight: float = 0.5

    def __post_init__(self) -> None:
        check_finite("weight", self.weight)

    def row(self, positions: Sequence[Number], step: Number, measured: Mapping[str, Number]) -> Row:
        return (1.0 + self.weight, -self.weight) if len(positions) > 1 else (1.0,)


@dataclass(frozen=True)
class Binomial(RowForecast):
    """AB-Cache: the k-th backward difference is taken to be 0, however far ahead; k = 3: 3 F_0 - 3 F_1 + F_2.

    Yu et al., 2025, arXiv 2504.10540 (Adams-Bashforth). order: k; with fewer values, as many as there are. Defaults
    there: a refresh every 6th step; the authors' code also has 2 F_0 - F_1 and k = 5.
    """

    kind: ClassVar[str] = "binomial"
    order: int = 3

    def __post_init__(self) -> None:
        check_order("order", self.order, 1, 5)

    @property
    def slots(self) -> int:
        return self.order

    def row(self, positions: Sequence[Number], step: Number, measured: Mapping[str, Number]) -> Row:
        k = len(positions)
        return tuple(float((-1) ** j * math.comb(k, j + 1)) for j in range(k))


@dataclass(frozen=True)
class ProbeRatio(RowForecast):
    """DiCache: F_1 + gamma (F_0 - F_1), with gamma how far the first blocks' residual has moved since F_1.

    gamma = |p - p_1| / |p_0 - p_1|, held between low and high; p is the probe's residual now, p_0 and p_1 are those at
    the refreshes of F_0 and F_1. The guard measures it, as "ratio". With one value so far the forecast holds.
    Bu et al., 2025, arXiv 2508.17356. Defaults there: 1 and 1.5.

    Raises ScheduleError where the ratio was not measured.
    """

    kind: ClassVar[str] = "probe_ratio"
    slots: ClassVar[int] = 2
    wants: ClassVar[tuple[str, ...]] = ("ratio",)
    low: float = 1.0
    high: float = 1.5

    def __post_init__(self) -> None:
        check_finite("low", self.low)
        check_finite("high", self.high)
        if self.low > self.high:
            raise ScheduleError(f"low must not be above high, and {self.low!r} is above {self.high!r}")

    def row(self, positions: Sequence[Number], step: Number, measured: Mapping[str, Number]) -> Row:
        if len(positions) < 2:
            return (1.0,)
        if "ratio" not in measured:
            raise ScheduleError(
                "the forecast 'probe_ratio' needs a guard with a probe: nothing measures its ratio. Use it with "
                "ProbeChange, or take another forecast"
            )
        gamma = clip(measured["ratio"], self.low, self.high)
        return gamma, 1.0 - gamma


@dataclass(frozen=True)
class Rows(RowForecast):
    """Rows given from outside: table[step] are the weights at that step, newest refreshed value first.

    For calibrated and learned forecasts, such as L2P (Shen et al., CVPR 2026, arXiv 2604.26365; there the weights also
    go to earlier forecasts, which are rows over refreshed values themselves, so that they fold into rows like these).
    Where fewer values have been refreshed than the row has weights, the newest is held. Host decisions only.

    Raises ScheduleError for a step beyond the table, and inside a graph.
    """

    kind: ClassVar[str] = "rows"
    in_graph: ClassVar[bool] = False
    table: tuple[tuple[float, ...], ...] = ()

    def __post_init__(self) -> None:
        table = []
        for row in self.table if isinstance(self.table, (tuple, list)) else ():
            if not isinstance(row, (tuple, list)) or not row:
                raise ScheduleError(f"each row must list the weights of one step, newest value first, not {row!r}")
            for weight in row:
                check_finite("a weight", weight)
            table.append(tuple(float(weight) for weight in row))
        if not table:
            raise ScheduleError("table must hold one row of weights for each step")
        object.__setattr__(self, "table", tuple(table))

    @property
    def slots(self) -> int:
        return max(len(row) for row in self.table)

    def row(self, positions: Sequence[Number], step: Number, measured: Mapping[str, Number]) -> Row:
        if isinstance(step, torch.Tensor):
            raise ScheduleError("rows given by step need decisions taken on the host: use decide='host'")
        if not 0 <= step < len(self.table) or step != int(step):
            raise ScheduleError(f"no row for step {step:g}: the table has {len(self.table)}, for steps from 0")
        weights = self.table[int(step)]
        if len(positions) < len(weights):
            return unit(0, len(positions))
        return weights + (0.0,) * (len(positions) - len(weights))


Forecast = (
    Hold
    | Linear
    | Taylor
    | Newton
    | Lagrange
    | Hermite
    | Damped
    | FoCa
    | Binomial
    | Barycentric
    | Extrapolate
    | ProbeRatio
    | Rows
)
FORECASTS: tuple[type, ...] = (
    Hold,
    Linear,
    Taylor,
    Newton,
    Lagrange,
    Hermite,
    Damped,
    FoCa,
    Binomial,
    Barycentric,
    Extrapolate,
    ProbeRatio,
    Rows,
)

__all__ = [
    "FORECASTS",
    "Barycentric",
    "Binomial",
    "Damped",
    "Extrapolate",
    "FoCa",
    "Forecast",
    "Hermite",
    "Hold",
    "Lagrange",
    "Linear",
    "Newton",
    "ProbeRatio",
    "Rows",
    "Taylor",
]
