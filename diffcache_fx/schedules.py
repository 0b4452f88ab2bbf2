"""One factory for each published static method, plus `always`, `interval`, `mask` and the default.

from diffcache_fx import schedules
schedules.interval(3)
schedules.list()
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .errors import ScheduleError, nearest
from .forecasts import Forecast, Hold, Linear
from .guards import Always, Interval, Mask
from .schedule import CacheSchedule, Rule
from .selection import Blocks, Count, Scale, Selection, Sublayers, Trunk


def always() -> CacheSchedule:
    """Refresh everything at every step: the uncached model through the same machinery, for comparisons."""
    return CacheSchedule(name="always", rules=(Rule(guard=Always(), storage="value"),))


def default() -> CacheSchedule:
    """The schedule `compile_with_cache` takes when none is given.

    The trunk but its first block (a U-Net: its outermost scale) is computed at every second step, after three warm-up
    steps, and continued in a straight line in between.
    """
    return CacheSchedule(name="default", rules=(Rule(Trunk(first=1), Interval(every=2), Linear(), "auto"),), warm_up=3)


def interval(
    every: int = 2,
    *,
    regions: Selection | None = None,
    forecast: Forecast | None = None,
    storage: str = "auto",
    warm_up: int = 1,
    cool_down: int = 0,
    longest_reuse: int | None = None,
) -> CacheSchedule:
    """Refresh every `every`-th step. regions: the trunk by default; forecast: hold by default."""
    rule = Rule(regions or Trunk(), Interval(every=every), forecast or Hold(), storage)
    return CacheSchedule("interval", (rule,), warm_up, cool_down, longest_reuse)


def mask(
    bits: Sequence[Any],
    *,
    regions: Selection | None = None,
    forecast: Forecast | None = None,
    storage: str = "auto",
    warm_up: int = 1,
) -> CacheSchedule:
    """An explicit plan: `bits[step]` is 1 to refresh and 0 to reuse, or a row of them with one for each region."""
    rows = tuple(tuple(row) if isinstance(row, (tuple, builtins.list)) else (row,) for row in bits)
    return CacheSchedule("mask", (Rule(regions or Trunk(), Mask(rows), forecast or Hold(), storage),), warm_up)


def deep_cache(interval: int = 3, branch: int = 0) -> CacheSchedule:
    """DeepCache (Ma, Fang, Wang, CVPR 2024): of a U-Net, what lies deeper than skip connection `branch` is computed
    every `interval`-th step and held in between. Defaults: interval 3, branch 0, as in the authors' repository."""
    return CacheSchedule("deep_cache", (Rule(Scale(branch), Interval(every=interval), Hold(), "value"),))


def fora(interval: int = 3) -> CacheSchedule:
    """FORA (Selvaraju et al., 2024): every attention and every feed-forward output is computed every `interval`-th step
    and held in between. Default interval 3."""
    return CacheSchedule("fora", (Rule(Sublayers(), Interval(every=interval), Hold(), "value"),))


def delta_dit(interval: int = 3, gate: Count = 0.5, share: float = 0.5) -> CacheSchedule:
    """Delta-DiT (Chen et al., 2024): the residual of a range of blocks is held: of the rear blocks in the early steps,
    which draw the outline, of the front blocks in the later ones, which draw the detail.

    interval: refresh every so many steps (default 3). gate: step, or fraction of the run, where the roles change.
    share: fraction of the blocks that is cached at a time. The last two have no published default.
    """
    rear = Rule(Blocks(first=1.0 - share), Interval(every=interval, end=gate), Hold(), "residual")
    front = Rule(Blocks(first=0, last=1.0 - share), Interval(every=interval, begin=gate), Hold(), "residual")
    return CacheSchedule("delta_dit", (rear, front))


_FACTORIES: dict[str, Callable[..., CacheSchedule]] = {
    "always": always,
    "default": default,
    "deep_cache": deep_cache,
    "delta_dit": delta_dit,
    "fora": fora,
    "interval": interval,
    "mask": mask,
}


def list() -> builtins.list[str]:
    """The names of all factories; `get` makes one by name."""
    return sorted(_FACTORIES)


def get(name: str, **options: Any) -> CacheSchedule:
    """A schedule by its factory's name; options are the factory's own."""
    if name not in _FACTORIES:
        raise ScheduleError(f"no schedule is called {name!r}{nearest(name, _FACTORIES)}")
    try:
        return _FACTORIES[name](**options)
    except TypeError as error:
        raise ScheduleError(f"schedules.{name}: {error}") from error


def resolve(schedule: CacheSchedule | str | Path | None) -> CacheSchedule:
    """What a user may pass as a schedule: a CacheSchedule, a factory's name, the path of a saved one, or None."""
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
        return get(str(schedule))
    raise ScheduleError(f"a schedule is a CacheSchedule, a name or a path, not {schedule!r}")
