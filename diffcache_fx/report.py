"""What a cached denoiser says about itself: statistics of a generation, a summary in words, and the explanation of a
schedule before anything runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from .errors import ScheduleError
from .passes.conditional import conditionals_of
from .passes.signals import kept_bytes
from .plan import Plan, choose_programs, variants
from .program import StepProgram, size_hint
from .record import Decision, Record
from .schedule import CacheSchedule

if TYPE_CHECKING:
    from .compile import Captured


@dataclass(frozen=True)
class Stats:
    """Statistics of one generation.

    steps: calls of the denoiser, all contexts together. refreshed: those that computed every region. reused: those that
    took at least one region from the cache. decisions: one entry for each call. cache_bytes: state held, all contexts.
    syncs: device reads made to tell steps apart. reads: of an adaptive guard's signals, by the host. close: decisions
    whose signal lay so near its threshold that another lowering may round to the other side. compilations: programs
    compiled since the denoiser was made. recaptures: why the model was captured again.
    """

    steps: int
    refreshed: int
    reused: int
    decisions: tuple[Decision, ...]
    cache_bytes: int
    syncs: int = 0
    reads: int = 0
    close: int = 0
    compilations: int = 0
    recaptures: tuple[str, ...] = ()

    @staticmethod
    def of(record: Record, compilations: int, recaptures: tuple[str, ...]) -> Stats:
        decisions = tuple(record.decisions)
        reused = sum(bool(decision.reused) for decision in decisions)
        return Stats(
            steps=len(decisions),
            refreshed=len(decisions) - reused,
            reused=reused,
            decisions=decisions,
            cache_bytes=record.cache_bytes,
            syncs=record.syncs,
            reads=record.reads,
            close=sum(verdict.close for decision in decisions for verdict in decision.verdicts),
            compilations=compilations,
            recaptures=recaptures,
        )


@dataclass(frozen=True)
class RegionReport:
    """One region: how many blocks and nodes, what crosses out of it, and what reusing it alone saves.

    values: for each cut value its shape, dtype name and how it is stored. cut_bytes: one copy; state_bytes: all slots.
    """

    name: str
    blocks: int
    nodes: int
    values: tuple[tuple[tuple[int, ...], str, str], ...]
    cut_bytes: int
    state_bytes: int
    flops_saved: int


@dataclass(frozen=True)
class Explanation:
    """What a schedule will do to a model, known before anything runs or compiles.

    full_flops: FLOPs of a step that computes everything. programs: for each compiled program the number of reused
    regions and its FLOPs. rows: distinct rows of the plan. merge_cost: share of extra work because rows were merged.
    ideal_speedup: FLOPs of the uncached run over those of the plan.
    """

    model: str
    schedule: str
    full_flops: int
    regions: tuple[RegionReport, ...]
    programs: tuple[tuple[int, int], ...]
    rows: int
    merge_cost: float
    steps: int
    refresh_steps: int
    ideal_speedup: float
    cache_bytes: int
    captured_by: str
    note: str = ""
    guarded: Callable[[], StepProgram] | None = field(default=None, repr=False, compare=False)

    @cached_property
    def conditionals(self) -> int:
        """How many conditionals the guarded form holds (and `If` nodes the branch form of an exported model); counted
        when asked. Raises RegionError where the schedule has no such form."""
        assert self.guarded is not None
        return conditionals_of(self.guarded())

    def __str__(self) -> str:
        lines = [
            f"{self.model} under schedule {self.schedule!r}: one step is {_count(self.full_flops)}FLOP "
            f"(captured by {self.captured_by})",
        ]
        shown = self.regions if len(self.regions) <= 12 else (*self.regions[:6], *self.regions[-3:])
        for region in shown:
            kept = ", ".join(f"{list(shape)} {dtype} as {how}" for shape, dtype, how in region.values)
            lines.append(
                f"  region {region.name}: {region.nodes} nodes, reusing it saves "
                f"{100 * region.flops_saved / max(self.full_flops, 1):.1f} % of a step; keeps {kept} "
                f"({_count(region.state_bytes, 1024)}B)"
            )
        if len(shown) < len(self.regions):
            lines.append(f"  ... {len(self.regions)} regions in all")
        for reused, flops in self.programs:
            what = "refresh" if reused == 0 else f"reuse of {reused} of {len(self.regions)} regions"
            lines.append(f"  program: {what}, {100 * flops / max(self.full_flops, 1):.1f} % of a full step")
        if self.merge_cost:
            lines.append(
                f"  {self.rows} distinct steps share {len(self.programs)} programs at {100 * self.merge_cost:.1f} % "
                "more work (max_programs=None would merge none)"
            )
        if self.steps:
            lines.append(
                f"  over {self.steps} steps: {self.refresh_steps} refresh everything; ideal speed-up "
                f"{self.ideal_speedup:.2f}x; cache {_count(self.cache_bytes, 1024)}B per guidance branch"
            )
        if self.note:
            lines.append(f"  {self.note}")
        return "\n".join(lines)


def explain(captured: Captured) -> Explanation:
    """Explain a captured signature under its schedule."""
    program, schedule = captured.program, captured.schedule
    regions = tuple(
        RegionReport(
            name=region.name,
            blocks=len(region.blocks),
            nodes=len(region.nodes),
            values=tuple(
                (
                    tuple(size_hint(size) for size in value.shape),
                    str(value.dtype).removeprefix("torch."),
                    "residual" if value.base else "value",
                )
                for value in region.cut
            ),
            cut_bytes=sum(value.nbytes for value in region.cut),
            state_bytes=region.nbytes,
            flops_saved=int(captured.weight[region.name]),
        )
        for region in program.regions
    )
    note = ""
    try:
        plan = Plan(schedule, program.regions, captured.options.num_steps)
        rows = plan.rows()
        kinds = variants(rows, schedule, program.regions)
    except ScheduleError as error:
        plan, rows, kinds, note = None, [frozenset()], [frozenset()], str(error)
    choice = choose_programs(kinds, captured.weight, float(captured.full_flops), captured.options.max_programs)
    flops = {reused: captured.flops(reused) for reused in choice.programs}
    spent = sum(flops[choice.serve(row, captured.weight)] for row in rows)
    known = plan is not None and plan.num_steps is not None
    if schedule.adaptive and not note:
        note = "what an adaptive guard does is known when it has run: these figures are the most that it can save"
    return Explanation(
        model=type(captured.module).__name__,
        schedule=schedule.name,
        full_flops=captured.full_flops,
        regions=regions,
        programs=tuple((len(reused), flops[reused]) for reused in choice.programs),
        rows=choice.rows,
        merge_cost=choice.extra,
        steps=len(rows) if known else 0,
        refresh_steps=sum(not row for row in rows),
        ideal_speedup=captured.full_flops * len(rows) / max(spent, 1),
        cache_bytes=sum(region.nbytes for region in program.regions) + kept_bytes(program),
        captured_by=program.captured_by,
        note=note or ("" if known else "pass num_steps= to see the whole run"),
        guarded=captured.guarded,
    )


class Costs(Protocol):
    """What knows the FLOPs of steps: a captured signature, or a bundle."""

    @property
    def full_flops(self) -> int: ...

    def flops(self, reused: frozenset[str]) -> int: ...


def summarize(stats: Stats, schedule: CacheSchedule, captured: Costs | Captured | None) -> str:
    """A generation in a few sentences: what was refreshed, what was reused, and why not more."""
    if not stats.steps:
        return f"schedule {schedule.name!r}: no step has run yet"
    contexts = sorted({decision.context for decision in stats.decisions})
    named = [name for name in contexts if not name.startswith("#")]
    branches = f", guidance branches {', '.join(named)}" if len(named) > 1 else ""
    if not named and len(contexts) > 1:
        branches = f", {len(contexts)} guidance branches told apart by their conditioning"
    lines = [
        f"schedule {schedule.name!r}: {stats.steps} calls{branches}; {stats.refreshed} computed everything, "
        f"{stats.reused} reused; cache {_count(stats.cache_bytes, 1024)}B"
    ]
    reasons = Counter(decision.reason for decision in stats.decisions if decision.reason)
    for reason, count in reasons.most_common():
        lines.append(f"  {count} call(s) computed although the plan would have reused: {reason}")
    lines += _signals(stats, schedule)
    if not stats.reused and not reasons and not any(decision.verdicts for decision in stats.decisions):
        lines.append(
            f"  nothing was reused: in a run of {stats.steps} calls this schedule asks for none (warm-up "
            f"{schedule.warm_up}, guard {schedule.rules[0].guard})"
        )
    if captured is not None and stats.reused:
        full = captured.full_flops
        ran = [decision for decision in stats.decisions if not decision.rebuilt]
        spent = sum(captured.flops(frozenset(decision.reused)) for decision in ran)
        if len(ran) < len(stats.decisions):
            lines.append(f"  {len(stats.decisions) - len(ran)} call(s) rebuilt from the conditional guidance branch")
        lines.append(f"  executed FLOPs: {100 * spent / (full * stats.steps):.1f} % of the uncached run")
    if stats.syncs:
        lines.append(
            f"  {stats.syncs} device reads to tell steps apart: pass num_steps= or use cache_context to avoid them"
        )
    for what in stats.recaptures[-1:]:
        lines.append(f"  the model was captured again because it changed: {what}")
    return "\n".join(lines)


def _signals(stats: Stats, schedule: CacheSchedule) -> list[str]:
    """What adaptive guards saw, and why they reused nothing where they did not."""
    verdicts = [verdict for decision in stats.decisions for verdict in decision.verdicts]
    if not verdicts:
        return []
    seen = [verdict for verdict in verdicts if verdict.signal is not None]
    free = [verdict for verdict in seen if not verdict.forced]
    forced = sum(verdict.forced and verdict.refresh for verdict in verdicts)
    lines = []
    if seen:
        low, high = (edge(verdict.signal for verdict in seen) for edge in (min, max))  # type: ignore[type-var]
        limits = sorted({verdict.limit for verdict in seen if verdict.limit})
        shown = f"{limits[0]:.3g}" if len(limits) == 1 else f"{limits[0]:.3g} to {limits[-1]:.3g}" if limits else "0"
        lines.append(f"  signal {low:.3g} to {high:.3g}, threshold {shown}; {forced} refresh(es) were forced")
    if not any(not verdict.refresh for verdict in verdicts):
        if all(guard.threshold == 0 for guard in schedule.adaptive.values()):
            why = "the threshold is 0, which means never"
        elif not free:
            why = "warm-up, cool-down and limits left no step for the guard to decide"
        else:
            nearest = min(free, key=lambda verdict: verdict.signal - verdict.limit)  # type: ignore[operator]
            why = (
                f"the signal never fell below the threshold (nearest {nearest.signal:.3g}, limit {nearest.limit:.3g}): "
                "raise the threshold, or take more steps, which change less from one to the next"
            )
        lines.append(f"  nothing was reused: {why}")
    if stats.close:
        lines.append(f"  {stats.close} decision(s) within 1e-5 of the threshold: another lowering may decide otherwise")
    return lines


def _count(value: float, base: int = 1000) -> str:
    """A number with a unit prefix, such as `1.2 G`."""
    for prefix in ("", "k", "M", "G", "T"):
        if value < base:
            return f"{value:.3g} {prefix}"
        value /= base
    return f"{value:.3g} P"
