"""What a lowering hands to the driver: a step program as a plain function of flat tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from diffcache_fx.program import Input, InputKind, Output, OutputKind, StepProgram
from diffcache_fx.sizes import Size, sizes_of

Run = Callable[..., Sequence[torch.Tensor]]


@dataclass(frozen=True)
class Lowered:
    """A callable step. `run(*tensors)` takes one tensor for each of `inputs` and returns one for each of `outputs`.

    blanks: shape, dtype and device of what guards keep, by target. shapes: of the caller's tensors, by leaf.
    """

    run: Run
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    constants: dict[str, torch.Tensor]
    reused: frozenset[str]
    blanks: dict[str, tuple[tuple[Size, ...], torch.dtype, torch.device]] = field(default_factory=dict)
    shapes: dict[int, tuple[Size, ...]] = field(default_factory=dict)

    @staticmethod
    def of(program: StepProgram, run: Run) -> Lowered:
        """What `run` makes of a program."""
        blanks, shapes = {}, {}
        for node, entry in zip(program.graph.find_nodes(op="placeholder"), program.inputs, strict=True):
            value = node.meta["val"]
            if entry.kind is InputKind.MEMORY:
                blanks[entry.target] = sizes_of(value.shape), value.dtype, value.device
            elif entry.kind is InputKind.USER:
                shapes[int(entry.target)] = sizes_of(value.shape)
        return Lowered(run, program.inputs, program.outputs, program.constants, program.reused, blanks, shapes)

    @property
    def branching(self) -> bool:
        """True if the choice between refresh and reuse is made inside."""
        return any(entry.kind in (InputKind.PREDICATE, InputKind.FORCE) for entry in self.inputs)

    @property
    def user_outputs(self) -> int:
        return sum(output.kind is OutputKind.USER for output in self.outputs)
