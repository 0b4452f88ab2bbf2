"""From a StepProgram to the `ExportedProgram` that PyTorch's own exporters take: weights as its state, the rest as user
inputs in order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import ExportGraphSignature, InputSpec, OutputSpec, TensorArgument
from torch.export.graph_signature import InputKind as ExportKind
from torch.export.graph_signature import OutputKind as ExportOutput
from torch.utils import _pytree as pytree

from diffcache_fx.program import InputKind, StepProgram, returned

from .ports import WEIGHTS

# Constants of the program are buffers, too: constants of PyTorch's own kind lose their names in AOTInductor.
_KINDS = {
    InputKind.PARAMETER: ExportKind.PARAMETER,
    InputKind.BUFFER: ExportKind.BUFFER,
    InputKind.CONSTANT: ExportKind.BUFFER,
}


def weights_of(program: StepProgram, parameters: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors a program takes from the model, and those it holds itself, by name; detached, not copied."""
    return {
        entry.target: (
            program.constants[entry.target] if entry.kind is InputKind.CONSTANT else parameters(entry.target)
        ).detach()
        for entry in program.inputs
        if entry.kind in WEIGHTS
    }


def to_exported(
    program: StepProgram, parameters: Callable[[str], torch.Tensor], examples: bool = False, held: bool = True
) -> ExportedProgram:
    """The program as PyTorch's exporters know it. It shares the weights, and has a graph of its own.

    held: weights are its state; otherwise they are inputs like all others.
    examples: keep example inputs where sizes are symbolic, too; PyTorch may make guards of them, and misname symbols.
    """
    copied = program.copy()
    nodes = copied.graph.find_nodes(op="placeholder")
    weights = weights_of(program, parameters) if held else {}
    kinds = _KINDS if held else {}
    specs, users = [], []
    for node, entry in zip(nodes, program.inputs, strict=True):
        kind = kinds.get(entry.kind, ExportKind.USER_INPUT)
        target = entry.target if entry.kind in kinds else None
        persistent = True if kind is ExportKind.BUFFER else None
        specs.append(InputSpec(kind, TensorArgument(name=node.name), target, persistent))
        if target is None:
            users.append(node)
    results = [OutputSpec(ExportOutput.USER_OUTPUT, TensorArgument(name=n.name), None) for n in returned(copied.graph)]
    args = tuple(node.meta["val"] for node in users)
    ranges = _ranges(args)
    call = ModuleCallSignature(
        inputs=[],
        outputs=[],
        in_spec=pytree.tree_structure((args, {})),
        out_spec=pytree.tree_structure(tuple(range(len(results)))),
    )
    return ExportedProgram(
        copied.module,
        copied.graph,
        ExportGraphSignature(input_specs=specs, output_specs=results),
        {name: _parameter(tensor) for name, tensor in weights.items()},
        ranges,
        [ModuleCallEntry("", call)],
        example_inputs=None if ranges and not examples else (args, {}),
    )


def _parameter(tensor: torch.Tensor) -> torch.nn.Parameter:
    """What the verifier of exported programs wants to see; the same memory."""
    return torch.nn.Parameter(tensor, requires_grad=False)


def _ranges(args: tuple[Any, ...]) -> dict[Any, Any]:
    """The range of each symbol in the inputs' shapes."""
    found: dict[Any, Any] = {}
    for value in args:
        for size in value.shape:
            if isinstance(size, torch.SymInt):
                for symbol in size.node.expr.free_symbols:
                    found[symbol] = size.node.shape_env.var_to_range[symbol]
    return found
