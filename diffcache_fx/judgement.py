"""What an adaptive guard is: a signal measured in the graph decides, step by step, whether to refresh.

A guard says which reference quantities it looks at (`references`), which of them it keeps from earlier steps (`kept`),
what it measures from them (`before` the decision, `after` the step; torch code, traced into the step program), and how
the decision follows from the measured numbers (`decide`, `settle`). The last two are written once for both places a
decision is taken in: they run on Python floats on the host, and on 0-d tensors inside the graph.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from .arithmetic import Number, divide
from .errors import ScheduleError
from .references import Reference

Tensors = Mapping[str, torch.Tensor]
Numbers = Mapping[str, Number]


@dataclass(frozen=True)
class Kept:
    """What is kept of a reference quantity: that of the last step (when="step"), or of the last refreshed step (when=
    "refresh"); with `of` naming another kept quantity, what that one was before it was replaced."""

    of: str
    when: str = "refresh"


@dataclass(frozen=True)
class Judgement:
    """refresh: bool, or a bool scalar in the graph. signal: what was compared with `limit`. memory: the numbers that
    the guard carries to the next step."""

    refresh: Number | bool
    signal: Number
    limit: Number
    memory: dict[str, Number]


def mean_abs(value: torch.Tensor) -> torch.Tensor:
    """Mean absolute value, float32 scalar."""
    return value.float().abs().mean()


def distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference, float32 scalar."""
    return mean_abs(a.float() - b.float())


def relative_l1(now: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """mean |now - before| / mean |before|, float32 scalar; 0 where `before` is all zero."""
    return divide(distance(now, before), mean_abs(before))  # type: ignore[return-value]


def polynomial(coefficients: Sequence[float], x: Number) -> Number:
    """Highest power first, by Horner's rule; without coefficients, x itself."""
    if not coefficients:
        return x
    total: Number = coefficients[0]
    for coefficient in coefficients[1:]:
        total = total * x + coefficient
    return total


def as_numbers(values: object) -> tuple[float, ...] | None:
    """A list of plain numbers as floats; None for anything else."""
    if not isinstance(values, (tuple, list)):
        return None
    if not all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values):
        return None
    return tuple(float(value) for value in values)


def check_threshold(value: float, what: str = "threshold") -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not value >= 0 or math.isinf(value):
        raise ScheduleError(f"{what} must be a finite number from 0 (0 = never reuse), not {value!r}")


class Adaptive:
    """What adaptive guards share: nothing is decided ahead, and by default nothing is measured after the step."""

    kind: ClassVar[str]
    adaptive: ClassVar[bool] = True
    timesteps: ClassVar[None] = None
    offers: ClassVar[tuple[str, ...]] = ()  # what it measures for forecasts that want it
    threshold: float

    @property
    def references(self) -> dict[str, Reference]:
        raise NotImplementedError

    @property
    def kept(self) -> dict[str, Kept]:
        return {}

    @property
    def carried(self) -> tuple[str, ...]:
        """Numbers that go from step to step, 0 at the start of a generation."""
        return ()

    @property
    def checks(self) -> bool:
        """Whether the reuse program also computes the regions anew, to compare them with their forecast."""
        return False

    def before(self, now: Tensors, kept: Tensors) -> dict[str, torch.Tensor]:
        """Signals, 0-d float32, from the reference quantities of this step and the kept ones."""
        return {}

    def after(self, now: Tensors, kept: Tensors) -> dict[str, torch.Tensor]:
        """Signals that need what the step returned."""
        return {}

    def decide(self, measured: Numbers, memory: Numbers, force: Number | bool, moment: Sequence[Number]) -> Judgement:
        """measured: what `before` returned. memory: the carried numbers, and "refreshes" (so far). force: refresh in
        any case. moment: number of the step, share of the run that it completes."""
        raise NotImplementedError

    def settle(self, measured: Numbers, memory: dict[str, Number], refreshed: Number | bool) -> dict[str, Number]:
        """The carried numbers after the step. measured: what `after` returned, and "error" where `checks`."""
        return memory

    def needs_num_steps(self) -> bool:
        return False

    def refresh(self, step: int, num_steps: int | None, region: int, warm_up: int) -> bool:
        """Nothing is known ahead: every step after warm-up may be reused."""
        return False
