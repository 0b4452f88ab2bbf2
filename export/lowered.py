"""What a lowering hands to the driver: a step program as a plain function of flat tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from diffcache_fx.program import Input, InputKind, Output, OutputKind, StepProgram, size_hint

Run = Callable[..., Sequence[torch.Tensor]]


@dataclass(frozen=True)
class Lowered:
    """A callable step. `run(*tensors)` takes one tensor for each of `inputs` and returns one for each of `outputs`."""

    run: Run
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    constants: dict[str, torch.Tensor]
    reused: frozenset[str]
    blanks: dict[str, tuple[tuple[int, ...], torch.dtype, torch.device]] = field(default_factory=dict)

    @staticmethod
    def of(program: StepProgram, run: Run) -> Lowered:
        """blanks: shape, dtype and device of what guards keep, by target."""
        blanks = {}
        for node, entry in zip(program.graph.find_nodes(op="placeholder"), program.inputs, strict=True):
            if entry.kind is InputKind.MEMORY:
                value = node.meta["val"]
                blanks[entry.target] = (tuple(size_hint(size) for size in value.shape), value.dtype, value.device)
        return Lowered(run, program.inputs, program.outputs, program.constants, program.reused, blanks)

    @property
    def branching(self) -> bool:
        """True if the choice between refresh and reuse is made inside."""
        return any(entry.kind in (InputKind.PREDICATE, InputKind.FORCE) for entry in self.inputs)

    @property
    def user_outputs(self) -> int:
        return sum(output.kind is OutputKind.USER for output in self.outputs)
