"""One call of the denoiser, as drivers hand it on: where it lies, what may be reused, what comes in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .plan import Reused
from .recognition import Place
from .record import Decision, Verdict
from .state import CacheState
from .step_set import StepSet

Tensors = Mapping[int, torch.Tensor]


@dataclass(frozen=True)
class Call:
    """users: the tensors that the user hands over, by leaf. allowed: the regions that may be reused, as far as no
    adaptive guard has its say; reason: why others may not that the plan reuses."""

    steps: StepSet
    place: Place
    state: CacheState
    users: Tensors
    allowed: Reused
    reason: str

    @property
    def branch(self) -> str:
        """The guidance branch."""
        return self.place.context.name

    def decision(
        self, reused: Reused = frozenset(), reason: str | None = None, verdicts: tuple[Verdict, ...] = ()
    ) -> Decision:
        """For the record: these regions were reused, the others computed. reason: why, unless it is that of the
        call."""
        names = [region.name for region in self.steps.regions]
        return Decision(
            self.branch,
            self.place.step,
            tuple(name for name in names if name not in reused),
            tuple(name for name in names if name in reused),
            self.reason if reason is None else reason,
            verdicts,
        )


__all__ = ["Call", "Tensors"]
