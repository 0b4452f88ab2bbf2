"""How long the steps of a generation take: a cached denoiser and the uncached model in turn, call by call, on the same
inputs. One generation then tells what whole generations in turn would take several of, and what any number of refreshes
costs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .measure import synchronize


@dataclass
class Clock:
    """The uncached model beside a cached one. uncached, refreshes, reuses: seconds of each call so far, by kind; rest:
    seconds of the generation outside of these calls. On a GPU each call is waited for."""

    model: Callable[..., Any]
    uncached: list[float] = field(default_factory=list)
    refreshes: list[float] = field(default_factory=list)
    reuses: list[float] = field(default_factory=list)
    rest: float = 0.0

    def call(self, cached: Callable[..., Any], reused: Callable[[], bool], *args: Any, **kwargs: Any) -> Any:
        """What the cached denoiser returns; both are timed, each first in every other call. reused: whether that call
        took anything from the cache."""
        if len(self.uncached) % 2:
            self.uncached.append(_seconds(self.model, *args, **kwargs)[0])
            seconds, output = _seconds(cached, *args, **kwargs)
        else:
            seconds, output = _seconds(cached, *args, **kwargs)
            self.uncached.append(_seconds(self.model, *args, **kwargs)[0])
        (self.reuses if reused() else self.refreshes).append(seconds)
        return output

    def generation(self, run: Callable[[], Any]) -> None:
        """Time all of a run of the sampler that calls the cached denoiser."""
        before = self._spent()
        seconds, _ = _seconds(run)
        self.rest = seconds - (self._spent() - before)

    def _spent(self) -> float:
        return sum(self.uncached) + sum(self.refreshes) + sum(self.reuses)

    @property
    def whole(self) -> float:
        """Seconds of an uncached generation."""
        return self.rest + len(self.uncached) * statistics.median(self.uncached)

    def cached(self, share: float | None = None) -> float:
        """Seconds of a cached generation; share: of refreshes among its steps, the one that was timed unless given.
        Where only one kind of step ran, the other is taken to cost as much."""
        kinds = [statistics.median(kind or other) for kind, other in self._pairs]
        share = len(self.refreshes) / len(self.uncached) if share is None else share
        return self.rest + len(self.uncached) * (share * kinds[0] + (1 - share) * kinds[1])

    @property
    def _pairs(self) -> tuple[tuple[list[float], list[float]], ...]:
        return (self.refreshes, self.reuses), (self.reuses, self.refreshes)


def _seconds(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[float, Any]:
    synchronize()
    start = time.perf_counter()
    output = function(*args, **kwargs)
    synchronize()
    return time.perf_counter() - start, output
