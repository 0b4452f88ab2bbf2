"""What happens from step to step: context, decision, history slots, forecast rows, statistics, reset.

One small class drives any set of step callables - eager, compiled, a session of another runtime - so that all of them
behave the same. It holds no model and compiles nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from .plan import Plan, ProgramChoice, Reused
from .program import InputKind, OutputKind, Region
from .recognition import Arguments, Hints, Key, Place, Recognizer
from .schedule import CacheSchedule
from .state import CacheState

if TYPE_CHECKING:
    from .export.lowered import Lowered


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


class StepSet:
    """The compiled programs of one captured signature, with their parameters looked up once per generation."""

    def __init__(
        self,
        regions: Sequence[Region],
        lowered: Mapping[Reused, Lowered],
        choice: ProgramChoice,
        weight: Mapping[str, float],
        parameters: Callable[[str], torch.Tensor],
        groups: Mapping[str, str] | None = None,
    ) -> None:
        """groups: for a branching program, the name of each region's predicate."""
        self.regions = tuple(regions)
        self.lowered = dict(lowered)
        self.choice = choice
        self.weight = dict(weight)
        self.groups = dict(groups or {})
        self.branching = any(entry.branching for entry in self.lowered.values())
        self._parameters = parameters
        self._templates: dict[Reused, list[Any]] = {}
        self._layout = {key: _Layout(entry) for key, entry in self.lowered.items()}

    def bind(self) -> None:
        """Look the parameters up anew: at the start of a generation, so that replaced tensors take effect."""
        found: dict[str, torch.Tensor] = {}

        def lookup(name: str) -> torch.Tensor:
            if name not in found:
                found[name] = self._parameters(name)
            return found[name]

        self._templates = {key: layout.template(lookup) for key, layout in self._layout.items()}

    def run(
        self,
        key: Reused,
        users: Mapping[int, torch.Tensor],
        state: CacheState,
        rows: torch.Tensor | None,
        predicates: Mapping[str, torch.Tensor],
    ) -> tuple[list[torch.Tensor], dict[str, list[torch.Tensor]]]:
        """Run one program; returns the user's outputs and, by region, the state it returned, in declared order."""
        layout = self._layout[key]
        args = self._templates[key].copy()
        for position, leaf in layout.users:
            args[position] = users[leaf]
        for position, region, value, slot in layout.history:
            args[position] = state.histories[region].slots[value][slot]
        for position, _ in layout.rows:
            args[position] = rows
        for position, group in layout.predicates:
            args[position] = predicates[group]
        results = self.lowered[key].run(*args)
        states: dict[str, list[torch.Tensor]] = {}
        for position, region in layout.states:
            states.setdefault(region, []).append(results[position])
        return [results[position] for position in layout.outputs], states


class _Layout:
    """Where each kind of input and output of a lowered program lies."""

    def __init__(self, lowered: Lowered) -> None:
        self._lowered = lowered
        self.users: list[tuple[int, int]] = []
        self.history: list[tuple[int, str, int, int]] = []
        self.rows: list[tuple[int, str]] = []
        self.predicates: list[tuple[int, str]] = []
        for position, entry in enumerate(lowered.inputs):
            if entry.kind is InputKind.USER:
                self.users.append((position, int(entry.target)))
            elif entry.kind is InputKind.HISTORY:
                region, value, slot = entry.target.rsplit("/", 2)
                self.history.append((position, region, int(value), int(slot)))
            elif entry.kind is InputKind.ROWS:
                self.rows.append((position, entry.target))
            elif entry.kind is InputKind.PREDICATE:
                self.predicates.append((position, entry.target))
        self.outputs = [i for i, output in enumerate(lowered.outputs) if output.kind is OutputKind.USER]
        drop = 2 if lowered.branching else 1
        self.states = [
            (i, output.target.rsplit("/", drop)[0])
            for i, output in enumerate(lowered.outputs)
            if output.kind is OutputKind.STATE
        ]

    def template(self, parameters: Callable[[str], torch.Tensor]) -> list[Any]:
        kinds = (InputKind.PARAMETER, InputKind.BUFFER)
        return [
            parameters(entry.target)
            if entry.kind in kinds
            else self._lowered.constants[entry.target]
            if entry.kind is InputKind.CONSTANT
            else None
            for entry in self._lowered.inputs
        ]


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
