"""A cached denoiser whose schedule can be exchanged for one of the same structure: what is captured and compiled stays.
For tuning a threshold, and for trying plans."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Hashable

from .adaptive import ADAPTIVE
from .denoiser import CachedDenoiser
from .errors import ScheduleError
from .guards import Mask
from .schedule import CacheSchedule

# What of a guard is data at run time, and no part of the program.
_NUMBERS = frozenset({"threshold", "decay", "floor", "least", "coefficients"})


def structure(schedule: CacheSchedule) -> Hashable:
    """What programs depend on, but for how many values are kept: regions, storage, corrections, what is measured."""
    rules = []
    for rule in schedule.rules:
        guard: Hashable = isinstance(rule.guard, Mask) and len(rule.guard.bits[0]) > 1
        if isinstance(rule.guard, ADAPTIVE):
            names = [entry.name for entry in dataclasses.fields(rule.guard) if entry.name not in _NUMBERS]
            guard = type(rule.guard).__name__, tuple((name, getattr(rule.guard, name)) for name in names)
        rules.append((rule.regions, rule.storage, rule.share, rule.correction, guard))
    return tuple(rules), schedule.memory_cap, schedule.branch and schedule.branch.radius


class ExchangeableDenoiser(CachedDenoiser):
    """Made like a CachedDenoiser, for decisions that are taken on the host or known ahead."""

    def exchange(self, schedule: CacheSchedule) -> None:
        """Follow another schedule, from the next generation on, in all threads. Raises ScheduleError where its programs
        would be others or it does not fit the run, and CalibrationError where it was made for another."""
        own = self._own
        built = own.setdefault("built", own["schedule"])
        deeper = any(
            new.forecast.slots > old.forecast.slots for new, old in zip(schedule.rules, built.rules, strict=False)
        )
        inside = own["options"].decide == "graph" and bool(schedule.adaptive)
        if deeper or inside or structure(schedule) != structure(built):
            raise ScheduleError(
                f"the schedule {schedule.name!r} needs other programs than {built.name!r}: it caches or measures "
                "something else, looks back further, or is part of the graph; compile the model with it"
            )
        own["signatures"].check(schedule)
        own["schedule"] = schedule
        own["signatures"].exchange(schedule)
        own["local"] = threading.local()


__all__ = ["ExchangeableDenoiser", "structure"]
