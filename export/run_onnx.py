"""ONNX Runtime: a model file as a callable of torch tensors, bound by address, so that nothing is copied."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffcache_fx.passes.real_pairs import as_pairs

from diffcache_fx.errors import BundleError, CallError
from diffcache_fx.sizes import Symbols

from .lowered import Run
from .manifest import Port, Program
from .ports import dtype_named, name_of_dtype

# Numbers of ONNX's element types; numpy has no bfloat16.
_ELEMENT = {
    torch.float32: 1,
    torch.uint8: 2,
    torch.int8: 3,
    torch.int16: 5,
    torch.int32: 6,
    torch.int64: 7,
    torch.bool: 9,
    torch.float16: 10,
    torch.float64: 11,
    torch.bfloat16: 16,
}


def runtime_version() -> str:
    """Raises BundleError where ONNX Runtime is not installed."""
    return str(_module().__version__)


def _module() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise BundleError(
            "ONNX Runtime is not installed: pip install onnxruntime (or onnxruntime-gpu, never both)"
        ) from error
    return onnxruntime


def open_model(
    path: Path,
    program: Program,
    device: torch.device,
    *,
    providers: Sequence[Any] | None = None,
    session_options: Mapping[str, Any] | None = None,
) -> Run:
    """A session for one program. providers: as ONNX Runtime takes them; None: CUDA's on a CUDA device, then the CPU's.
    session_options: attributes of `onnxruntime.SessionOptions`, and by names with a dot its configuration entries.
    Raises BundleError where the file does not load."""
    runtime = _module()
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    given = dict(session_options or {})
    # A generation alternates between sessions: threads that wait for work busily would take it from the next session.
    given.setdefault("session.force_spinning_stop", "1")
    if device.type == "cpu":
        options.intra_op_num_threads = torch.get_num_threads()
    for name, value in given.items():
        if "." in name:
            options.add_session_config_entry(name, str(value))
            continue
        if not hasattr(options, name):
            raise BundleError(f"ONNX Runtime's SessionOptions has no attribute {name!r}")
        setattr(options, name, value)
    wanted = list(providers) if providers is not None else _providers(device)
    have = set(runtime.get_available_providers())
    names = [provider if isinstance(provider, str) else provider[0] for provider in wanted]
    missing = [name for name in names if name not in have]
    if missing:
        raise BundleError(
            f"this ONNX Runtime has no {', '.join(missing)} (it has {', '.join(sorted(have))}): install the package "
            "that does, or choose another device or other providers"
        )
    try:
        session = runtime.InferenceSession(str(path), options, providers=wanted)
    except Exception as error:
        raise BundleError(f"ONNX Runtime does not load {path.name}: {str(error).strip().splitlines()[0]}") from error
    return _Session(session, program, device)


def _providers(device: torch.device) -> list[Any]:
    if device.type == "cpu":
        return ["CPUExecutionProvider"]
    if device.type != "cuda":
        raise BundleError(f"ONNX Runtime is driven on cpu and cuda here, not on {device.type}")
    stream = torch.cuda.current_stream(device).cuda_stream  # PyTorch's own, so that neither waits for the other
    own = {"device_id": device.index or 0, "user_compute_stream": str(stream)}
    return [("CUDAExecutionProvider", own), "CPUExecutionProvider"]


class _Session:
    """Called with one tensor for each input, returns one for each output, in memory of its own."""

    def __init__(self, session: Any, program: Program, device: torch.device) -> None:
        self._session, self._device = session, device
        self._local = threading.local()
        self._inputs = [(port.name, dtype_named(port.dtype).to_real()) for port in program.inputs]
        self._outputs = [(port, dtype_named(port.dtype)) for port in program.outputs]
        self._symbols = Symbols([port.shape for port in program.inputs])
        self._here = {entry.name for entry in session.get_inputs()}
        self._nothing = torch.zeros(1, device=device)
        self._check(program.inputs, session)

    def _check(self, ports: Sequence[Port], session: Any) -> None:
        unknown = self._here - {port.name for port in ports}
        if unknown:
            raise BundleError(f"the model wants {', '.join(sorted(unknown))}, which the manifest does not name")

    def __call__(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        binding, bound = self._bound()
        for index, ((name, dtype), tensor) in enumerate(zip(self._inputs, tensors, strict=True)):
            if name not in self._here:  # nothing in the model reads it
                continue
            value = as_pairs(tensor)
            value = value if value.is_contiguous() else value.contiguous()
            place = (value.data_ptr(), value.shape, value.dtype)
            if index in bound and bound[index][0] == place:  # the same memory as at the call before, such as weights
                bound[index] = place, value
                continue
            if value.dtype != dtype:
                raise CallError(f"{name} must be {name_of_dtype(dtype)}, not {name_of_dtype(value.dtype)}")
            binding.bind_input(name, *self._place(value))
            bound[index] = place, value  # held until the run is over
        sizes = self._symbols.bind([tensor.shape for tensor in tensors])
        results = []
        for port, dtype in self._outputs:
            made = torch.empty(sizes.of(port.shape), dtype=dtype, device=self._device)
            results.append(made)
            binding.bind_output(port.name, *self._place(as_pairs(made)))
        if self._device.type == "cuda":
            binding.synchronize_inputs()
        self._session.run_with_iobinding(binding)
        if self._device.type == "cuda":
            binding.synchronize_outputs()
        return results

    def _bound(self) -> tuple[Any, dict[int, Any]]:
        """This thread's binding, and what each input is bound to."""
        if not hasattr(self._local, "binding"):
            self._local.binding, self._local.bound = self._session.io_binding(), {}
        return self._local.binding, self._local.bound

    def _place(self, tensor: torch.Tensor) -> tuple[str, int, int, tuple[int, ...], int]:
        # An empty tensor has no address; ONNX Runtime asks for one, and reads and writes nothing there.
        return (
            tensor.device.type,
            tensor.device.index or 0,
            _ELEMENT[tensor.dtype],
            tuple(tensor.shape),
            tensor.data_ptr() or self._nothing.data_ptr(),
        )
