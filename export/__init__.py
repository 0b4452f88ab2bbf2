"""Lowerings: one target per file, each from a StepProgram to something callable or to a file; and bundles, which carry
a cached denoiser out of Python.

`to_onnx`, `to_aot_inductor` and `to_tensorrt(cached, folder, form=...)` write a bundle, `load_bundle(folder)` runs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .aot_inductor import to_aot_inductor
    from .loaded import BundleDenoiser, load_bundle
    from .onnx import to_onnx
    from .tensorrt import to_tensorrt
    from .triton import to_triton_repository

__all__ = ["BundleDenoiser", "load_bundle", "to_aot_inductor", "to_onnx", "to_tensorrt", "to_triton_repository"]
_HOMES = {
    "to_onnx": "onnx",
    "to_aot_inductor": "aot_inductor",
    "to_tensorrt": "tensorrt",
    "to_triton_repository": "triton",
    "load_bundle": "loaded",
    "BundleDenoiser": "loaded",
}


def __getattr__(name: str) -> Any:
    """Exporters are imported when they are asked for: the compiler imports this package, and they import the
    compiler."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
