"""Lowering through a torch.compile backend, called directly: Dynamo sees nothing and guards nothing at run time, since
the capture key already decides which program fits a call."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from diffcache_fx.errors import CacheError
from diffcache_fx.program import StepProgram

from .lowered import Lowered
from .outline import outline

log = logging.getLogger(__name__)


def lower(
    program: StepProgram, backend: str | Callable[..., Any] = "inductor", *, outlining: bool = True, **options: Any
) -> Lowered:
    """Compile a step program as one full graph.

    backend: "inductor", the name of any other registered torch.compile backend, or a callable of the same kind.
    outlining: make repeated blocks one subgraph, compiled once ("inductor" only). options: Inductor config entries.
    Raises CacheError if the backend is unknown or fails, naming it.
    """
    start = time.perf_counter()
    copied = program.copy()
    module = copied.module
    examples = [node.meta["val"] for node in module.graph.find_nodes(op="placeholder")]
    try:
        with torch.no_grad():
            if backend == "inductor":
                if outlining and not _symbolic(examples):  # Inductor's subgraph calls want plain sizes
                    module = outline(copied).module
                run = _inductor(module, examples, options)
            else:
                run = _other(module, examples, backend)
    except CacheError:
        raise
    except Exception as error:
        raise CacheError(
            f"the backend {backend!r} failed on the program that reuses {len(program.reused)} regions: "
            f"{type(error).__name__}: {error}"
        ) from error
    log.info(
        "compiled %d nodes with %s in %.1f s (reusing %d regions)",
        len(program.graph.nodes),
        backend,
        time.perf_counter() - start,
        len(program.reused),
    )
    return Lowered.of(program, run)


def _symbolic(examples: list[Any]) -> bool:
    tensors = [value for value in examples if isinstance(value, torch.Tensor)]
    return any(not isinstance(size, int) for tensor in tensors for size in tensor.shape)


def _inductor(module: fx.GraphModule, examples: list[Any], options: dict[str, Any]) -> Callable[..., Any]:
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(module, examples, config_patches=options or None)


def _other(module: fx.GraphModule, examples: list[Any], backend: str | Callable[..., Any]) -> Callable[..., Any]:
    return find_backend(backend)(module, examples)


def find_backend(backend: str | Callable[..., Any]) -> Callable[..., Any]:
    """The compiler behind a torch.compile backend's name; raises CacheError where there is none."""
    if not isinstance(backend, str):
        return backend
    import torch._dynamo as dynamo

    try:
        return dynamo.lookup_backend(backend)
    except Exception as error:
        names = ", ".join(sorted({"eager", "onnxruntime", "torch_tensorrt", *dynamo.list_backends()}))
        raise CacheError(f"no backend is called {backend!r}; here are: {names}") from error
