"""What happens from step to step: context, decision, history slots, forecast rows, statistics, reset.

One small class drives any set of step callables - eager, compiled, a session of another runtime - so that all of them
behave the same. It holds no model and compiles nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from .call import Call, Tensors
from .control import Controller
from .guidance import Branches, is_unconditional, share_histories
from .plan import Plan, Reused
from .recognition import Arguments, Hints, Key, Place, Recognizer
from .record import Decision, Record, Verdict
from .schedule import CacheSchedule
from .state import CacheState, bytes_of
from .step_set import DIFFERENCE, PROBE, REBUILD, Feed, StepSet

# Timesteps that a refining sampler may come back to: the nodes of a step, and where it ends.
_VISITED = 8


class Driver:
    """Decides, runs and remembers, for one thread of one cached denoiser."""

    def __init__(
        self,
        schedule: CacheSchedule,
        num_steps: int | None = None,
        refinement: bool = False,
        lagged: bool = False,
    ) -> None:
        self.schedule = schedule
        self.recognizer = Recognizer(num_steps, refinement, schedule.needs_timestep)
        self.record = Record()
        self.bound: StepSet | None = None
        self._control = Controller(schedule, lagged)
        self._branches = Branches()
        # Where the graph decides: rule, step, context and decision (on the device) of the branch called first.
        self._lead: tuple[int, int, str, torch.Tensor] | None = None
        self._ended = True
        self._plans: dict[tuple[int, int | None], tuple[StepSet, Plan]] = {}
        self._flags = {True: torch.tensor(True), False: torch.tensor(False)}

    def reset(self, name: str | None = None) -> None:
        """Drop all cache state (or that of one context); the statistics of the generation that ended stay readable."""
        self.recognizer.reset(name)
        self._branches.forget()
        self._lead = None
        if name is None:
            self._ended = True
            self._plans.clear()

    def locate(self, arguments: Arguments, key: Key, hints: Hints | None) -> Place:
        """Find a call's place; a generation that begins clears the statistics of the one before."""
        syncs = self.recognizer.syncs
        place = self.recognizer.locate(arguments, key, hints)
        if place.new_generation and (self._ended or place.context.name in self.record.contexts):
            self.record = Record()
        self._ended = False
        self.record.syncs += self.recognizer.syncs - syncs
        return place

    def step(self, steps: StepSet, place: Place, users: Tensors) -> list[torch.Tensor]:
        """Run one call: decide, fill or refresh the cache, and return the model's output tensors.

        If anything raises, the context forgets its cache, so that nothing half-written is ever reused.
        """
        context = place.context
        state = context.payload
        if self.schedule.made_for is not None:
            self.schedule.made_for.check_step(place.step, place.timestep)
        # A call in doubt may belong to another generation: what went before must not reach its forecasts either.
        if (
            place.new_generation
            or place.doubt
            or not isinstance(state, CacheState)
            or state.regions is not steps.regions
        ):
            state = context.payload = CacheState(steps.regions, self.schedule.adaptive)
            if place.refining:
                context.visited[place.position] = state
        elif place.refining:
            state = context.payload = self._come_back(place, state)
        try:
            rebuilt = self._rebuild(steps, place, state) if self.schedule.branch is not None else None
        except BaseException:
            context.restart()
            raise
        if rebuilt is not None:
            return [rebuilt]
        allowed, reason = self._allowed(steps, place, state)
        self._share(steps, allowed, state)
        run = self._run_branching if steps.branching else self._run_specialised
        try:
            outputs, decision = run(Call(steps, place, state, users, allowed, reason))
            if self.schedule.branch is not None:
                decision = self._compare(steps, place, state, outputs[0], decision)
        except BaseException:
            context.restart()
            raise
        self.record.add(decision)
        if place.new_generation or place.refining:  # otherwise every slot is allocated at the first refresh
            contexts = self.recognizer.contexts.values()
            states = [state for c in contexts for state in (c.payload, *c.visited.values())]
            self.record.cache_bytes = bytes_of([state for state in states if isinstance(state, CacheState)])
        return outputs

    @staticmethod
    def _come_back(place: Place, latest: CacheState) -> CacheState:
        """Where a sampler refines, the call before may lie at another timestep: what is compared and reused is what was
        known when this timestep was seen last."""
        visited = place.context.visited
        known = visited.pop(place.position, None)
        if known is None and len(visited) >= _VISITED:
            del visited[next(iter(visited))]
        state: CacheState = known or latest.copy()
        visited[place.position] = state
        return state

    def _share(self, steps: StepSet, allowed: Reused, state: CacheState) -> None:
        """Average what guidance branches share, before it is reused."""
        for index, rule in enumerate(self.schedule.rules):
            if rule.share != "none":
                names = [region.name for region in steps.regions if region.rule == index and region.name in allowed]
                share_histories(state, self.recognizer.contexts.values(), names, rule.share == "halves")

    def _rebuild(self, steps: StepSet, place: Place, state: CacheState) -> torch.Tensor | None:
        """The unconditional branch's output made from the conditional one's, where the schedule says so and it can."""
        rule = self.schedule.branch
        assert rule is not None
        partner = self._branches.partner(place)
        wanted = is_unconditional(place.context.name, rule) and rule.rebuilds(place.step, place.timestep)
        if partner is None or not wanted or not state.difference or place.timestep is None:
            return None
        low, high = rule.factors(place.timestep)
        state.emphasis = (state.emphasis[0] * low, state.emphasis[1] * high)
        weights = torch.tensor(state.emphasis, dtype=torch.float32, device=partner.device)
        results = steps.run(REBUILD, state, Feed({}, rows=weights, live={"cond": partner, **state.difference}))
        names = tuple(region.name for region in steps.regions)
        self.record.add(Decision(place.context.name, place.step, (), names, rebuilt=True))
        return results.users[0]

    def _compare(
        self, steps: StepSet, place: Place, state: CacheState, output: torch.Tensor, decision: Decision
    ) -> Decision:
        """After a call that ran the model: note the conditional branch, or how the unconditional one differs from
        it."""
        rule = self.schedule.branch
        assert rule is not None
        unconditional = is_unconditional(place.context.name, rule)
        partner = self._branches.partner(place)
        if unconditional and partner is not None:
            state.difference = steps.run(DIFFERENCE, state, Feed({}, live={"cond": partner, "uncond": output})).live
            state.emphasis = (1.0, 1.0)
        elif unconditional is False or (unconditional is None and partner is None):
            self._branches.note(place, output)
        if unconditional is None and partner is not None and place.context.name.startswith("#"):
            return replace(decision, reason="no context says which guidance branch is the unconditional one")
        if unconditional and partner is None and rule.rebuilds(place.step, place.timestep):
            return replace(decision, reason="the conditional branch has not run at this step")
        return decision

    def _total(self, place: Place) -> int | None:
        return place.context.num_steps if place.context.num_steps is not None else self.recognizer.num_steps

    def _allowed(self, steps: StepSet, place: Place, state: CacheState) -> tuple[Reused, str]:
        """The regions that may be reused, as far as no adaptive guard has its say; and why not, if so."""
        total = self._total(place)
        known = self._plans.get((id(steps), total))
        if known is None or known[0] is not steps:
            known = self._plans[id(steps), total] = (steps, Plan(self.schedule, steps.regions, total))
        wanted = known[1].reused(place.step)
        if self.schedule.windows and wanted:
            wanted = self._inside_windows(steps, place, wanted)
        if self.schedule.branch is not None and not self.schedule.branch.rebuilds(place.step, place.timestep):
            return frozenset(), ""  # where both branches run, they run in full
        if not wanted:
            return wanted, ""
        if place.doubt:
            return frozenset(), place.doubt
        missing = wanted & state.missing()
        return wanted - missing, "nothing stored yet" if missing else ""

    def _inside_windows(self, steps: StepSet, place: Place, wanted: Reused) -> Reused:
        moment = place.timestep
        closed = {
            rule for rule, (low, high) in self.schedule.windows.items() if moment is None or not low < moment < high
        }
        return frozenset(r.name for r in steps.regions if r.name in wanted and r.rule not in closed)

    def _rows(
        self,
        steps: StepSet,
        reused: Reused,
        state: CacheState,
        position: int,
        ratios: Mapping[int, Mapping[str, float]],
    ) -> torch.Tensor | None:
        """The forecast weights of all regions, in slot order: float32 [regions, slots]; None if no history is deep.

        ratios: what adaptive guards have measured, by rule, for forecasts that use it."""
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
                weights = forecast.weights(history.positions, float(position), ratios.get(region.rule, {}))
                row[: history.depth] = history.row([float(weight) for weight in weights])
            table.append(row)
            device = device or (region.cut[0].device if region.cut else None)
        return torch.tensor(table, dtype=torch.float32, device=device)

    def _moment(self, steps: StepSet, place: Place) -> torch.Tensor:
        """The number of the step, and the share of the run that it completes."""
        total, device = self._total(place), steps.regions[0].cut[0].device
        moment = (float(place.position), (place.step + 1) / total if total else 0.0)
        return torch.tensor(moment, dtype=torch.float32, device=device)

    def _run_specialised(self, call: Call) -> tuple[list[torch.Tensor], Decision]:
        steps, place, state, users = call.steps, call.place, call.state, call.users
        control, total = self._control, self._total(place)
        feed = Feed(users, kept=control.kept(steps, state, users))
        early = steps.run(PROBE, state, feed) if steps.split else None
        turn = control.decide(steps, place, total, call.allowed, state, early.signals if early else {})
        key = steps.choice.serve(turn.wanted, steps.weight)
        turn.confirm(key)
        feed.rows = self._rows(steps, key, state, place.position, turn.measured) if key else None
        feed.live = early.live if early else {}
        feed.moment = self._moment(steps, place) if any(self.schedule.corrections) else None
        results = steps.run(key, state, feed)
        for name, values in results.states.items():
            state.histories[name].refresh(values, float(place.position))
        turn.finish({**(early.memory if early else {}), **results.memory}, results.signals)
        self.record.reads += turn.reads
        return results.users, call.decision(key, verdicts=turn.verdicts)

    def _run_branching(self, call: Call) -> tuple[list[torch.Tensor], Decision]:
        steps, place, state, users = call.steps, call.place, call.state, call.users
        sizes = steps.sizes(users)
        for region in steps.regions:
            state.zeros(region.name, sizes)
        by_group: dict[str, bool] = {}
        for region in steps.regions:
            group = steps.groups[region.name]
            by_group[group] = by_group.get(group, False) or region.name not in call.allowed
        reused = frozenset(r.name for r in steps.regions if not by_group[steps.groups[r.name]])
        needed = bool(self.schedule.adaptive) or any(self.schedule.corrections)
        feed = Feed(users, moment=self._moment(steps, place) if needed else None)
        if self.schedule.adaptive:
            return self._run_deciding(call, forced=not reused, feed=feed)
        feed.rows = self._rows(steps, reused, state, place.position, {})
        feed.predicates = {group: self._flags[refresh] for group, refresh in by_group.items()}
        results = steps.run(frozenset(), state, feed)
        for region in steps.regions:
            state.histories[region.name].take(results.states[region.name])
            state.histories[region.name].shift(None if region.name in reused else float(place.position))
        return results.users, call.decision(reused)

    def _run_deciding(self, call: Call, forced: bool, feed: Feed) -> tuple[list[torch.Tensor], Decision]:
        """A program that decides by itself: nothing is read back here; the record waits until it is asked."""
        steps, place, state = call.steps, call.place, call.state
        (rule,) = self.schedule.adaptive
        guard = state.guards[rule]
        if not guard.graph:
            guard.graph = dict(steps.memory(frozenset(), steps.sizes(feed.users)))
        device = steps.regions[0].cut[0].device
        led = self._lead if self._lead and self._lead[:2] == (rule, place.step) else None
        follows = led is not None and led[2] != call.branch and not forced
        lead = torch.where(led[3], 1.0, -1.0) if led and follows else torch.tensor(float(forced), device=device)
        feed.force = {str(rule): lead}
        feed.kept = guard.graph
        results = steps.run(frozenset(), state, feed)
        guard.graph = results.memory
        if self.schedule.guidance == "together" and not follows:
            self._lead = (rule, place.step, call.branch, results.decisions[str(rule)])
        for region in steps.regions:
            state.histories[region.name].take(results.states[region.name])
            state.histories[region.name].shift(float(place.position) if forced else None)
        pending = Verdict.pending(rule, results, forced or follows, place.new_generation or bool(place.doubt))
        return results.users, call.decision(frozenset(state.histories), verdicts=(pending,))
