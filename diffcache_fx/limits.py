"""One decision of an adaptive guard, limits and counters included: the same code on the host (Python floats) and in the
graph (0-d tensors)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .adaptive import AdaptiveGuard
from .arithmetic import Number, at_least, both, either, negation, where
from .judgement import Judgement

# Reuses in a row, reuses and refreshes of the generation so far.
COUNTERS = ("run", "reuses", "refreshes")


@dataclass(frozen=True)
class Limits:
    """What holds whatever the guard says: longest run of reuses, most reuses in a generation; None for no limit."""

    longest_reuse: int | None = None
    most_reuses: int | None = None


def numbers_of(guard: AdaptiveGuard) -> tuple[str, ...]:
    """Names of all numbers carried from step to step, 0 at the start of a generation."""
    return (*guard.carried, *COUNTERS)


def decide(
    guard: AdaptiveGuard,
    limits: Limits,
    measured: Mapping[str, Number],
    memory: Mapping[str, Number],
    force: Number | bool,
    moment: Sequence[Number],
    hold: Number | bool = False,
) -> Judgement:
    """Refresh or reuse, and the numbers for the next step (before `settled`).

    hold: reuse because another guidance branch does, whatever this one's signal says, unless a refresh is forced.
    """
    if guard.threshold == 0:  # never reuse, not even where a polynomial turns negative
        force = either(force, at_least(memory["refreshes"], 0.0))
    for name, most in (("run", limits.longest_reuse), ("reuses", limits.most_reuses)):
        if most is not None:
            force = either(force, at_least(memory[name], float(most)))
    judged = guard.decide(measured, memory, force, moment)
    follow = both(hold, negation(force))
    refresh = both(judged.refresh, negation(follow))
    own = {name: where(follow, memory[name], value) for name, value in judged.memory.items()}
    counters = {
        "run": where(refresh, 0.0, memory["run"] + 1.0),
        "reuses": where(refresh, memory["reuses"], memory["reuses"] + 1.0),
        "refreshes": where(refresh, memory["refreshes"] + 1.0, memory["refreshes"]),
    }
    return Judgement(refresh, judged.signal, judged.limit, {**own, **counters})


def settled(
    guard: AdaptiveGuard, measured: Mapping[str, Number], memory: Mapping[str, Number], refreshed: Number | bool
) -> dict[str, Number]:
    """The numbers for the next step, once the step is done and `measured` is what was measured after it."""
    if not guard.carried:
        return dict(memory)
    own = guard.settle(measured, {name: memory[name] for name in guard.carried}, refreshed)
    return {**memory, **own}
