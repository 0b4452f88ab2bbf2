"""Trying plans: one cached denoiser, compiled once, that follows any plan for its groups of regions."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .allotment import JointPlan
from .clock import Clock
from .compile import Options
from .denoiser import CachedDenoiser
from .driver import Driver
from .exchange import ExchangeableDenoiser
from .forecasts import Binomial, Rows
from .guards import Interval, Mask
from .plan import Reused
from .provenance import Provenance
from .recognition import Place
from .record import Decision
from .recording import Replay
from .schedule import CacheSchedule, Rule
from .selection import Selection
from .state import CacheState
from .step_set import StepSet

NAME = "calibrated"


class _TrialDriver(Driver):
    """Says what the model is known to say, up to the first value that is reused later: until then nothing differs from
    the uncached run."""

    def __init__(self, schedule: CacheSchedule, num_steps: int | None, known: Replay, first: int) -> None:
        super().__init__(schedule, num_steps)
        self._known, self._first = known, first

    def _run_specialised(
        self,
        steps: StepSet,
        place: Place,
        allowed: Reused,
        reason: str,
        state: CacheState,
        users: Mapping[int, Tensor],
    ) -> tuple[list[Tensor], Decision]:
        known = self._known.get(place.context.name)
        if known is None or place.step >= self._first:
            return super()._run_specialised(steps, place, allowed, reason, state, users)
        return [output.clone() for output in known[place.step]], self._decision(steps, place, frozenset(), "replayed")


class Trial(ExchangeableDenoiser):
    """Follows the plan it was given last; plans and forecasts are data, and compile nothing."""

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[Selection],
        storage: str,
        history: int,
        steps: int,
        backend: Any,
        backend_options: Mapping[str, Any],
        like: CachedDenoiser | None = None,
    ) -> None:
        rules = tuple(Rule(regions, Interval(2), Binomial(history), storage) for regions in groups)
        options = Options(backend, steps, max_programs=2 ** len(groups), backend_options=backend_options)
        super().__init__(model, CacheSchedule(NAME, rules), options, like=like)
        self._own["known"], self._own["first"], self._own["clock"], self._own["driven"] = {}, 0, None, None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        clock: Clock | None = self._own["clock"]
        if clock is None:
            return super().forward(*args, **kwargs)
        return clock.call(super().forward, lambda: len(self.stats().decisions[-1].reused), *args, **kwargs)

    def timed(self, uncached: Callable[..., Any], generation: Callable[[], Any]) -> Clock:
        """Beside the uncached model, in a generation with this denoiser."""
        clock = self._own["clock"] = Clock(uncached)
        try:
            clock.generation(generation)
        finally:
            self._own["clock"] = None
        return clock

    @contextmanager
    def driven(self, make: Callable[[CacheSchedule], Driver]) -> Iterator[None]:
        """For the time of a generation, with a driver of another kind."""
        self._own["driven"], self._own["local"] = make, threading.local()
        try:
            yield
        finally:
            self._own["driven"], self._own["local"] = None, threading.local()

    def follow(self, plan: JointPlan, known: Replay | None = None) -> None:
        """From the next generation on, of all threads. known: what the model returns in the uncached run that begins
        with the same noise; steps before the first refresh that matters are not computed again."""
        rules = self._own["schedule"].rules
        self._own["known"] = known or {}
        self._own["first"] = min(first_used(part.bits, part.rows) for part in plan.parts)
        self.exchange(planned([rule.regions for rule in rules], rules[0].storage, plan))

    def _make_driver(self) -> Driver:
        num_steps, make = self._own["options"].num_steps, self._own["driven"]
        if make is not None:
            return make(self._own["schedule"])
        return _TrialDriver(self._own["schedule"], num_steps, self._own["known"], self._own["first"])


def first_used(bits: Sequence[bool], rows: Sequence[Sequence[float]]) -> int:
    """The first step whose refreshed value a later step reuses; the number of steps where none does."""
    reused = [step for step, refreshed in enumerate(bits) if not refreshed]
    seen = [[past for past in range(step) if bits[past]][-len(rows[step]) :] for step in reused]
    return min((past[0] for past in seen if past), default=len(bits))


def planned(
    groups: Sequence[Selection], storage: str, plan: JointPlan, made_for: Provenance | None = None
) -> CacheSchedule:
    """A plan as a schedule: of each group a bit and a row of weights for each step."""
    rules = []
    for regions, part in zip(groups, plan.parts, strict=True):
        table = tuple(tuple(float(weight) for weight in row) for row in part.rows)
        bits = Mask(tuple((bool(bit),) for bit in part.bits))
        rules.append(Rule(regions, bits, Rows(table), storage))
    return CacheSchedule(NAME, tuple(rules), made_for=made_for)
