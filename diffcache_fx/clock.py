"""How long the steps of a generation take: a cached denoiser and, beside some of its calls, the uncached model on the
same inputs. One generation then tells what whole generations in turn would take several of, and what any number of
refreshes costs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from .measure import synchronize

_FIRST, _EVERY = 4, 3  # the first calls have the uncached model beside them, and every third one after them


@dataclass
class Clock:
    """The uncached model beside a cached one. uncached: seconds of its calls so far; cached: of each call of the cached
    one, by how many regions it took from the cache; rest: seconds of the generation outside of these calls. On a GPU
    each call is waited for.

    A short call takes longer after one of the whole model, which leaves nothing of it in the processor's caches; most
    must therefore follow one another as they do in use."""

    model: Callable[..., Any]
    uncached: list[float] = field(default_factory=list)
    cached: dict[int, list[float]] = field(default_factory=dict)
    rest: float = 0.0

    def call(self, cached: Callable[..., Any], reused: Callable[[], int], *args: Any, **kwargs: Any) -> Any:
        """What the cached denoiser returns; it is timed, and with it the uncached model at some calls. reused: how many
        regions that call took from the cache."""
        if self.calls < _FIRST or self.calls % _EVERY == 0:
            self.uncached.append(_seconds(self.model, *args, **kwargs)[0])
        seconds, output = _seconds(cached, *args, **kwargs)
        self.cached.setdefault(reused(), []).append(seconds)
        return output

    def generation(self, run: Callable[[], Any]) -> None:
        """Time all of a run of the sampler that calls the cached denoiser."""
        before = self._spent()
        seconds, _ = _seconds(run)
        self.rest = seconds - (self._spent() - before)

    def _spent(self) -> float:
        return sum(self.uncached) + sum(map(sum, self.cached.values()))

    @property
    def calls(self) -> int:
        """Of the cached model."""
        return sum(map(len, self.cached.values()))

    @property
    def whole(self) -> float:
        """Seconds of an uncached generation."""
        return self.rest + self.calls * statistics.median(self.uncached)

    @property
    def taken(self) -> float:
        """Seconds of the cached generation that was timed."""
        return self.rest + sum(len(found) * statistics.median(found) for found in self.cached.values())

    def expected(self, share: float) -> float:
        """Seconds of a cached generation that refreshes everything at this share of its steps and nothing at the
        others; the steps that ran with most and with least from the cache stand for these."""
        most, least = (statistics.median(self.cached[kind(self.cached)]) for kind in (max, min))
        return self.rest + self.calls * (share * least + (1 - share) * most)


def _seconds(function: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[float, Any]:
    synchronize()
    start = time.perf_counter()
    output = function(*args, **kwargs)
    synchronize()
    return time.perf_counter() - start, output
