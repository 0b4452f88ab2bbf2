"""`backend="onnxruntime"`: a step program through ONNX Runtime, on the model's own weights.

The weights are inputs of the session, bound by address at every call, so that whatever is written to them takes effect
at once, as everywhere in this library. A bundle's models hold them instead, which lets ONNX Runtime pack them.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from diffcache_fx.errors import BundleError, CacheError, ExportError
from diffcache_fx.program import StepProgram

from .bundle import described
from .lowered import Lowered


def lower(program: StepProgram, **options: Any) -> Lowered:
    """Write the program as an ONNX model and open a session for it. options: as `load_bundle`'s for ONNX Runtime.

    Raises CacheError where ONNX cannot say the program, or the runtime is not installed.
    """
    from .onnx import write_model
    from .onnx_rules import with_constants
    from .run_onnx import open_model

    device = _device(program)
    program = with_constants(program, None)
    try:
        with tempfile.TemporaryDirectory(prefix="diffcache_fx") as folder:
            path = Path(folder) / "step.onnx"
            write_model(program, _none, path, held=False)
            run = open_model(path, described(program, weights=True), device, **options)
    except (BundleError, ExportError) as error:
        raise CacheError(str(error)) from error
    return Lowered.of(program, run)


def _none(name: str) -> torch.Tensor:
    raise AssertionError(f"the weight {name!r} is an input here")


def _device(program: StepProgram) -> torch.device:
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            return value.device
    return torch.device("cpu")
