"""What this machine can do: versions, processor, accelerators, and which runtimes import here."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
from collections.abc import Callable
from dataclasses import dataclass

import torch

PACKAGES = (
    "torch",
    "diffusers",
    "safetensors",
    "numpy",
    "networkx",
    "transformers",
    "accelerate",
    "peft",
    "matplotlib",
    "torchmetrics",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "torch-tensorrt",
    "tensorrt-rtx-cu13",
)


@dataclass(frozen=True)
class Finding:
    """One fact: its subject, whether it is well, and in words what was found or what is missing."""

    subject: str
    well: bool
    detail: str


def versions() -> list[Finding]:
    """Installed packages that this library uses, or could use."""
    found = [Finding("Python", True, platform.python_version())]
    for name in PACKAGES:
        try:
            found.append(Finding(name, True, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            found.append(Finding(name, False, "not installed"))
    return found


def processor() -> list[Finding]:
    """Cores, vector instructions and accelerators."""
    found = [
        Finding("cores", True, f"{os.cpu_count()} seen, {torch.get_num_threads()} threads used by torch"),
        Finding("vector instructions", True, torch.backends.cpu.get_cpu_capability()),
    ]
    capabilities: Callable[[], dict[str, object]] | None = getattr(torch.cpu, "get_capabilities", None)
    if capabilities is not None:
        has = capabilities()
        units = [title for key, title in (("amx_bf16", "AMX"), ("avx512_bf16", "AVX-512")) if has.get(key)]
        detail = f"{' and '.join(units)} instructions" if units else "none: bfloat16 gains little on this processor"
        found.append(Finding("bfloat16 products", bool(units), detail))
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(index)
            found.append(Finding(f"GPU {index}", True, f"{torch.cuda.get_device_name(index)}, SM {major}.{minor}"))
    else:
        built = torch.version.cuda or torch.version.hip
        reason = "this torch is built for the CPU" if built is None else f"torch is built for {built}, no device found"
        found.append(Finding("GPU", False, reason))
    return found


def backends() -> list[Finding]:
    """What can run a step here, and what is missing for the rest."""
    return [
        Finding("eager", True, "operator by operator"),
        _inductor(),
        _aot_inductor(),
        _onnxruntime(),
        _tensorrt(),
        _imports("torch_tensorrt", ("torch_tensorrt",), "a CUDA build of torch and pip install 'diffcache_fx[gpu]'"),
    ]


def _inductor() -> Finding:
    if torch.cuda.is_available():
        return _imports("inductor", ("triton",), "pip install triton")
    compiler = os.environ.get("CXX") or next((c for c in ("g++", "clang++", "c++") if shutil.which(c)), None)
    if compiler is None:
        return Finding("inductor", False, "needs a C++ compiler: install g++ or clang++, or name one in CXX")
    return Finding("inductor", True, f"C++ through {os.path.basename(compiler)}")


def _aot_inductor() -> Finding:
    """What builds packages is Inductor; what runs them is PyTorch itself."""
    found = _inductor()
    return Finding("aot-inductor", found.well, f"builds with and runs in torch; {found.detail}")


def _onnxruntime() -> Finding:
    found = _imports("onnxruntime", ("onnx", "onnxscript", "onnxruntime"), "pip install 'diffcache_fx[onnx]'")
    if not found.well:
        return found
    import onnxruntime

    names = ", ".join(name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers())
    return Finding("onnxruntime", True, f"exports and runs; providers: {names}")


def _tensorrt() -> Finding:
    """Building an engine needs no GPU with TensorRT-RTX; running one always does."""
    from .errors import ExportError
    from .export.tensorrt import find_tensorrt

    try:
        module = find_tensorrt()
    except ExportError as error:
        return Finding("tensorrt", False, str(error))
    runs = "runs them" if torch.cuda.is_available() else "running them needs a GPU, and there is none"
    return Finding("tensorrt", True, f"{module.__name__} {module.__version__} builds engines; {runs}")


def _imports(subject: str, modules: tuple[str, ...], way: str) -> Finding:
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError as error:
            missing = "is not installed" if getattr(error, "name", None) == name else f"does not import: {error}"
            return Finding(subject, False, f"{name} {missing}; {way}")
        except Exception as error:
            return Finding(subject, False, f"{name} fails at import: {type(error).__name__}: {error}")
    return Finding(subject, True, f"{', '.join(modules)} import")
