"""Triton Inference Server: a model repository from a bundle, with the cache as implicit state of a sequence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from diffcache_fx.errors import ExportError

from .bundle import staged
from .manifest import Manifest, Port, Program, check_files, read_manifest

_TYPES = {
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "float64": "TYPE_FP64",
    "int64": "TYPE_INT64",
    "int32": "TYPE_INT32",
    "int16": "TYPE_INT16",
    "int8": "TYPE_INT8",
    "uint8": "TYPE_UINT8",
    "bool": "TYPE_BOOL",
}
_STATE = ("history", "memory")
_FED = {"history": "state", "memory": "memory"}  # by the kind of an input, that of the output that feeds it
MARKER = "diffcache_fx.json"


def to_triton_repository(
    bundle: str | Path,
    repository: str | Path,
    name: str = "denoiser",
    *,
    gpu: bool = False,
    idle_seconds: float = 600.0,
    overwrite: bool = False,
) -> Path:
    """Write the folder of one model, REPOSITORY/NAME, for Triton's ONNX Runtime backend; returns it.

    bundle: of ONNX models in the branch form: one model whose inputs and outputs carry the cache, which Triton keeps
    from call to call of a sequence (a correlation id is one guidance branch of one generation; its start clears the
    state). gpu: run instances on GPUs. idle_seconds: how long a sequence may wait for its next call.

    A client sends, with each step, the model's own arguments and what the manifest says of it: the predicates and rows
    of a plan (`control.plan`), or `force` (1 at the first step, else 0) for a guard that decides inside; for that and
    for a corrected schedule `moment`: the step's number, and the share of the run that it completes.
    The manifest is put beside the configuration. Raises ExportError, BundleError.
    """
    folder = Path(bundle)
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    if manifest.artefact != "onnx" or manifest.form != "branch":
        raise ExportError(
            f"{folder} holds {manifest.artefact} artefacts in the {manifest.form} form, and Triton keeps the state of "
            "one model: export with to_onnx(..., form='branch')"
        )
    if not name.replace("_", "").replace("-", "").isalnum():
        raise ExportError(f"a model of a repository is named with letters, digits, - and _, not {name!r}")
    (program,) = manifest.programs.values()
    target = Path(repository) / name
    with staged(target, overwrite, MARKER) as staging:
        version = staging / "1"
        version.mkdir()
        _with_vectors(folder / program.file, version / "model.onnx", program)
        for file in manifest.files:
            if file != program.file:
                shutil.copyfile(folder / file, version / file)
        (staging / "config.pbtxt").write_text(config(manifest, program, name, gpu, idle_seconds))
        (staging / MARKER).write_text(manifest.text())
    return target


def config(manifest: Manifest, program: Program, name: str, gpu: bool, idle_seconds: float) -> str:
    """The configuration as protobuf text, by Triton's published `ModelConfig`."""
    fed = {(_FED[port.kind], port.target): port for port in program.inputs if port.kind in _STATE}
    states = [(fed[port.kind, port.target], port) for port in program.outputs if (port.kind, port.target) in fed]
    kept = {port.name for pair in states for port in pair}
    lines = [f"name: {json.dumps(name)}", 'backend: "onnxruntime"', "max_batch_size: 0"]
    for title, ports in (("input", program.inputs), ("output", program.outputs)):
        for port in ports:
            if port.name not in kept:
                lines.append(_block(title, _tensor(port)))
    inner = [f"max_sequence_idle_microseconds: {int(idle_seconds * 1e6)}", "direct { }"]
    for taken, given in states:
        kind, dims = f"data_type: {_TYPES[taken.dtype]}", _dims(taken)
        zero = [f"name: {json.dumps('zero ' + taken.name)}", kind, dims, "zero_data: true"]
        fields = [
            f"input_name: {json.dumps(taken.name)}",
            f"output_name: {json.dumps(given.name)}",
            kind,
            dims,
            _block("initial_state", zero),
        ]
        inner.append(_block("state", fields))
    lines.append(_block("sequence_batching", inner))
    place = "KIND_GPU" if gpu else "KIND_CPU"
    lines.append(_block("instance_group", ["count: 1", f"kind: {place}"]))
    return "\n".join(lines) + "\n"


def _tensor(port: Port) -> list[str]:
    return [f"name: {json.dumps(port.name)}", f"data_type: {_TYPES[port.dtype]}", _dims(port)]


def _dims(port: Port) -> str:
    """Symbolic sizes are -1; a scalar is a vector of one, since Triton has no others."""
    sizes = [str(size) if isinstance(size, int) else "-1" for size in port.shape] or ["1"]
    return f"dims: [ {', '.join(sizes)} ]"


def _block(name: str, lines: list[str]) -> str:
    inner = "\n".join("  " + line for text in lines for line in text.splitlines())
    return f"{name} {{\n{inner}\n}}"


def _with_vectors(source: Path, target: Path, program: Program) -> None:
    """The model with each scalar input and output as a vector of one."""
    import onnx
    from onnx import helper

    model = onnx.load(source, load_external_data=False)
    scalars = {port.name for port in (*program.inputs, *program.outputs) if not port.shape}
    before, after = [], []
    for value in model.graph.input:
        if value.name in scalars:
            inner = f"scalar_{value.name}"
            _replace_uses(model.graph, value.name, inner)
            before.append(helper.make_node("Squeeze", [value.name], [inner], f"squeeze_{value.name}"))
            value.type.tensor_type.shape.CopyFrom(_one())
    for value in model.graph.output:
        if value.name in scalars:
            inner = f"scalar_{value.name}"
            for node in model.graph.node:
                node.output[:] = [inner if output == value.name else output for output in node.output]
            _replace_uses(model.graph, value.name, inner)
            after.append(helper.make_node("Unsqueeze", [inner, "axis_0"], [value.name], f"unsqueeze_{value.name}"))
            value.type.tensor_type.shape.CopyFrom(_one())
    if after:
        model.graph.initializer.append(helper.make_tensor("axis_0", onnx.TensorProto.INT64, [1], [0]))
    nodes = [*before, *model.graph.node, *after]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    onnx.save(model, target)


def _one() -> Any:
    import onnx

    shape = onnx.TensorShapeProto()
    shape.dim.add().dim_value = 1
    return shape


def _replace_uses(graph: Any, old: str, new: str) -> None:
    """In a graph and all graphs inside it."""
    for node in graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
        for attribute in node.attribute:
            if attribute.HasField("g"):
                _replace_uses(attribute.g, old, new)
                for value in attribute.g.output:
                    if value.name == old:
                        value.name = new
