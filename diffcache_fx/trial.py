"""Trying plans: one cached denoiser, compiled once, that follows any plan for its groups of regions."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .allotment import JointPlan
from .call import Call
from .clock import Clock
from .compile import Options
from .denoiser import CachedDenoiser
from .driver import Driver
from .exchange import ExchangeableDenoiser
from .forecasts import Binomial, Rows
from .guards import Interval, Mask
from .provenance import Provenance
from .record import Decision
from .recording import Replay
from .schedule import CacheSchedule, Rule
from .selection import Selection

NAME = "calibrated"


class ReplayingDriver(Driver):
    """Says what the model is known to say, where it is known, at the steps before `first`."""

    def __init__(self, schedule: CacheSchedule, num_steps: int | None, known: Replay, first: int) -> None:
        super().__init__(schedule, num_steps)
        self._known, self._first = known, first

    def _run_specialised(self, call: Call) -> tuple[list[Tensor], Decision]:
        known, step = self._known.get(call.branch), call.place.step
        if known is None or step >= self._first:
            return super()._run_specialised(call)
        return [output.clone() for output in known[step]], call.decision(reason="replayed")


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
        # Up to the first value that is reused later nothing differs from the uncached run.
        return ReplayingDriver(self._own["schedule"], num_steps, self._own["known"], self._own["first"])


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
