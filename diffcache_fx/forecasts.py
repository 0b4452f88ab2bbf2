"""Forecasts: rows of weights over the history of refreshed values.

`weights(positions, step)` gets the positions of the refreshed values, newest first, on the step axis, and returns one
weight for each. The compiled programs take the row as an input, so changing the forecast compiles nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Hold:
    """The last refreshed value as it is."""

    kind: ClassVar[str] = "hold"
    slots: ClassVar[int] = 1

    def weights(self, positions: Sequence[float], step: float) -> tuple[float, ...]:
        return (1.0,) + (0.0,) * (len(positions) - 1)


@dataclass(frozen=True)
class Linear:
    """The straight line through the last two refreshed values: (1 + r, -r) with r = steps ahead / steps between.

    With one value so far, or two at the same position, it holds.
    """

    kind: ClassVar[str] = "linear"
    slots: ClassVar[int] = 2

    def weights(self, positions: Sequence[float], step: float) -> tuple[float, ...]:
        if len(positions) < 2 or positions[0] == positions[1]:
            return (1.0,) + (0.0,) * (len(positions) - 1)
        ahead = (step - positions[0]) / (positions[0] - positions[1])
        return (1.0 + ahead, -ahead) + (0.0,) * (len(positions) - 2)


Forecast = Hold | Linear
FORECASTS: tuple[type, ...] = (Hold, Linear)
