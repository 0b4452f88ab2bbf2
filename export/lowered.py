"""What a lowering hands to the driver: a step program as a plain function of flat tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from diffcache_fx.program import Input, InputKind, Output, OutputKind, StepProgram

Run = Callable[..., Sequence[torch.Tensor]]


@dataclass(frozen=True)
class Lowered:
    """A callable step. `run(*tensors)` takes one tensor for each of `inputs` and returns one for each of `outputs`."""

    run: Run
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    constants: dict[str, torch.Tensor]
    reused: frozenset[str]

    @staticmethod
    def of(program: StepProgram, run: Run) -> Lowered:
        return Lowered(run, program.inputs, program.outputs, program.constants, program.reused)

    @property
    def branching(self) -> bool:
        """True if the choice between refresh and reuse is made inside."""
        return any(entry.kind is InputKind.PREDICATE for entry in self.inputs)

    @property
    def user_outputs(self) -> int:
        return sum(output.kind is OutputKind.USER for output in self.outputs)
