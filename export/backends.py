"""Which backends there are, and what each takes: checked before anything is traced."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from diffcache_fx.errors import CacheError, nearest

from .torch_compile import find_backend

_OWN = ("backend", "example_inputs", "num_steps", "dynamic", "decide", "max_programs", "refinement")


def check_backend(backend: str | Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Raises CacheError for a backend that is not there, or options that it does not take."""
    known: list[str] = []
    if backend == "inductor":
        known = ["outlining", *torch._inductor.list_options()]
    elif backend == "onnxruntime":
        known = ["providers", "session_options"]
    elif backend == "torch_tensorrt":
        return  # its compiler's settings, which only it knows
    elif backend != "eager":
        find_backend(backend)
    unknown = sorted(set(options) - set(known))
    if unknown:
        name = backend if isinstance(backend, str) else getattr(backend, "__name__", "given")
        near = nearest(unknown[0], [*_OWN, *known])
        taken = f"has no option {unknown[0]!r}" if known else f"takes no options, not {unknown[0]!r} either"
        raise CacheError(f"the {name} backend {taken}{near}")
