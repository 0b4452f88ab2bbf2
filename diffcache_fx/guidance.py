"""What guidance branches share within a generation: histories averaged over them, and one branch rebuilt from
another."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch

from .errors import ScheduleError
from .guards import check_window
from .judgement import check_threshold
from .recognition import Context, Place
from .state import CacheState

SHARES = ("none", "branches", "halves")


@dataclass(frozen=True)
class Reconstruct:
    """FasterCache's guidance cache: the unconditional branch from the conditional one and their last difference.

    every: the branch is computed at each such step. window: timesteps between which it may be rebuilt. alpha: what the
    difference's low frequencies are multiplied by at each rebuilding inside low_window, and its high ones inside
    high_window (the factors compound until the difference is taken anew). radius: what counts as low, as a share of the
    shorter side. second: of two unnamed branches the second one is the unconditional.
    """

    kind: ClassVar[str] = "reconstruct"
    every: int = 5
    window: tuple[float, float] = (-1.0, 641.0)
    low_window: tuple[float, float] = (99.0, 901.0)
    high_window: tuple[float, float] = (-1.0, 301.0)
    alpha: float = 1.1
    radius: float = 0.2
    second: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.every, int) or isinstance(self.every, bool) or self.every < 1:
            raise ScheduleError(f"every must be a whole number of steps from 1, not {self.every!r}")
        for name in ("window", "low_window", "high_window"):
            window = check_window(getattr(self, name))
            if window is None:
                raise ScheduleError(f"{name} must be a window of two timesteps (low, high), not None")
            object.__setattr__(self, name, window)
        check_threshold(self.alpha, "alpha")
        if not 0.0 < self.radius < 0.5:
            raise ScheduleError(f"radius must be a share of the shorter side between 0 and 0.5, not {self.radius!r}")

    def rebuilds(self, step: int, timestep: float | None) -> bool:
        """Whether the schedule rebuilds the unconditional branch at a step."""
        return step % self.every != 0 and timestep is not None and self.window[0] < timestep < self.window[1]

    def factors(self, timestep: float) -> tuple[float, float]:
        """What the low and the high frequencies of the difference are multiplied by."""
        pairs = (self.low_window, self.high_window)
        low, high = (self.alpha if pair[0] < timestep < pair[1] else 1.0 for pair in pairs)
        return low, high


@dataclass
class Branches:
    """The outputs of the branch that was called first at the step under way, for the one that may be rebuilt from
    it."""

    step: int = -1
    context: str = ""
    output: torch.Tensor | None = None

    def note(self, place: Place, output: torch.Tensor) -> None:
        """Remember a conditional branch's output; a copy, since pipelines write to what they get."""
        self.step, self.context, self.output = place.step, place.context.name, output.clone()

    def partner(self, place: Place) -> torch.Tensor | None:
        """What another branch returned at this step, if one has run."""
        fits = self.step == place.step and self.context != place.context.name and not place.doubt
        return self.output if fits else None

    def forget(self) -> None:
        self.step, self.context, self.output = -1, "", None


def is_unconditional(name: str, rule: Reconstruct) -> bool | None:
    """Whether a context is the unconditional branch; None where its name does not tell, or it is a third one."""
    if name.startswith("#"):
        return name == "#1" if rule.second else None
    return name == "uncond" if name == "uncond" or "uncond" not in name else None


def share_histories(state: CacheState, others: Iterable[Context], names: Iterable[str], halves: bool) -> None:
    """Put the mean of the guidance branches into the histories of the regions in `names`, once for each refresh
    (T-GATE).

    halves: the branches are the two halves of each batch; else they are the contexts. A context that stands elsewhere
    in its generation is left out.
    """
    states = [state]
    if not halves:
        payloads = (other.payload for other in others)
        states += [p for p in payloads if isinstance(p, CacheState) and p is not state and p.regions is state.regions]
    for name in names:
        histories = [s.histories[name] for s in states]
        own = histories[0]
        group = [history for history in histories if history.positions == own.positions and not history.shared]
        if own.shared or not own.filled or (len(group) < 2 and not halves):
            continue
        for index, slots in enumerate(own.slots):
            for slot in range(len(slots)):
                values = [history.slots[index][slot] for history in group]
                if any(value is None for value in values):
                    continue
                mean = _mean_of_halves(values[0]) if halves else torch.stack(values).mean(0)  # type: ignore[arg-type]
                for history in group:
                    history.slots[index][slot] = mean
        for history in group:
            history.shared = True


def _mean_of_halves(value: torch.Tensor) -> torch.Tensor:
    if value.shape[0] % 2:
        raise ScheduleError(
            f"a batch of {value.shape[0]} has no two halves for guidance: use halves=False, or call with both branches"
        )
    first, last = value.chunk(2)
    return ((first + last) / 2).repeat(2, *[1] * (value.dim() - 1))
