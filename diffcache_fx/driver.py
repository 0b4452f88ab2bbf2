"""What happens from step to step: context, decision, history slots, forecast rows, statistics, reset.

One small class drives any set of step callables - eager, compiled, a session of another runtime - so that all of them
behave the same. It holds no model and compiles nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from .plan import Plan, Reused
from .recognition import Arguments, Hints, Key, Place, Recognizer
from .schedule import CacheSchedule
from .state import CacheState
from .step_set import StepSet


@dataclass(frozen=True)
class Decision:
    """What was decided at one step of one context, and why.

    signal: the quantity an adaptive guard compared, None for static plans. reason: why a step that might have been
    reused was computed; empty where the plan was followed.
    """

    context: str
    step: int
    refreshed: tuple[str, ...]
    reused: tuple[str, ...]
    reason: str = ""
    signal: float | None = None


@dataclass
class Record:
    """The statistics of one generation (all its contexts)."""

    decisions: list[Decision] = field(default_factory=list)
    cache_bytes: int = 0
    syncs: int = 0


class Driver:
    """Decides, runs and remembers, for one thread of one cached denoiser."""

    def __init__(self, schedule: CacheSchedule, num_steps: int | None = None, refinement: bool = False) -> None:
        self.schedule = schedule
        self.recognizer = Recognizer(num_steps=num_steps, refinement=refinement)
        self.record = Record()
        self.bound: StepSet | None = None
        self._ended = True
        self._plans: dict[tuple[int, int | None], tuple[StepSet, Plan]] = {}
        self._flags = {True: torch.tensor(True), False: torch.tensor(False)}

    def reset(self, name: str | None = None) -> None:
        """Drop all cache state (or that of one context); the statistics of the generation that ended stay readable."""
        self.recognizer.reset(name)
        if name is None:
            self._ended = True
            self._plans.clear()

    def locate(self, arguments: Arguments, key: Key, hints: Hints | None) -> Place:
        """Find a call's place; a generation that begins clears the statistics of the one before."""
        syncs = self.recognizer.syncs
        place = self.recognizer.locate(arguments, key, hints)
        seen = any(decision.context == place.context.name for decision in self.record.decisions)
        if place.new_generation and (self._ended or seen):
            self.record = Record()
        self._ended = False
        self.record.syncs += self.recognizer.syncs - syncs
        return place

    def step(self, steps: StepSet, place: Place, users: Mapping[int, torch.Tensor]) -> list[torch.Tensor]:
        """Run one call: decide, fill or refresh the cache, and return the model's output tensors.

        If anything raises, the context forgets its cache, so that nothing half-written is ever reused.
        """
        context = place.context
        state = context.payload
        # A call in doubt may belong to another generation: what went before must not reach its forecasts either.
        if (
            place.new_generation
            or place.doubt
            or not isinstance(state, CacheState)
            or state.regions is not steps.regions
        ):
            state = context.payload = CacheState(steps.regions)
        wanted, reason = self._decide(steps, place, state)
        try:
            if steps.branching:
                outputs, reused = self._run_branching(steps, wanted, state, users, place.step)
            else:
                outputs, reused = self._run_specialised(steps, wanted, state, users, place.step)
        except BaseException:
            context.restart()
            raise
        names = [region.name for region in steps.regions]
        self.record.decisions.append(
            Decision(
                context.name,
                place.step,
                tuple(name for name in names if name not in reused),
                tuple(name for name in names if name in reused),
                reason,
            )
        )
        if place.new_generation:  # every slot is allocated at the first refresh
            contexts = self.recognizer.contexts.values()
            self.record.cache_bytes = sum(c.payload.nbytes for c in contexts if isinstance(c.payload, CacheState))
        return outputs

    def _decide(self, steps: StepSet, place: Place, state: CacheState) -> tuple[Reused, str]:
        context = place.context
        total = context.num_steps if context.num_steps is not None else self.recognizer.num_steps
        known = self._plans.get((id(steps), total))
        if known is None or known[0] is not steps:
            known = self._plans[id(steps), total] = (steps, Plan(self.schedule, steps.regions, total))
        wanted = known[1].reused(place.step)
        if not wanted:
            return wanted, ""
        if place.doubt:
            return frozenset(), place.doubt
        missing = wanted & state.missing()
        return wanted - missing, "nothing stored yet" if missing else ""

    def _rows(self, steps: StepSet, reused: Reused, state: CacheState, step: int) -> torch.Tensor | None:
        """The forecast weights of all regions, in slot order: float32 [regions, slots]; None if no history is deep."""
        width = max((value.slots for region in steps.regions for value in region.cut), default=1)
        if width == 1:
            return None
        table = []
        device = None
        for region in steps.regions:
            history = state.histories[region.name]
            row = [0.0] * width
            if region.name in reused:
                forecast = self.schedule.rules[region.rule].forecast
                weights = forecast.weights(history.positions, float(step))
                row[: history.depth] = history.row(weights)
            table.append(row)
            device = device or (region.cut[0].device if region.cut else None)
        return torch.tensor(table, dtype=torch.float32, device=device)

    def _run_specialised(
        self, steps: StepSet, wanted: Reused, state: CacheState, users: Mapping[int, torch.Tensor], step: int
    ) -> tuple[list[torch.Tensor], Reused]:
        key = steps.choice.serve(wanted, steps.weight)
        rows = self._rows(steps, key, state, step) if key else None
        outputs, fresh = steps.run(key, users, state, rows, {})
        for name, values in fresh.items():
            state.histories[name].refresh(values, float(step))
        return outputs, key

    def _run_branching(
        self, steps: StepSet, wanted: Reused, state: CacheState, users: Mapping[int, torch.Tensor], step: int
    ) -> tuple[list[torch.Tensor], Reused]:
        for region in steps.regions:
            state.zeros(region.name)
        by_group: dict[str, bool] = {}
        for region in steps.regions:
            group = steps.groups[region.name]
            by_group[group] = by_group.get(group, False) or region.name not in wanted
        reused = frozenset(r.name for r in steps.regions if not by_group[steps.groups[r.name]])
        rows = self._rows(steps, reused, state, step)
        predicates = {group: self._flags[refresh] for group, refresh in by_group.items()}
        outputs, fresh = steps.run(frozenset(), users, state, rows, predicates)
        for region in steps.regions:
            history = state.histories[region.name]
            supply = iter(fresh[region.name])
            history.slots = [[next(supply) for _ in slots] for slots in history.slots]
            history.shift(None if region.name in reused else float(step))
        return outputs, reused
