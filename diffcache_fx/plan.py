"""Plans: a schedule resolved to one refresh/reuse bit per step and region, and the programs that serve it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from .errors import ScheduleError
from .guards import Mask
from .program import Region
from .schedule import CacheSchedule, static_refresh

log = logging.getLogger(__name__)

# Where neither the caller nor a mask says how long a run is, rows are listed over this many steps.
HORIZON = 240
Reused = frozenset[str]


class Plan:
    """The decisions of a schedule's static guards for given regions, step by step, all limits applied.

    Regions of an adaptive guard, or of one with a window of timesteps, count as reused wherever nothing known ahead
    forbids it: at run time they may be refreshed more often.
    """

    def __init__(self, schedule: CacheSchedule, regions: Sequence[Region], num_steps: int | None = None) -> None:
        """num_steps: length of a generation in calls per context, if known.

        Raises ScheduleError where a mask does not fit the steps or the regions, where the number of steps is needed and
        not known, and where warm-up and cool-down leave nothing to reuse in a run of known length.
        """
        length = schedule.mask_length
        if length is not None and num_steps is not None and length != num_steps:
            raise ScheduleError(
                f"the mask covers {length} steps and the run has {num_steps}: give one entry for each step"
            )
        for index, rule in enumerate(schedule.rules):
            own = [region for region in regions if region.rule == index]
            if isinstance(rule.guard, Mask) and len(rule.guard.bits[0]) not in (1, len(own)):
                raise ScheduleError(
                    f"the mask has {len(rule.guard.bits[0])} bits in a row and the rule selects {len(own)} regions "
                    f"({', '.join(region.name for region in own[:4])}{', ...' if len(own) > 4 else ''}): give one bit, "
                    "or one for each region"
                )
        self.schedule = schedule
        self.regions = tuple(regions)
        self.num_steps = num_steps if num_steps is not None else length
        if schedule.needs_num_steps() and self.num_steps is None:
            raise ScheduleError(
                "this schedule depends on how many steps a run has (cool_down, or a fraction of the run): pass "
                "num_steps= to compile_with_cache, or num_inference_steps= to cache_context"
            )
        self._place: dict[str, int] = {}
        counts: Counter[int] = Counter()
        for region in regions:
            self._place[region.name] = counts[region.rule]
            counts[region.rule] += 1
        self._rows: list[Reused] = []
        self._runs = {region.name: 0 for region in regions}
        self._reuses = {region.name: 0 for region in regions}

    def reused(self, step: int) -> Reused:
        """The regions the plan reuses at a step (from 0)."""
        while len(self._rows) <= step:
            self._rows.append(self._next_row(len(self._rows)))
        return self._rows[step]

    def rows(self) -> list[Reused]:
        """One entry for each step of the run (of HORIZON steps where its length is unknown)."""
        return [self.reused(step) for step in range(self.num_steps or HORIZON)]

    def _next_row(self, step: int) -> Reused:
        schedule, total = self.schedule, self.num_steps
        row = set()
        for region in self.regions:
            refresh = static_refresh(
                schedule.rules[region.rule], step, total, self._place[region.name], schedule.warm_up
            )
            cooling = total is not None and step >= total - schedule.cool_down
            open_ended = region.rule in schedule.adaptive  # the driver counts what really was reused
            tired = not open_ended and (
                reached(self._runs[region.name], schedule.longest_reuse)
                or reached(self._reuses[region.name], schedule.most_reuses)
            )
            if refresh or cooling or tired:
                self._runs[region.name] = 0
            else:
                self._runs[region.name] += 1
                self._reuses[region.name] += 1
                row.add(region.name)
        return frozenset(row)


def reached(count: int, limit: int | None) -> bool:
    return limit is not None and count >= limit


def variants(rows: Iterable[Reused], schedule: CacheSchedule, regions: Sequence[Region]) -> list[Reused]:
    """A plan's rows, and what becomes of each where adaptive guards refresh or timesteps lie outside their window."""
    parts: dict[object, set[str]] = {}
    for region in regions:
        if region.rule in schedule.adaptive:
            parts.setdefault(("rule", region.rule), set()).add(region.name)
        elif region.rule in schedule.windows:
            parts.setdefault(schedule.windows[region.rule], set()).add(region.name)
    found = list(rows)
    for names in parts.values():
        found += [row - names for row in found if row & names]
    return found


@dataclass(frozen=True)
class ProgramChoice:
    """Which specialised programs exist, and how much computing merging rows added.

    programs: sets of reused regions, the empty one (refresh all) always first. extra: share of the plan's work that is
    computed only because rows were merged.
    """

    programs: tuple[Reused, ...]
    rows: int
    extra: float

    def serve(self, wanted: Reused, weight: Mapping[str, float]) -> Reused:
        """The program that reuses most of what may be reused, and nothing else."""
        if wanted in self.programs:
            return wanted
        fitting = [program for program in self.programs if program <= wanted]
        return max(fitting, key=lambda program: sum(weight.get(name, 0.0) for name in program))


def choose_programs(
    rows: Iterable[Reused], weight: Mapping[str, float], total: float, max_programs: int | None
) -> ProgramChoice:
    """Merge a plan's rows until at most `max_programs` distinct programs are left, only ever refreshing more.

    weight: FLOPs a reuse of each region saves; total: FLOPs of a full step. Two rows merge to what both reuse; at each
    turn the pair that adds the least work over the plan goes.
    """
    counts = Counter(rows)
    distinct = len(set(counts) | {frozenset()})
    limit = max(max_programs, 1) if max_programs is not None else distinct
    groups: dict[Reused, int] = {frozenset(): counts.pop(frozenset(), 0), **counts}

    def cost(names: Reused) -> float:
        return sum(weight.get(name, 0.0) for name in names)

    before = sum(count * (total - cost(row)) for row, count in groups.items())
    while len(groups) > limit:
        pairs = [(a, b) for i, a in enumerate(groups) for b in list(groups)[i + 1 :]]
        a, b = min(pairs, key=lambda p: sum(groups[r] * (cost(r) - cost(p[0] & p[1])) for r in p))
        merged, count = a & b, groups.pop(a) + groups.pop(b)
        groups[merged] = groups.get(merged, 0) + count
        groups.setdefault(frozenset(), 0)
    after = sum(count * (total - cost(row)) for row, count in groups.items())
    extra = (after - before) / before if before else 0.0
    if distinct > len(groups):
        log.info("%d distinct rows merged into %d programs: %.1f %% more work", distinct, len(groups), 100 * extra)
    ordered = sorted(groups, key=lambda names: (len(names), sorted(names)))
    return ProgramChoice(tuple(ordered), distinct, extra)
