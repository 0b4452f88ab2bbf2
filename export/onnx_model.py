"""One step program as an ONNX model: names, opset, what is stripped, what is checked."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from diffcache_fx.passes.decompose import Decompose
from diffcache_fx.passes.fold_empty import FoldEmpty
from diffcache_fx.passes.real_pairs import RealPairs, as_pairs
from torch.export import ExportedProgram

from diffcache_fx.errors import ExportError, VerificationError
from diffcache_fx.program import StepProgram

from .exported_program import to_exported
from .onnx_rules import RULES, concerned, with_reshapes
from .ports import input_names, output_names

log = logging.getLogger(__name__)

# protobuf refuses messages of 2 GiB; some room for the graph itself.
LARGEST = 1_900_000_000
aten = torch.ops.aten
# The first operator set with convolutions and normalisations in bfloat16.
_OPSET_BFLOAT16 = 22
# ONNX's Einsum takes no bfloat16; these are the operators that PyTorch itself runs.
_EINSUM = {aten.einsum.default: lambda equation, tensors, path=None: torch.einsum(equation, tensors)}
# Most elements of a constant that is folded.
_FOLDED = 256


def to_model(program: StepProgram, parameters: Callable[[str], torch.Tensor], held: bool = True) -> Any:
    """A program as an `onnx_ir.Model`: weights are initialisers of the main graph, by their names in the model, and
    still the model's own memory (held=False: inputs, in the program's order).

    Raises ExportError, naming the operator, where ONNX cannot say it.
    """
    opset = None
    if _bfloat16(program):
        program, opset = Decompose(_EINSUM)(program), _OPSET_BFLOAT16
    try:
        program = Decompose(RULES, concerned)(RealPairs()(FoldEmpty()(with_reshapes(program))))
        with _quiet():
            exported = torch.onnx.export(
                _exported(program, lambda name: as_pairs(parameters(name)), held),
                dynamo=True,
                verbose=False,
                optimize=False,
                external_data=False,
                opset_version=opset,
            )
            assert exported is not None
            _fold(exported.model)
            _sharpen(exported.model)
    except ImportError as error:
        raise ExportError(
            f"{error.name or 'onnxscript'} is not installed: pip install 'diffcache_fx[onnx]' to write ONNX"
        ) from error
    except Exception as error:
        raise ExportError(f"ONNX cannot express this program: {_cause(error)}") from error
    model = exported.model
    _rename(model.graph, program, held)
    _strip(model)
    _lift_initializers(model.graph)
    model.producer_name, model.producer_version = "diffcache_fx", ""
    return model


def _exported(program: StepProgram, parameters: Callable[[str], torch.Tensor], held: bool) -> ExportedProgram:
    """As ONNX's exporter takes it. It begins by having everything decomposed that it has no translation for, for which
    PyTorch traces the program, and the branches of a conditional several times: most of the time an export takes."""
    exported = to_exported(program, parameters, held=held)

    def decomposed(table: dict[Any, Callable[..., Any]]) -> ExportedProgram:
        try:
            simple = Decompose(RULES, concerned)(Decompose(table)(program))
            return to_exported(with_reshapes(simple), parameters, held=held)
        except VerificationError:  # a rule that only PyTorch can make functional
            return to_exported(program, parameters, held=held).run_decompositions(table)

    if not exported.range_constraints:
        exported.run_decompositions = decomposed  # type: ignore[method-assign, assignment]
    return exported


def _bfloat16(program: StepProgram) -> bool:
    values = (node.meta.get("val") for node in program.graph.nodes)
    return any(isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16 for value in values)


def _fold(model: Any) -> None:
    """Fold constants, but no weights: a transposed copy of one would be held beside the shared file."""
    from onnx_ir.passes import Sequential, common
    from onnxscript import optimizer

    def wanted(node: Any) -> bool | None:
        held = [value.const_value for value in node.inputs if value is not None and value.const_value is not None]
        return False if any(tensor.size > _FOLDED for tensor in held) else None

    # Not onnxscript's rewrite rules: they take as long as the export itself, and runtimes have their own.
    common.InlinePass()(model)
    optimizer.fold_constants_ir(
        model, onnx_shape_inference=True, input_size_limit=_FOLDED, output_size_limit=_FOLDED, should_fold=wanted
    )
    Sequential(
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )(model)


def _sharpen(model: Any) -> None:
    """PyTorch's bicubic interpolation takes another coefficient where it guards against aliasing, and the exporter does
    not. With aligned corners ONNX Runtime's is another one still."""
    import onnx_ir

    for node in model.graph.all_nodes():
        kind, smooth = node.attributes.get("mode"), node.attributes.get("antialias")
        if node.op_type == "Resize" and smooth is not None and smooth.as_int() and kind.as_string() == "cubic":
            node.attributes["cubic_coeff_a"] = onnx_ir.AttrFloat32("cubic_coeff_a", -0.5)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says about packages that no program here needs."""
    talker = logging.getLogger("torch.onnx")
    level = talker.level
    talker.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        talker.setLevel(level)


def _cause(error: BaseException) -> str:
    """The innermost reason, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def _rename(graph: Any, program: StepProgram, held: bool) -> None:
    """The program's own names; inner values that have one of them already get out of the way."""
    inputs, outputs = input_names(program, weights=not held), output_names(program)
    ends = list(zip(graph.inputs, inputs, strict=True)) + list(zip(graph.outputs, outputs, strict=True))
    wanted = {name: value for value, name in ends}
    if len(wanted) != len(ends):
        twice = sorted({name for name in (*inputs, *outputs) if (*inputs, *outputs).count(name) > 1})
        raise ExportError(f"two inputs or outputs of the program would both be called {', '.join(twice)}")
    for value in _values(graph):
        if value.name in wanted and wanted[value.name] is not value:
            value.name = f"inner_{value.name}"
    for value, name in ends:
        value.name = name


