"""Guards: the rule that decides, for a step, which regions are refreshed and which are reused.

The static ones here know every decision ahead. Bits mean refresh (True) or reuse (False).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .errors import ScheduleError
from .selection import Count, absolute, check_count


@dataclass(frozen=True)
class Always:
    """Refresh at every step: the uncached model, through the same machinery."""

    kind: ClassVar[str] = "always"

    def needs_num_steps(self) -> bool:
        return False

    def refresh(self, step: int, num_steps: int | None, region: int, warm_up: int) -> bool:
        """Whether region number `region` of the rule is refreshed at `step` (from 0)."""
        return True


@dataclass(frozen=True)
class Interval:
    """Refresh every `every`-th step, counted from the last warm-up step; reuse in between.

    begin, end: the steps (or fractions of the run) between which reuse is allowed at all; outside, always refresh.
    """

    kind: ClassVar[str] = "interval"
    every: int = 2
    begin: Count = 0
    end: Count | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.every, int) or isinstance(self.every, bool) or self.every < 1:
            raise ScheduleError(
                f"every must be a whole number of steps from 1 (1 = refresh at every step), not {self.every!r}"
            )
        check_count(self.begin, "begin")
        if self.end is not None:
            check_count(self.end, "end")

    def needs_num_steps(self) -> bool:
        return isinstance(self.begin, float) or isinstance(self.end, float)

    def refresh(self, step: int, num_steps: int | None, region: int, warm_up: int) -> bool:
        total = num_steps or 0
        begin = absolute(self.begin, total)
        if step < begin or (self.end is not None and step >= absolute(self.end, total)):
            return True
        anchor = max(warm_up - 1, begin, 0)
        return step <= anchor or (step - anchor) % self.every == 0


@dataclass(frozen=True)
class Mask:
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

    def needs_num_steps(self) -> bool:
        return False

    def refresh(self, step: int, num_steps: int | None, region: int, warm_up: int) -> bool:
        if step >= len(self.bits):
            return True
        row = self.bits[step]
        return row[region] if len(row) > 1 else row[0]


Guard = Always | Interval | Mask
GUARDS: tuple[type, ...] = (Always, Interval, Mask)
