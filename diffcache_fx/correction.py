"""Corrections of reused values: the scale-shift adjustment of Block Caching, as data."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from .errors import ScheduleError


@dataclass(frozen=True)
class ScaleShift:
    """Each reused value x becomes scale * x + shift, with a scale and a shift for each step and channel.

    Block Caching (Wimbauer et al., CVPR 2024): what a cached block hands on is aligned with what it would compute.
    There both are a linear map of the timestep's embedding, which over a run's steps is a table, as here. Of what is
    stored as a residual, the residual is corrected. Channels are taken to lie in the second axis of values of four axes
    or more, in the last of others.

    steps: of a run; later ones take the last row. channels: of each corrected value, in the order of the rule's regions
    and of their cuts. data: float32, base64: for each value a table [steps, 2, channels], scale before shift. Without
    channels nothing is changed. `alignment` fits tables. Raises ScheduleError where the data do not fit.
    """

    kind: ClassVar[str] = "scale_shift"
    steps: int
    channels: tuple[int, ...] = ()
    data: str = ""

    def __post_init__(self) -> None:
        counts = (self.steps, *self.channels) if isinstance(self.channels, (tuple, list)) else (0,)
        if any(not isinstance(count, int) or isinstance(count, bool) or count < 1 for count in counts):
            raise ScheduleError(
                f"steps and channels of a scale-shift correction must be whole numbers from 1, not {self.steps!r} and "
                f"{self.channels!r}"
            )
        object.__setattr__(self, "channels", tuple(self.channels))
        expected = 2 * self.steps * sum(self.channels)
        found = self._values()
        if len(found) != expected or not np.isfinite(found).all():
            raise ScheduleError(
                f"the data of a scale-shift correction must be {expected} finite numbers (two for each of {self.steps} "
                f"steps and {sum(self.channels)} channels), and {len(found)} were read"
            )

    @classmethod
    def of(cls, tables: Sequence[Tensor]) -> ScaleShift:
        """From one table [steps, 2, channels] for each corrected value."""
        if not tables:
            raise ScheduleError("a scale-shift correction needs a table for each value it corrects")
        flat = np.concatenate([table.detach().cpu().to(torch.float32).numpy().ravel() for table in tables])
        data = base64.b64encode(flat.astype("<f4").tobytes()).decode()
        return cls(len(tables[0]), tuple(table.shape[2] for table in tables), data)

    def tables(self) -> tuple[Tensor, ...]:
        """One table [steps, 2, channels] float32 for each corrected value."""
        found, tables, start = self._values(), [], 0
        for count in self.channels:
            size = 2 * self.steps * count
            tables.append(torch.tensor(found[start : start + size]).reshape(self.steps, 2, count))
            start += size
        return tuple(tables)

    def _values(self) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        try:
            return np.frombuffer(base64.b64decode(self.data, validate=True), dtype="<f4")
        except (binascii.Error, TypeError, ValueError) as error:
            raise ScheduleError(f"the data of a scale-shift correction are not base64 of float32: {error}") from error


CORRECTIONS: tuple[type, ...] = (ScaleShift,)
