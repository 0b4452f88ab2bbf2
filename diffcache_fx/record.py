"""What happened in a generation: one decision for each call, with the signals that led to it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from .step_set import Results

# Signals this close to their threshold, relatively, may decide differently in another lowering.
CLOSE = 1e-5


@dataclass(frozen=True)
class Verdict:
    """What the adaptive guard of one rule said at one step.

    signal: the number compared with `limit`; None where nothing could be measured yet. refresh: what was done. forced:
    whether something else than the signal demanded the refresh (warm-up, a limit, a doubt).
    """

    rule: int
    signal: float | None
    limit: float
    refresh: bool
    forced: bool = False
    _tensors: tuple[torch.Tensor, ...] = field(default=(), repr=False, compare=False)

    @staticmethod
    def pending(rule: int, results: Results, forced: bool, unmeasured: bool) -> Verdict:
        """A verdict taken inside the graph, to be read when the record is asked for."""
        tensors = (
            results.decisions[str(rule)],
            results.signals[f"{rule}/#signal"],
            results.signals[f"{rule}/#limit"],
        )
        return Verdict(rule, None if unmeasured else 0.0, 0.0, True, forced, tensors)

    def read(self) -> Verdict:
        """The verdict with its numbers on the host."""
        if not self._tensors:
            return self
        refresh, signal, limit = self._tensors
        shown = None if self.signal is None else float(signal)
        return replace(self, signal=shown, limit=float(limit), refresh=bool(refresh), _tensors=())

    @property
    def close(self) -> bool:
        """Whether rounding could have turned this decision."""
        return self.signal is not None and not self.forced and abs(self.signal - self.limit) <= CLOSE * abs(self.limit)


@dataclass(frozen=True)
class Decision:
    """What was decided at one step of one context, and why.

    reason: why a step that might have been reused was computed; empty where the plan and the guards were followed.
    verdicts: what adaptive guards said; empty for static schedules. rebuilt: the model was not run at all; its output
    was made from that of another guidance branch.
    """

    context: str
    step: int
    refreshed: tuple[str, ...]
    reused: tuple[str, ...]
    reason: str = ""
    verdicts: tuple[Verdict, ...] = ()
    rebuilt: bool = False

    @property
    def signal(self) -> float | None:
        """The signal of the schedule's adaptive guard, if there is one."""
        return self.verdicts[0].signal if self.verdicts else None

    @property
    def threshold(self) -> float | None:
        """What the signal was compared with."""
        return self.verdicts[0].limit if self.verdicts else None

    def read(self) -> Decision:
        """The decision with everything on the host: one taken inside the graph says only now what it was."""
        if not any(verdict._tensors for verdict in self.verdicts):
            return self
        verdicts = tuple(verdict.read() for verdict in self.verdicts)
        names = (*self.refreshed, *self.reused)
        refresh = verdicts[0].refresh  # a program that decides by itself has one group of regions
        return replace(self, refreshed=names if refresh else (), reused=() if refresh else names, verdicts=verdicts)


@dataclass
class Record:
    """The statistics of one generation (all its contexts). syncs: device reads to tell steps apart. reads: of
    signals."""

    cache_bytes: int = 0
    syncs: int = 0
    reads: int = 0
    contexts: set[str] = field(default_factory=set)
    _decisions: list[Decision] = field(default_factory=list)

    def add(self, decision: Decision) -> None:
        self._decisions.append(decision)
        self.contexts.add(decision.context)

    @property
    def decisions(self) -> list[Decision]:
        """All decisions so far, read back from the device where they were taken there."""
        self._decisions = [decision.read() for decision in self._decisions]
        return self._decisions
