"""Static guards: the rule that decides, for a step, which regions are refreshed and which are reused, known ahead.

Bits mean refresh (True) or reuse (False). Guards that measure something are in `adaptive`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

from .adaptive import ADAPTIVE, AdaptiveGuard
from .errors import ScheduleError
from .judgement import as_numbers, check_threshold
from .selection import Count, absolute, check_count


class Static:
    """What static guards share."""

    kind: ClassVar[str]
    adaptive: ClassVar[bool] = False

    @property
    def timesteps(self) -> tuple[float, float] | None:
        """Timesteps between which reuse is allowed at all, both excluded; None for all of them."""
        return None

    def needs_num_steps(self) -> bool:
        """Whether a decision depends on how many steps the run has."""
        return False

    def refresh(self, step: int, num_steps: int | None, region: int, warm_up: int) -> bool:
        """Whether region number `region` of the rule is refreshed at `step` (from 0), the window aside."""
        raise NotImplementedError


@dataclass(frozen=True)
class Always(Static):
    """Refresh at every step: the uncached model, through the same machinery."""

    kind: ClassVar[str] = "always"

    def refresh(self, step: int, num_steps: int | None, region: int, warm_up: int) -> bool:
        return True


@dataclass(frozen=True)
class Interval(Static):
    """Refresh every `every`-th step, counted from the last warm-up step; reuse in between.

    begin, end: the steps (or fractions of the run) between which reuse is allowed at all; outside, always refresh.
    window: the same for timesteps, (low, high), both excluded. anchor: the step to count from, where it is another.
    """

    kind: ClassVar[str] = "interval"
    every: int = 2
    begin: Count = 0
    end: Count | None = None
    window: tuple[float, float] | None = None
    anchor: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.every, int) or isinstance(self.every, bool) or self.every < 1:
            raise ScheduleError(
                f"every must be a whole number of steps from 1 (1 = refresh at every step), not {self.every!r}"
            )
        check_count(self.begin, "begin")
        if self.end is not None:
            check_count(self.end, "end")
        object.__setattr__(self, "window", check_window(self.window))
        if self.anchor is not None:
            check_count(self.anchor, "anchor")

    @property
    def timesteps(self) -> tuple[float, float] | None:
        return self.window

    def needs_num_steps(self) -> bool:
        return isinstance(self.begin, float) or isinstance(self.end, float)

    def refresh(self, step: int, num_steps: int | None, region: int, warm_up: int) -> bool:
        total = num_steps or 0
        begin = absolute(self.begin, total)
        if step < begin or (self.end is not None and step >= absolute(self.end, total)):
            return True
        anchor = max(warm_up - 1, begin, 0) if self.anchor is None else self.anchor
        return step <= anchor or (step - anchor) % self.every == 0


@dataclass(frozen=True)
class Steps(Static):
    """Refresh at the listed steps only: non-uniform schedules such as DeepCache's and Faster Diffusion's.

    only: the steps (from 0) that refresh; step 0 always does. Steps past the last one listed reuse.
    """

    kind: ClassVar[str] = "steps"
    only: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        steps = tuple(self.only) if isinstance(self.only, (tuple, list, set, range)) else ()
        if not steps or any(not isinstance(step, int) or isinstance(step, bool) or step < 0 for step in steps):
            raise ScheduleError(f"only must list the steps that refresh, whole numbers from 0, not {self.only!r}")
        object.__setattr__(self, "only", tuple(sorted(set(steps))))

    def refresh(self, step: int, num_steps: int | None, region: int, warm_up: int) -> bool:
        return step in self.only


@dataclass(frozen=True)
class Mask(Static):
    """An explicit plan: bits[step] is 1 to refresh, 0 to reuse, or a row with one bit for each region.

    Steps and regions must match the run: a mask of another length is refused, never stretched.
    """

    kind: ClassVar[str] = "mask"
    bits: tuple[tuple[bool, ...], ...] = ()

    def __post_init__(self) -> None:
        rows: list[tuple[bool, ...]] = []
        for row in self.bits:
            entries = row if isinstance(row, (tuple, list)) else (row,)
            if not entries or any(entry not in (0, 1) for entry in entries):
                raise ScheduleError(f"a mask holds 1 (refresh) and 0 (reuse), or rows of them, not {row!r}")
            rows.append(tuple(bool(entry) for entry in entries))
        if not rows:
            raise ScheduleError("a mask needs one entry for each step")
        if len({len(row) for row in rows}) > 1:
            raise ScheduleError("the rows of a mask must all have one bit for each region")
        if not any(any(row) for row in rows):
            raise ScheduleError(
                "this mask never refreshes: nothing would ever be computed. Set at least its first step"
            )
        object.__setattr__(self, "bits", tuple(rows))

    def refresh(self, step: int, num_steps: int | None, region: int, warm_up: int) -> bool:
        if step >= len(self.bits):
            return True
        row = self.bits[step]
        return row[region] if len(row) > 1 else row[0]


@dataclass(frozen=True)
class Magnitude(Static):
    """MagCache (Ma et al., 2025): the ratio of the residual's magnitude between neighbouring steps, measured once,
    tells how far a reused residual has drifted, so every decision is known ahead.

    ratios: mean |r_t| / |r_{t-1}| by step, of a calibration run; stretched to other step counts by nearest neighbour.
    With R the product of the ratios since the last refresh, |1 - R| is added up while reusing; reuse while the sum is
    at most the threshold and at most `longest` steps in a row. retention: share of the run at its start that always
    refreshes. never: steps of the calibration run that are never reused.
    """

    kind: ClassVar[str] = "magnitude"
    ratios: tuple[float, ...] = ()
    threshold: float = 0.06
    longest: int = 3
    retention: float = 0.2
    never: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_threshold(self.threshold)
        ratios = as_numbers(self.ratios) or ()
        if len(ratios) < 2 or not all(math.isfinite(r) and r > 0 for r in ratios):
            raise ScheduleError(
                "ratios must list the magnitude ratio of each step of a calibration run, positive numbers, "
                f"not {self.ratios!r}"
            )
        if not isinstance(self.longest, int) or isinstance(self.longest, bool) or self.longest < 1:
            raise ScheduleError(f"longest must be a whole number of steps from 1, not {self.longest!r}")
        if as_numbers([self.retention]) is None or not 0.0 <= self.retention < 1.0:
            raise ScheduleError(f"retention must be a share of the run from 0 to below 1, not {self.retention!r}")
        if not isinstance(self.never, (tuple, list)) or not all(isinstance(step, int) for step in self.never):
            raise ScheduleError(f"never must list steps of the calibration run, not {self.never!r}")
        object.__setattr__(self, "ratios", ratios)
        object.__setattr__(self, "never", tuple(self.never))

    def needs_num_steps(self) -> bool:
        return True

    def refresh(self, step: int, num_steps: int | None, region: int, warm_up: int) -> bool:
        bits = _magnitude_bits(self, num_steps or 0)
        return step >= len(bits) or bits[step]


@lru_cache(maxsize=64)
def _magnitude_bits(guard: Magnitude, num_steps: int) -> tuple[bool, ...]:
    place = nearest_places(len(guard.ratios), num_steps)
    bits, error, product, run = [], 0.0, 1.0, 0
    for step in range(num_steps):
        refresh = True
        if step >= max(int(guard.retention * num_steps + 0.5), 1) and guard.threshold > 0:
            product *= guard.ratios[place[step]]
            error += abs(1.0 - product)
            run += 1
            refresh = error > guard.threshold or run > guard.longest or place[step] in guard.never
        if refresh:
            error, product, run = 0.0, 1.0, 0
        bits.append(refresh)
    return tuple(bits)


def nearest_places(known: int, wanted: int) -> list[int]:
    """For each of `wanted` evenly spread steps the nearest of `known` ones."""
    if wanted <= 1:
        return [known - 1] * wanted
    return [round(step * (known - 1) / (wanted - 1)) for step in range(wanted)]


def check_window(window: Sequence[float] | None) -> tuple[float, float] | None:
    """A pair of timesteps (low, high), or None."""
    if window is None:
        return None
    pair = as_numbers(window)
    if pair is None or len(pair) != 2 or not pair[0] < pair[1]:
        raise ScheduleError(f"window must be two timesteps (low, high), not {window!r}")
    return pair[0], pair[1]


StaticGuard = Always | Interval | Steps | Mask | Magnitude
Guard = StaticGuard | AdaptiveGuard
GUARDS: tuple[type, ...] = (Always, Interval, Steps, Mask, Magnitude, *ADAPTIVE)
