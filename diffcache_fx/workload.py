"""What a comparison measures: a generation, what it is given, and how outputs are judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from .denoiser import CachedDenoiser
from .measure import psnr, relative_error
from .models import Call

Denoiser = Callable[..., Any]


class Workload(Protocol):
    """What one generation does with a denoiser."""

    unit: str  # what latency is given per: "image" or "step"
    steps: int  # steps of a generation

    @property
    def units(self) -> int:
        """How many of its units one generation makes."""

    @property
    def example(self) -> Call:
        """One call, for capture."""

    def generate(self, denoiser: Denoiser, turn: int, limit: int | None, tick: Callable[[], None]) -> Tensor | None:
        """One generation, the same for a turn whatever the denoiser; at most `limit` steps of it if given."""

    def fidelity(self, outputs: list[Tensor], reference: list[Tensor]) -> dict[str, float]:
        """Figures that compare the outputs of all turns with the uncached ones."""

    def shorter(self, steps: int) -> Workload | None:
        """The same in fewer steps, where that means something."""


@dataclass
class Calls:
    """Bare calls of a denoiser, one for each step: a workload for any model. Latency is per step."""

    inputs: Callable[[int], Call]
    varies: bool
    steps: int
    unit: str = "step"

    @property
    def units(self) -> int:
        return self.steps

    @property
    def example(self) -> Call:
        return self.inputs(0)

    @torch.no_grad()
    def generate(self, denoiser: Denoiser, turn: int, limit: int | None, tick: Callable[[], None]) -> Tensor | None:
        """The outputs of all steps, flat, where the inputs vary from step to step."""
        kept = []
        for step in range(min(self.steps, limit or self.steps)):
            args, kwargs = self.inputs(step)
            if isinstance(denoiser, CachedDenoiser):
                with denoiser.cache_context("cond", step_index=step, num_inference_steps=self.steps):
                    output = denoiser(*args, **kwargs)
            else:
                output = denoiser(*args, **kwargs)
            if self.varies:
                leaves = torch.utils._pytree.tree_leaves(output)
                kept += [leaf.flatten().float().cpu() for leaf in leaves if isinstance(leaf, Tensor)]
            tick()
        if isinstance(denoiser, CachedDenoiser):
            denoiser.reset()
        return torch.cat(kept) if kept else None

    def shorter(self, steps: int) -> None:
        """The inputs belong to the steps."""

    def fidelity(self, outputs: list[Tensor], reference: list[Tensor]) -> dict[str, float]:
        return {"error": relative_error(torch.cat(outputs), torch.cat(reference))} if self.varies else {}


def image_fidelity(outputs: list[Tensor], reference: list[Tensor]) -> dict[str, float]:
    """PSNR, dB, of images [N, C, H, W] in [-1, 1]; none for the reference itself."""
    return {} if outputs is reference else {"psnr_db": psnr(torch.cat(outputs), torch.cat(reference))}
