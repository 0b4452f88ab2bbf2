"""TensorRT: each program of a bundle as an engine, through the ONNX parser; with TensorRT-RTX no GPU is needed to
build one."""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from diffcache_fx.errors import ExportError
from diffcache_fx.program import StepProgram
from diffcache_fx.sizes import Sizes, sizes_of

from .bundle import Job, Told, Written, write_bundle
from .onnx import write_models
from .ports import WEIGHTS, hints_of, input_names

if TYPE_CHECKING:
    from diffcache_fx.denoiser import CachedDenoiser

MODULES = ("tensorrt_rtx", "tensorrt")
# Smallest, usual and largest value of a symbolic size.
Range = tuple[int, int, int]


def find_tensorrt() -> Any:
    """Whichever of TensorRT-RTX and TensorRT is installed. Raises ExportError where neither is."""
    reasons = []
    for name in MODULES:
        try:
            module = importlib.import_module(name)
        except ImportError:
            continue
        except Exception as error:  # a package without its libraries
            reasons.append(f"{name}: {error}")
            continue
        if hasattr(module, "Builder"):
            return module
        reasons.append(f"{name}: it has no Builder")
    told = f" ({'; '.join(reasons)})" if reasons else ""
    raise ExportError(
        f"neither TensorRT-RTX nor TensorRT can be imported here{told}: pip install tensorrt-rtx-cu13, or tensorrt"
    )


def to_tensorrt(
    cached: CachedDenoiser,
    folder: str | Path,
    form: str | None = None,
    *,
    num_steps: int | None = None,
    sizes: Mapping[str, Range] | None = None,
    builder_options: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: Told | None = None,
) -> Path:
    """Export a cached denoiser as a bundle of TensorRT engines; returns the folder.

    cached, form, num_steps, overwrite, progress: as for `to_onnx`.
    sizes: for a denoiser captured with dynamic=True, the optimisation profile: for each symbolic size, by its name or
        as "ARGUMENT.AXIS", the smallest, the usual and the largest value. Without it the size at capture is all three.
    builder_options: attributes of the builder configuration by name (`builder_optimization_level`, say); a value may
        also be a function that is given the configuration.

    Networks are strongly typed: an engine computes in the dtypes of the model. The "branch" form holds the weights once
    and decides inside; whether its reuse step really skips is up to TensorRT, so that "pair" (or "split") is the form
    to start with. Raises ExportError with the parser's reason where TensorRT cannot take a program.
    """
    trt = find_tensorrt()

    def writer(job: Job) -> dict[str, Written]:
        job.versions[trt.__name__] = str(trt.__version__)
        return _write_engines(trt, job, dict(sizes or {}), dict(builder_options or {}))

    return write_bundle(
        cached, folder, form, "tensorrt", writer, num_steps=num_steps, overwrite=overwrite, progress=progress
    )


def _write_engines(trt: Any, job: Job, sizes: dict[str, Range], options: dict[str, Any]) -> dict[str, Written]:
    found = {}
    with tempfile.TemporaryDirectory(dir=job.folder.parent, prefix=f"{job.folder.name}.onnx") as work:
        models = write_models(replace(job, folder=Path(work)))
        for name, written in models.items():
            job.tell(f"{name}: building the engine")
            path = job.folder / f"{name}.engine"
            built, conditions = build_engine(
                trt, Path(work) / written.file, job.chosen.programs[name], sizes, options, job.tell
            )
            path.write_bytes(built)
            found[name] = Written(path.name, conditions)
    return found


def build_engine(
    trt: Any,
    model: Path,
    program: StepProgram,
    sizes: Mapping[str, Range],
    options: Mapping[str, Any],
    tell: Told,
) -> tuple[Any, int]:
    """An engine from an ONNX file, and how many conditionals the parsed network holds."""
    log = _log(trt)
    builder = trt.Builder(log)
    network = builder.create_network(_flags(trt))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(model)):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        reason = "; ".join(dict.fromkeys(_reason(error) for error in errors)) or "no reason given"
        raise ExportError(f"TensorRT's parser does not take the program {model.stem!r}: {reason[:400]}")
    config = builder.create_builder_config()
    for name, value in options.items():
        if callable(value):
            value(config)
        elif hasattr(config, name):
            setattr(config, name, value)
        else:
            raise ExportError(f"TensorRT's builder configuration has no attribute {name!r}")
    _profile(builder, config, program, sizes)
    if hasattr(trt, "IProgressMonitor"):
        config.progress_monitor = _monitor(trt, model.stem, tell)
    conditions = sum(network.get_layer(i).type == trt.LayerType.CONDITION for i in range(network.num_layers))
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise ExportError(f"TensorRT could not build the program {model.stem!r}: {log.last or 'no reason given'}")
    return plan, conditions


def _log(trt: Any) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]
        """Keeps the last error, and prints nothing."""

        last = ""

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.last = message

    return Log()


def _reason(error: Any) -> str:
    return f"{error.desc()} (node {error.node_name()!r}, operator {error.node_operator()})".replace("\n", " ")


def _flags(trt: Any) -> int:
    """Strong typing, where it is not the only one there is."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return 0 if flag is None else 1 << int(flag)


def _profile(builder: Any, config: Any, program: StepProgram, sizes: Mapping[str, Range]) -> None:
    """An optimisation profile, where a size is symbolic."""
    nodes = program.graph.find_nodes(op="placeholder")
    taken = [node for node, entry in zip(nodes, program.inputs, strict=True) if entry.kind not in WEIGHTS]
    ranges: dict[str, Range] = {}
    for name, node in zip(input_names(program), taken, strict=True):
        for axis, size in enumerate(node.meta["val"].shape):
            given = sizes.get(f"{name}.{axis}", sizes.get(str(size)))
            if isinstance(size, torch.SymInt) and given is not None:
                ranges[str(size)] = given
    for what, (least, usual, most) in ranges.items():
        if not 0 < least <= usual <= most:
            raise ExportError(
                f"the size {what} needs a smallest, a usual and a largest value, not {least, usual, most}"
            )
    symbols = {
        str(size): (hint,) * 3
        for node in taken
        for size, hint in zip(node.meta["val"].shape, hints_of(node.meta["val"].shape), strict=True)
        if str(size).isidentifier()
    } | ranges
    profile, symbolic = builder.create_optimization_profile(), False
    for name, node in zip(input_names(program), taken, strict=True):
        shape = node.meta["val"].shape
        if all(isinstance(size, int) for size in shape):
            continue
        symbolic = True
        three = [
            Sizes({symbol: bounds[which] for symbol, bounds in symbols.items()}).of(sizes_of(shape))
            for which in range(3)
        ]
        profile.set_shape(name, *three)
    if symbolic:
        config.add_optimization_profile(profile)


def _monitor(trt: Any, name: str, tell: Told) -> Any:
    """Tells the phases of a build as they go."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._totals: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._totals[phase_name] = num_steps

        def step_complete(self, phase_name: str, step: int) -> bool:
            total = self._totals.get(phase_name, 0)
            if total > 1:
                tell(f"{name}: {phase_name} {min(step + 1, total)}/{total}")
            return True

        def phase_finish(self, phase_name: str) -> None:
            self._totals.pop(phase_name, None)

    return Monitor()
