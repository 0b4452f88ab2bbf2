"""Trying plans: one cached denoiser, compiled once, that follows any plan for one group of regions."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from .compile import Options
from .denoiser import CachedDenoiser
from .forecasts import Binomial, Rows
from .guards import Interval, Mask
from .provenance import Provenance
from .schedule import CacheSchedule, Rule
from .selection import Selection

NAME = "calibrated"


class Trial(CachedDenoiser):
    """Follows the plan it was given last; plans and forecasts are data, and compile nothing."""

    def __init__(
        self,
        model: nn.Module,
        regions: Selection,
        storage: str,
        history: int,
        steps: int,
        backend: Any,
        backend_options: Mapping[str, Any],
    ) -> None:
        self_made = CacheSchedule(NAME, (Rule(regions, Interval(2), Binomial(history), storage),))
        options = Options(backend, steps, backend_options=backend_options)
        super().__init__(model, self_made, options)

    def follow(self, bits: Sequence[bool], rows: Sequence[Sequence[float]]) -> None:
        """From the next generation on, of all threads."""
        (rule,) = self._own["schedule"].rules
        self._own["schedule"] = planned(rule.regions, rule.storage, bits, rows)
        self._own["local"] = threading.local()


def planned(
    regions: Selection,
    storage: str,
    bits: Sequence[bool],
    rows: Sequence[Sequence[float]],
    made_for: Provenance | None = None,
) -> CacheSchedule:
    """A plan as a schedule: a bit and a row of weights for each step."""
    table = tuple(tuple(float(weight) for weight in row) for row in rows)
    rule = Rule(regions, Mask(tuple((bool(bit),) for bit in bits)), Rows(table), storage)
    return CacheSchedule(NAME, (rule,), made_for=made_for)