def _values(graph: Any) -> Iterator[Any]:
    yield from graph.inputs
    yield from graph.initializers.values()
    for node in graph.all_nodes():
        yield from node.outputs


def graphs_in(graph: Any) -> Iterator[Any]:
    """A graph and all graphs inside it."""
    yield graph
    for node in graph:
        for attribute in node.attributes.values():
            if attribute.type.name == "GRAPH":
                yield from graphs_in(attribute.value)
            elif attribute.type.name == "GRAPHS":
                for inner in attribute.value:
                    yield from graphs_in(inner)


def _strip(model: Any) -> None:
    """Drop what tells about the machine that exported, and doubles the file: stack traces, scopes, source nodes."""
    model.metadata_props.clear()
    model.doc_string = None
    for graph in (*graphs_in(model.graph), *(function.graph for function in model.functions.values())):
        graph.metadata_props.clear()
        graph.doc_string = None
        for value in (*graph.inputs, *graph.initializers.values()):
            value.metadata_props.clear()
        for node in graph:
            node.metadata_props.clear()
            node.doc_string = None
            for value in node.outputs:
                value.metadata_props.clear()
                value.doc_string = None


def _lift_initializers(graph: Any) -> None:
    """Move initialisers of inner graphs to the main one, so that nothing is held twice."""
    taken = {value.name for value in _values(graph)}
    for inner in list(graphs_in(graph))[1:]:
        for name, value in list(inner.initializers.items()):
            del inner.initializers[name]
            while value.name in taken:
                value.name = f"{value.name}_"
            taken.add(value.name)
            graph.register_initializer(value)


def conditionals_in(graph: Any) -> int:
    """`If` nodes, at any depth."""
    return sum(node.op_type == "If" for inner in graphs_in(graph) for node in inner)


def check_model(path: Path) -> None:
    """The full check of ONNX, shapes inferred, on the file as written. Raises ExportError with what it says."""
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        raise ExportError(f"the ONNX model that was written does not pass the checker: {_cause(error)}") from error
