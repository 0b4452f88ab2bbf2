"""From what `torch.export` returns to a StepProgram: a flat calling convention going in, named inputs coming out."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import fx, nn
from torch.export.graph_signature import InputKind as ExportKind
from torch.export.graph_signature import OutputKind as ExportOutput
from torch.utils import _pytree as pytree

from .calling import Call
from .errors import CaptureError
from .program import TENSOR, CallSignature, Input, InputKind, Output, OutputKind, StepProgram, output_node
from .values import KnownValues

_MODEL = "model"


class ModelOutput:
    """What the model's output looked like. An object of its own: export restores a module's plain attributes."""

    spec: pytree.TreeSpec | None = None
    leaves: tuple[Any, ...] = ()  # None in place of tensors
    tensors: tuple[bool, ...] = ()


class FlatModel(nn.Module):
    """The model behind a flat calling convention: tensors in, tensors out, everything else remembered."""

    def __init__(
        self, model: nn.Module, call: Call, variable: tuple[int, ...], output: ModelOutput, known: tuple[int, ...] = ()
    ) -> None:
        """variable: the leaves that are inputs. known: tensor leaves whose values are baked in."""
        super().__init__()
        self.model = model
        self._call = call
        self._variable = variable
        self._output = output
        self._known = known
        self.training = model.training  # not .train(): that would reach into the user's submodules

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        leaves = list(self._call.leaves)
        for index, tensor in zip(self._variable, tensors, strict=True):
            leaves[index] = tensor
        args, kwargs = pytree.tree_unflatten(leaves, self._call.spec)
        with KnownValues(self._call.leaves[i] for i in self._known) if self._known else nullcontext():
            result = self.model(*args, **kwargs)
        leaves, self._output.spec = pytree.tree_flatten(result)
        self._output.leaves = tuple(None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)
        tensors_out = tuple(leaf for leaf in leaves if isinstance(leaf, torch.Tensor))
        self._output.tensors = tuple(isinstance(leaf, torch.Tensor) for leaf in leaves)
        return tensors_out


def to_program(
    exported: Any,
    flat: FlatModel,
    output: ModelOutput,
    call: Call,
    variable: tuple[int, ...],
    numbers: frozenset[int],
    way: str,
) -> StepProgram:
    """The step program of an exported model. variable: the call's leaves that are tensors, in order; numbers: those of
    them that stand for Python numbers; way: how it was traced.

    Raises CaptureError where the model writes to something while it runs, needs an object that is no tensor, or returns
    no tensor.
    """
    signature = exported.graph_signature
    written = [spec for spec in signature.output_specs if spec.kind is not ExportOutput.USER_OUTPUT]
    if written:
        targets = ", ".join(sorted({str(spec.target) for spec in written})[:4])
        raise CaptureError(
            f"{type(flat.model).__name__} writes to {targets} while it runs; a cached step must be free of side "
            "effects. Return the new value instead, or register it outside the denoiser."
        )
    inputs: list[Input] = []
    constants: dict[str, torch.Tensor] = {}
    users = iter(variable)
    names = dict(zip(range(len(call.names)), call.names, strict=True))
    known = {**dict(flat.named_parameters(remove_duplicate=False)), **dict(flat.named_buffers(remove_duplicate=False))}
    kinds = {ExportKind.PARAMETER: InputKind.PARAMETER, ExportKind.BUFFER: InputKind.BUFFER}
    for spec in signature.input_specs:
        if spec.kind is ExportKind.USER_INPUT:
            leaf = next(users)
            inputs.append(Input(InputKind.USER, names[leaf], str(leaf)))
        elif spec.kind in kinds and spec.target in known:
            inputs.append(Input(kinds[spec.kind], spec.arg.name, spec.target.removeprefix(_MODEL + ".")))
        elif spec.target in exported.constants or spec.target in exported.state_dict:
            value = exported.constants.get(spec.target, exported.state_dict.get(spec.target))
            if not isinstance(value, torch.Tensor):
                raise CaptureError(f"the graph needs the object '{spec.target}', which is no tensor")
            constants[spec.target] = value
            inputs.append(Input(InputKind.CONSTANT, spec.arg.name, spec.target))
        else:
            raise CaptureError(f"the graph needs '{spec.target}' ({spec.kind.name}), which the module does not hold")
    module = exported.graph_module
    _tidy(module.graph, inputs)
    outputs = tuple(Output(OutputKind.USER, str(i)) for i in range(len(signature.output_specs)))
    assert output.spec is not None
    literals = tuple((i, leaf) for i, leaf in enumerate(output.leaves) if not output.tensors[i])
    if not outputs:
        raise CaptureError(
            f"{type(flat.model).__name__} returns no tensor (its output is {literals[:1]!r}): return tensors, or "
            "register the output class with torch.utils._pytree."
        )
    convention = CallSignature(
        in_spec=call.spec,
        leaves=tuple(TENSOR if i in variable else leaf for i, leaf in enumerate(call.leaves)),
        names=call.names,
        numbers=numbers,
        out_spec=output.spec,
        out_constants=literals,
    )
    return StepProgram(
        module=fx.GraphModule(module, module.graph),
        inputs=tuple(inputs),
        outputs=outputs,
        signature=convention,
        constants=constants,
        captured_by=way,
    )


def _tidy(graph: fx.Graph, inputs: list[Input]) -> None:
    """Name placeholders after the caller's arguments and drop the wrapper from every node's module stack."""
    for node, entry in zip((n for n in graph.nodes if n.op == "placeholder"), inputs, strict=True):
        if entry.kind is InputKind.USER:
            node._rename(entry.name)
        elif node.name.startswith(("p_model_", "b_model_", "c_model_")):
            node._rename(node.name[:2] + node.name[len("p_model_") :])
    for position, node in enumerate(n for n in graph.nodes if n.op == "placeholder"):
        inputs[position] = Input(inputs[position].kind, node.name, inputs[position].target)
    for node in graph.nodes:
        stack = node.meta.get("nn_module_stack")
        if stack:
            node.meta["nn_module_stack"] = {
                key: (fqn.removeprefix(_MODEL).removeprefix("."), kind)
                for key, (fqn, kind) in stack.items()
                if fqn == _MODEL or fqn.startswith(_MODEL + ".")
            }
    values = output_node(graph).args[0]
    output_node(graph).args = (tuple(values) if isinstance(values, (tuple, list)) else (values,),)
