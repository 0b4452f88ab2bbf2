"""Reference quantities: what an adaptive guard looks at. They are found in the graph by `passes.references`, from the
latents' path and the timestep's, never by a model's name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .errors import ScheduleError


@dataclass(frozen=True)
class BlocksOutput:
    """What flows out of the first `first` blocks of the trunk, along the latents' stream: [batch, tokens, width].

    residual: less what flowed into them.
    """

    kind: ClassVar[str] = "blocks_output"
    first: int = 1
    residual: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.first, int) or isinstance(self.first, bool) or self.first < 1:
            raise ScheduleError(f"first must be a whole number of blocks from 1, not {self.first!r}")


@dataclass(frozen=True)
class ModulatedInput:
    """The normed and timestep-modulated tokens that enter the first layer of the trunk's first block."""

    kind: ClassVar[str] = "modulated_input"


@dataclass(frozen=True)
class Latents:
    """What is being denoised, as the denoiser gets it."""

    kind: ClassVar[str] = "latents"


@dataclass(frozen=True)
class ModelOutput:
    """What the denoiser returns: its first output. Known only when the step is done."""

    kind: ClassVar[str] = "model_output"


@dataclass(frozen=True)
class TrunkInput:
    """What flows into the first block of the trunk, along the latents' stream."""

    kind: ClassVar[str] = "trunk_input"


Reference = BlocksOutput | ModulatedInput | Latents | ModelOutput | TrunkInput
REFERENCES: tuple[type, ...] = (BlocksOutput, ModulatedInput, Latents, ModelOutput, TrunkInput)
