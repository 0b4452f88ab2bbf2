"""What a calibration is to reach."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import CalibrationError


def _positive(name: str, value: Any) -> None:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value) or value <= 0:
        raise CalibrationError(f"{name} must be a positive number, not {value!r}")


@dataclass(frozen=True)
class Speedup:
    """A generation `times` as fast as the uncached model compiled by the same backend, as measured."""

    times: float

    def __post_init__(self) -> None:
        _positive("times", self.times)
        if self.times < 1:
            raise CalibrationError(f"a speed-up is 1 or more, not {self.times!r}")

    def __str__(self) -> str:
        return f"{self.times:g} times as fast"


@dataclass(frozen=True)
class Latency:
    """A generation in `seconds`, as measured here."""

    seconds: float

    def __post_init__(self) -> None:
        _positive("seconds", self.seconds)

    def __str__(self) -> str:
        return f"{self.seconds:g} s a generation"


@dataclass(frozen=True)
class Psnr:
    """Final samples at least this near to the uncached ones, dB. data_range: 2 for images in [-1, 1]."""

    decibels: float
    data_range: float = 2.0

    def __post_init__(self) -> None:
        _positive("decibels", self.decibels)
        _positive("data_range", self.data_range)

    def __str__(self) -> str:
        return f"{self.decibels:g} dB to the uncached samples"

    @staticmethod
    def error(samples: Tensor, reference: Tensor) -> Tensor:
        """Of each sample, its mean square error."""
        return (samples.double() - reference.double()).flatten(1).square().mean(1)

    @property
    def largest(self) -> float:
        """The mean square error at which it is just met."""
        return float(self.data_range**2 / 10 ** (self.decibels / 10))


@dataclass(frozen=True)
class RelativeL1:
    """Final samples with mean |cached - uncached| at most `largest` times mean |uncached|."""

    largest: float

    def __post_init__(self) -> None:
        _positive("largest", self.largest)

    def __str__(self) -> str:
        return f"relative L1 error of {self.largest:g} at most"

    @staticmethod
    def error(samples: Tensor, reference: Tensor) -> Tensor:
        """Of each sample, its relative L1 error."""
        moved = (samples.double() - reference.double()).flatten(1).abs().mean(1)
        return moved / reference.double().flatten(1).abs().mean(1).clamp_min(torch.finfo(torch.float64).tiny)


Target = Speedup | Latency | Psnr | RelativeL1
TARGETS: tuple[type, ...] = (Speedup, Latency, Psnr, RelativeL1)


def in_decibels(mse: float, data_range: float) -> str:
    """A mean square error as PSNR, in words."""
    return f"{10 * math.log10(data_range**2 / mse):.1f} dB" if mse > 0 else "no error"


def check_target(target: Any) -> None:
    """Raises CalibrationError for what is no target."""
    if not isinstance(target, TARGETS):
        known = ", ".join(kind.__name__ for kind in TARGETS)
        raise CalibrationError(f"a target is one of {known}, not {target!r}: write Psnr(40.0), say")
