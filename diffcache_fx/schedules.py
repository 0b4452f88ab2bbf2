"""One factory for each published method, plus `always`, `interval`, `mask` and the default.

from diffcache_fx import schedules
schedules.first_block_cache(threshold=0.08)
schedules.list()
"""

from __future__ import annotations

import builtins
import inspect
from pathlib import Path
from typing import Any

from .errors import ScheduleError, nearest
from .presets.adaptive import db_cache, di_cache, easy_cache, first_block_cache, mag_cache, speca, tea_cache
from .presets.guidance import faster_cache
from .presets.methods import METHODS
from .presets.predictive import ab_cache, cheb_booster, foca, hi_cache, l2p, taylor_seer
from .presets.static import (
    always,
    block_cache,
    deep_cache,
    default,
    delta_dit,
    fora,
    interval,
    mask,
    pab,
    smooth_cache,
    t_gate,
)
from .schedule import CacheSchedule

_FACTORIES = {method.name: method.factory for method in METHODS}


def list() -> builtins.list[str]:
    """The names of all factories; `get` makes one by name."""
    return sorted(_FACTORIES)


def get(name: str, **options: Any) -> CacheSchedule:
    """A schedule by its factory's name; options are the factory's own."""
    if name not in _FACTORIES:
        raise ScheduleError(f"no schedule is called {name!r}{nearest(name, _FACTORIES)}")
    wanted = inspect.signature(_FACTORIES[name]).parameters.values()
    missing = [p.name for p in wanted if p.default is p.empty and p.kind is not p.VAR_KEYWORD and p.name not in options]
    if missing:
        raise ScheduleError(
            f"schedules.{name} has no default for {', '.join(missing)}, which is measured or planned for one model: "
            f"give it, as in schedules.{name}({', '.join(f'{option}=...' for option in missing)})"
        )
    try:
        return _FACTORIES[name](**options)
    except TypeError as error:
        raise ScheduleError(f"schedules.{name}: {error}") from error


def resolve(schedule: CacheSchedule | str | Path | None) -> CacheSchedule:
    """What a user may pass as a schedule: a CacheSchedule, a factory's name (with options as on the command line,
    "fora:interval=3"), the path of a saved one, or None."""
    if schedule is None:
        return default()
    if isinstance(schedule, CacheSchedule):
        return schedule
    if isinstance(schedule, str) and schedule in _FACTORIES:
        return get(schedule)
    if isinstance(schedule, (str, Path)):
        path = Path(schedule)
        if path.exists():
            return CacheSchedule.from_pretrained(path)
        if path.suffix == ".json" or len(path.parts) > 1:
            raise ScheduleError(f"no schedule file at {path}")
        if ":" in str(schedule):
            from .arguments import parse_schedule  # which reads the factories from here

            return parse_schedule(str(schedule))
        return get(str(schedule))
    raise ScheduleError(f"a schedule is a CacheSchedule, a name or a path, not {schedule!r}")


__all__ = [
    "ab_cache",
    "always",
    "block_cache",
    "cheb_booster",
    "db_cache",
    "deep_cache",
    "default",
    "delta_dit",
    "di_cache",
    "easy_cache",
    "faster_cache",
    "first_block_cache",
    "foca",
    "fora",
    "get",
    "hi_cache",
    "interval",
    "l2p",
    "list",
    "mag_cache",
    "mask",
    "pab",
    "resolve",
    "smooth_cache",
    "speca",
    "t_gate",
    "taylor_seer",
    "tea_cache",
]
