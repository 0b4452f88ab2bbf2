"""TensorRT's runtime: an engine as a callable of torch tensors on a GPU, bound by address, on PyTorch's stream."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch
from diffcache_fx.passes.real_pairs import as_pairs

from diffcache_fx.errors import BundleError, ExportError
from diffcache_fx.sizes import Symbols

from .lowered import Run
from .manifest import Program
from .ports import dtype_named
from .tensorrt import find_tensorrt


class Engines:
    """Opens the engines of one bundle on one GPU. Raises BundleError where there is none, or no TensorRT."""

    def __init__(self, device: torch.device) -> None:
        if device.type != "cuda":
            raise BundleError(f"TensorRT engines run on a GPU: load_bundle(..., device='cuda'), not {device}")
        if not torch.cuda.is_available():
            raise BundleError("TensorRT engines run on a GPU, and PyTorch finds none here")
        try:
            self._trt = find_tensorrt()
        except ExportError as error:
            raise BundleError(str(error)) from error
        self._device = device
        self._log = self._trt.Logger(self._trt.Logger.ERROR)
        self._runtime = self._trt.Runtime(self._log)

    def open(self, path: Path, program: Program) -> Run:
        """An engine. Raises BundleError where it does not load on this GPU."""
        engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if engine is None:
            raise BundleError(
                f"TensorRT does not load {path.name} on {torch.cuda.get_device_name(self._device)}: engines are for "
                "the version, and the kinds of GPU, that they were built for; export again here"
            )
        return _Engine(engine, program, self._device)


class _Engine:
    """Called with one tensor for each input; each thread has an execution context of its own."""

    def __init__(self, engine: Any, program: Program, device: torch.device) -> None:
        self._engine, self._program, self._device = engine, program, device
        self._local = threading.local()
        self._symbols = Symbols([port.shape for port in program.inputs])
        self._here = {engine.get_tensor_name(i) for i in range(engine.num_io_tensors)}

    def __call__(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        context = getattr(self._local, "context", None)
        if context is None:
            context = self._local.context = self._engine.create_execution_context()
        held = []  # until the stream has passed them
        for port, tensor in zip(self._program.inputs, tensors, strict=True):
            if port.name in self._here:
                value = as_pairs(tensor.to(self._device)).contiguous()  # predicates and rows come from the host
                held.append(value)
                context.set_input_shape(port.name, tuple(value.shape))
                context.set_tensor_address(port.name, value.data_ptr())
        sizes = self._symbols.bind([tensor.shape for tensor in tensors])
        results = []
        for port in self._program.outputs:
            made = torch.empty(sizes.of(port.shape), dtype=dtype_named(port.dtype), device=self._device)
            context.set_tensor_address(port.name, made.data_ptr())
            results.append(made)
        stream = torch.cuda.current_stream(self._device)
        if not context.execute_async_v3(stream.cuda_stream):
            raise BundleError(f"TensorRT could not run {self._program.file}")
        for value in held:
            value.record_stream(stream)
        return results
