"""`backend="torch_tensorrt"`: a specialised program through Torch-TensorRT, its weights held by the engines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from diffcache_fx.errors import CacheError
from diffcache_fx.program import StepProgram

from .exported_program import to_exported
from .lowered import Lowered
from .ports import WEIGHTS


def lower(program: StepProgram, parameters: Callable[[str], torch.Tensor], **options: Any) -> Lowered:
    """Compile a program on a GPU. options: of `torch_tensorrt.dynamo.compile`.

    The weights become part of the engines: compile again after changing them. Raises CacheError where Torch-TensorRT is
    not installed, fails, or would have to take a decision inside.
    """
    if program.module.graph.find_nodes(op="call_function", target=torch.ops.higher_order.cond):
        raise CacheError(
            "backend='torch_tensorrt' compiles the refresh and the reuse of a step, not the choice between them: use "
            "decide='host' or decide='lagged', or export.to_tensorrt(form='branch')"
        )
    try:
        import torch_tensorrt  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError as error:
        raise CacheError("Torch-TensorRT is not installed here: pip install torch-tensorrt") from error
    exported = to_exported(program, parameters, examples=True)
    values = exported.example_inputs[0]
    if any(not isinstance(size, int) for value in values for size in value.shape):
        raise CacheError("backend='torch_tensorrt' builds engines for fixed sizes: compile without dynamic=True")
    examples = [torch.zeros(value.shape, dtype=value.dtype, device=value.device) for value in values]
    try:
        with torch.no_grad():
            run = torch_tensorrt.dynamo.compile(exported, arg_inputs=examples, **options)
    except Exception as error:
        raise CacheError(
            f"Torch-TensorRT failed on the program that reuses {len(program.reused)} regions: "
            f"{type(error).__name__}: {error}"
        ) from error
    taken = tuple(entry for entry in program.inputs if entry.kind not in WEIGHTS)
    return replace(Lowered.of(program, run), inputs=taken, constants={})
