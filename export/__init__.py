"""Lowerings: one target per file, each from a StepProgram to something callable or to a file; and bundles, which carry
a cached denoiser out of Python.

`to_onnx(cached, folder, form=...)` writes a bundle, `load_bundle(folder)` runs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .loaded import BundleDenoiser, load_bundle
    from .onnx import to_onnx

__all__ = ["BundleDenoiser", "load_bundle", "to_onnx"]
_HOMES = {"to_onnx": "onnx", "load_bundle": "loaded", "BundleDenoiser": "loaded"}


def __getattr__(name: str) -> Any:
    """Exporters are imported when they are asked for: the compiler imports this package, and they import the
    compiler."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)
