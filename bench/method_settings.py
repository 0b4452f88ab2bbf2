"""The methods that `bench.methods` compares on the demo model, and the controls beside them.

A method's settings are points of one curve, from gentle to bold. Thresholds were chosen from the signals along the
model's own uncached trajectory, so that the points lie between about 1.5x and 5x fewer FLOPs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.method_calibration import Calibration
from diffcache_fx import CacheSchedule, Linear, RegionError, ScheduleError, schedules

NOT_APPLICABLE = (ScheduleError, RegionError)
Options = Mapping[str, Any] | Callable[[Calibration], Mapping[str, Any]]
Grid = Sequence[tuple[str, Options]]
EVEN = "hold at even intervals"
UNCACHED = "uncached"


@dataclass(frozen=True)
class Setting:
    """One point of one curve.

    factory: a name in `diffcache_fx.schedules`; None: the uncached model in `steps` steps. options: the factory's own,
    or a function that makes them from what was measured on the model. apart: guidance as two calls a step, for methods
    that reuse one branch for the other. reference: what all others are compared with. sampler: of `bench.samplers`;
    empty: the demo's own. given: a schedule that is made already, instead of a factory's. decide: as in
    `compile_with_cache`. guidance: the share that is kept of what the demo's guidance scale is above 1.
    """

    method: str
    label: str
    factory: str | None = None
    options: Options = field(default_factory=dict)
    steps: int | None = None
    apart: bool = False
    reference: bool = False
    sampler: str = ""
    given: CacheSchedule | None = None
    decide: str = "host"
    guidance: float = 1.0

    @property
    def key(self) -> str:
        """A name for files, unique among all settings."""
        return re.sub(r"[^a-z0-9.]+", "-", f"{self.method} {self.label}".lower()).strip("-")

    @property
    def control(self) -> bool:
        """Whether it is there for others to be compared with."""
        return (self.factory is None and self.given is None) or self.method == EVEN

    def schedule(self, calibration: Callable[[], Calibration]) -> CacheSchedule | None:
        """What to compile with; raises ScheduleError if the method cannot be had with these options."""
        if self.factory is None or self.given is not None:
            return self.given
        return schedules.get(self.factory, **self.arguments(calibration))

    def arguments(self, calibration: Callable[[], Calibration]) -> Mapping[str, Any]:
        """The options themselves."""
        return self.options(calibration()) if callable(self.options) else self.options


def uncached(steps: int, full: int) -> Setting:
    """The uncached model in so many steps: with all of them the reference, with fewer the first control."""
    return Setting(UNCACHED, f"{steps} steps", steps=steps, reference=steps == full)


def even_hold(refreshes: int, full: int) -> Setting:
    """The second control: the trunk computed at so many steps, spread evenly, and held in between."""
    wanted = {step * full // refreshes for step in range(refreshes)}
    bits = tuple(int(step in wanted) for step in range(full))
    return Setting(EVEN, f"{refreshes} of {full}", "mask", {"bits": bits})


def _curve(method: str, factory: str, grid: Grid) -> list[Setting]:
    return [Setting(method, label, factory, options) for label, options in grid]


def _grid(values: Sequence[float], name: str, **fixed: Any) -> Grid:
    """One option varied, others fixed."""
    return [(f"{name} {value:g}", {name: value, **fixed}) for value in values]


def _measured(grid: Sequence[float], name: str, options: Callable[[Calibration, float], Mapping[str, Any]]) -> Grid:
    """Settings whose options come from what was measured on the model."""
    return [(f"{name} {value:g}", lambda found, value=value: options(found, value)) for value in grid]


# The published tables of cache-dit, from slow to fast.
_DB = [
    ("F8, 0.08", {}),
    ("F4, 0.12", {"first": 4, "threshold": 0.12, "warm_up": 4, "longest_reuse": 4}),
    ("F1, 0.24", {"first": 1, "threshold": 0.24, "warm_up": 4, "longest_reuse": 6}),
    ("F1, 0.8", {"first": 1, "threshold": 0.8, "warm_up": 8, "longest_reuse": 8}),
]


def methods() -> list[Setting]:
    """All settings of the methods, whether or not this version of the library knows their factories."""
    every, linear = (2, 3, 4, 5), Linear()
    tea = _measured((0.06, 0.1, 0.14, 0.18), "threshold", _polynomial)
    mag = _measured((0.06, 0.12, 0.24, 0.4), "threshold", lambda found, t: {"threshold": t, "ratios": found.ratios})
    smooth = _measured((0.08, 0.18, 0.35), "alpha", lambda found, alpha: found.smooth_plan(alpha))
    block = _measured((0.1, 0.2, 0.3, 0.5), "delta", lambda found, delta: {"bits": found.block_plan(delta)})
    return [
        *_curve("interval, linear", "interval", _grid((2, 3, 4, 5, 7), "every", forecast=linear)),
        *_curve("fora", "fora", _grid(every, "interval")),
        *_curve("delta_dit", "delta_dit", _grid(every, "interval")),
        *_curve("pab", "pab", _grid(every, "interval", cross_interval=0)),
        *_curve("smooth_cache", "smooth_cache", smooth),
        *_curve("block_cache", "block_cache", block),
        *_curve("taylor_seer, order 1", "taylor_seer", _grid(every, "interval", order=1)),
        *_curve("taylor_seer, order 2", "taylor_seer", _grid(every, "interval", order=2)),
        *_curve("hi_cache", "hi_cache", _grid(every, "interval", order=2, sigma=0.5)),
        *_curve("foca", "foca", _grid(every, "interval")),
        *_curve("ab_cache", "ab_cache", _grid(every, "interval")),
        *_curve("cheb_booster", "cheb_booster", _grid(every, "interval", history=3)),
        *_curve("first_block_cache", "first_block_cache", _grid((0.08, 0.12, 0.16, 0.2), "threshold")),
        *_curve(
            "first_block_cache, linear",
            "first_block_cache",
            _grid((0.08, 0.12, 0.16, 0.2), "threshold", forecast=linear),
        ),
        *_curve("db_cache", "db_cache", _DB),
        *_curve("tea_cache", "tea_cache", tea),
        *_curve("mag_cache", "mag_cache", mag),
        *_curve("easy_cache", "easy_cache", _grid((0.05, 0.1, 0.15, 0.2), "threshold")),
        *_curve("di_cache", "di_cache", _grid((0.05, 0.07, 0.1, 0.12), "threshold")),
        *_curve("speca", "speca", _grid((0.1, 0.3, 1.0), "threshold")),
        Setting("faster_cache", "two calls per step", "faster_cache", apart=True),
        Setting("t_gate", "gate 10", "t_gate", {"halves": True}),
        Setting("deep_cache", "interval 3", "deep_cache"),
    ]


def _polynomial(found: Calibration, threshold: float) -> Mapping[str, Any]:
    return {"threshold": threshold, "coefficients": found.coefficients}


def known(wanted: Sequence[str] = ()) -> list[Setting]:
    """The settings whose factories exist; of these methods only, if any are named (by method or by factory).

    Raises ValueError for a name that is none of them.
    """
    have = set(schedules.list())
    found = [setting for setting in methods() if setting.factory in have]
    for name in wanted:
        if not any(name in (setting.method, setting.factory) for setting in found):
            names = ", ".join(dict.fromkeys(str(setting.factory) for setting in found))
            raise ValueError(f"no method is called {name!r}; there are {names}")
    return [s for s in found if not wanted or s.method in wanted or s.factory in wanted]


def even_grid(full: int) -> list[Setting]:
    """The second control as a curve of its own: every second to every seventh step."""
    return [even_hold(count, full) for count in dict.fromkeys(-(-full // every) for every in (2, 3, 4, 5, 7))]


def same_cost(ideal: float, reuse_share: float, full: int) -> list[Setting]:
    """Both controls at an ideal speed-up: fewer steps, and even holds at the nearest number of refreshes.

    reuse_share: FLOPs of a step that holds the trunk over those of a full one. None where they would be the reference.
    """
    steps = max(1, round(full / ideal))
    refreshes = max(1, round((full / ideal - full * reuse_share) / (1 - reuse_share)))
    return [
        *([uncached(steps, full)] if steps < full else []),
        *([even_hold(refreshes, full)] if refreshes < full else []),
    ]
