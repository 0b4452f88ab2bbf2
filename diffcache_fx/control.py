"""Adaptive decisions taken on the host, step by step: reading signals, asking the guards, carrying what they keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from .adaptive import AdaptiveGuard
from .limits import Limits, decide, numbers_of, settled
from .plan import Reused
from .recognition import Place
from .record import Verdict
from .schedule import CacheSchedule
from .state import CacheState, GuardState, Reading
from .step_set import PROBE, StepSet

Signals = Mapping[str, torch.Tensor]


@dataclass
class Turn:
    """One step's decisions: made by `Controller.decide`, completed by `confirm` and `finish`."""

    wanted: Reused
    rules: list[_Rule] = field(default_factory=list)
    reads: int = 0

    @property
    def verdicts(self) -> tuple[Verdict, ...]:
        return tuple(rule.verdict for rule in self.rules)

    @property
    def measured(self) -> dict[int, Mapping[str, float]]:
        return {rule.index: rule.measured for rule in self.rules}

    def confirm(self, reused: Reused) -> None:
        """Tell the guards which regions really are reused: merged programs may refresh more than was asked."""
        for rule in self.rules:
            if not rule.verdict.refresh and not rule.regions <= reused:
                rule.decide(force=True)

    def finish(self, memory: Mapping[str, torch.Tensor], signals: Signals) -> None:
        """Keep what the guards keep, and start reading what was measured during the step.

        memory, signals: outputs of the step's programs, by target ("rule/name").
        """
        for rule in self.rules:
            rule.keep(memory)
            own = {name: signals[f"{rule.index}/{name}"] for name in rule.late if f"{rule.index}/{name}" in signals}
            if own:
                rule.state.pending = (Reading(own), rule.verdict.refresh)


class _Rule:
    """One adaptive rule at one step."""

    def __init__(
        self,
        index: int,
        guard: AdaptiveGuard,
        limits: Limits,
        state: GuardState,
        regions: Reused,
        moment: tuple[float, float],
        late: tuple[str, ...],
    ) -> None:
        self.index, self.guard, self.limits, self.state = index, guard, limits, state
        self.regions, self.moment, self.late = regions, moment, late
        self.measured: dict[str, float] = {}
        self.known = True
        self.before = dict(state.numbers)
        self.verdict = Verdict(index, None, 0.0, True)

    def decide(self, force: bool, hold: bool = False) -> None:
        """Ask the guard; `force` refreshes in any case, `hold` reuses because another guidance branch does."""
        numbers = {name: self.before.get(name, 0.0) for name in numbers_of(self.guard)}
        force = force or not self.known
        found = decide(self.guard, self.limits, self.measured, numbers, force, self.moment, hold)
        self.state.numbers = {name: float(value) for name, value in found.memory.items()}
        tired = bool(found.refresh) and not force and not float(found.signal) >= float(found.limit)
        signal = float(found.signal) if self.known else None
        self.verdict = Verdict(self.index, signal, float(found.limit), bool(found.refresh), force or tired or hold)

    def keep(self, memory: Mapping[str, torch.Tensor]) -> None:
        old = dict(self.state.kept)
        for name, kept in self.guard.kept.items():
            if kept.when == "refresh" and not self.verdict.refresh:
                continue
            from_now = kept.of in self.guard.references
            value = memory.get(f"{self.index}/{kept.of}") if from_now else old.get(kept.of)
            if value is not None:
                self.state.kept[name] = value


class Controller:
    """Asks the adaptive guards of a schedule at each step. lagged: the signals of a step decide the step after."""

    def __init__(self, schedule: CacheSchedule, lagged: bool = False) -> None:
        self.guards = schedule.adaptive
        self.limits = Limits(schedule.longest_reuse, schedule.most_reuses)
        self.lagged = lagged
        self._together = schedule.guidance == "together"
        self._first: tuple[int, str, dict[int, bool]] | None = None  # step, context, refresh by rule

    def kept(self, steps: StepSet, state: CacheState, users: Mapping[int, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What guards keep, by target, for all programs of a step; zeros where nothing is kept yet."""
        if not self.guards:
            return {}
        found = {f"{i}/{name}": value for i, guard in state.guards.items() for name, value in guard.kept.items()}
        for key in (PROBE, *steps.choice.programs):
            if key in steps.lowered and any(target not in found for target in steps.lowered[key].blanks):
                found = {**steps.memory(key, steps.sizes(users)), **found}
        return found

    def decide(
        self, steps: StepSet, place: Place, total: int | None, allowed: Reused, state: CacheState, signals: Signals
    ) -> Turn:
        """allowed: the regions that may be reused. signals: measured before the decision, by target."""
        turn = Turn(allowed)
        if not self.guards:
            return turn
        moment = (float(place.position), (place.step + 1) / total if total else 0.0)
        for index, guard in self.guards.items():
            regions = frozenset(region.name for region in steps.regions if region.rule == index)
            if not regions:
                continue
            measured = steps.measured[index]
            first = state.guards[index].numbers.get("refreshes", 0.0) == 0.0  # nothing kept to compare with
            late = (*measured.before, *measured.after) if self.lagged and not first else measured.after
            rule = _Rule(index, guard, self.limits, state.guards[index], regions, moment, late)
            self._settle(rule, turn)
            if self.lagged:
                names = {name: rule.state.last[name] for name in measured.before if name in rule.state.last}
            else:
                names = self._read({n: signals[f"{index}/{n}"] for n in measured.before}, turn)
            rule.known = not first and len(names) == len(measured.before)
            rule.measured = {name: names.get(name, 0.0) for name in measured.before}
            led = self._follow(place, index)
            rule.decide(force=not regions <= allowed or led is True, hold=led is False)
            turn.rules.append(rule)
            if rule.verdict.refresh:
                turn.wanted -= regions
        if self._together and (self._first is None or self._first[:1] != (place.step,) or place.new_generation):
            self._first = (place.step, place.context.name, {r.index: r.verdict.refresh for r in turn.rules})
        return turn

    def _follow(self, place: Place, index: int) -> bool | None:
        """What the branch called first at this step has decided, for another branch; None for that branch itself."""
        if not self._together or self._first is None:
            return None
        step, context, refresh = self._first
        return refresh.get(index) if step == place.step and context != place.context.name else None

    def _settle(self, rule: _Rule, turn: Turn) -> None:
        """Take in what the step before measured while it ran."""
        state = rule.state
        if state.pending is None:
            return
        reading, refreshed = state.pending
        state.pending = None
        state.last = reading.get()
        turn.reads += 1
        numbers = {name: state.numbers.get(name, 0.0) for name in numbers_of(rule.guard)}
        late = settled(rule.guard, state.last, numbers, refreshed)
        state.numbers = {name: float(value) for name, value in late.items()}
        rule.before = dict(state.numbers)

    @staticmethod
    def _read(signals: Signals, turn: Turn) -> dict[str, float]:
        if not signals:
            return {}
        turn.reads += 1
        return Reading(signals).get()
