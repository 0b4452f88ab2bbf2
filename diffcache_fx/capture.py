"""Capture: a module and an example call become one functional `StepProgram`.

`torch.export` in non-strict mode first; where that fails, the other ways in `_WAYS`, in order. Whatever the way, the
exported program is made functional by `run_decompositions({})`: plain export may hold in-place writes.

Real example tensors are also used for one plain call before tracing (models that build tables lazily must not build
them from traced values) and for one call of the program after it, whose outputs must be those of the plain call.
"""

from __future__ import annotations

import dataclasses
import logging
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from .calling import Call, ShapeRules, is_number, note_sizes, number_tensor
from .errors import CallError, CaptureError
from .exported import FlatModel, ModelOutput, to_program
from .parameters import Parameters
from .program import StepProgram
from .values import layout_inputs

log = logging.getLogger(__name__)
Dynamic = bool | Literal["batch"]


def capture(
    module: nn.Module, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None, *, dynamic: Dynamic = False
) -> tuple[StepProgram, ShapeRules]:
    """Trace one call of `module` to a StepProgram.

    args, kwargs: an example call (real or fake tensors). Python numbers become 0-d tensors, except those that reach a
    shape or a branch, which stay constants. dynamic: keep sizes symbolic where the model allows it; "batch": those of
    first dimensions only.

    Returns the program and the rules that tell which other shapes it serves.
    Raises CaptureError where no way of tracing works, CallError for a module in training mode and for a call without
    tensors; what the model itself raises on the example call passes through.
    """
    call = Call.of(module, args, kwargs or {})
    if module.training:
        raise CallError(
            f"{type(module).__name__} is in training mode: its dropout would differ at every step. Call .eval() first."
        )
    tensors = tuple(i for i, leaf in enumerate(call.leaves) if isinstance(leaf, torch.Tensor))
    if not tensors:
        raise CallError(f"the call of {type(module).__name__} holds no tensor: give the latents as a torch.Tensor.")
    numbers = tuple(i for i, leaf in enumerate(call.leaves) if is_number(leaf))
    start = time.perf_counter()
    attempt = _Attempts(module, call, tensors, dynamic)
    program, rules = attempt.best(numbers)
    log.info(
        "captured %s in %.1f s by %s: %d nodes",
        type(module).__name__,
        time.perf_counter() - start,
        program.captured_by,
        len(program.graph.nodes),
    )
    return program, rules


class _Attempts:
    """Tries the ways of tracing, with as many Python numbers as tensors as the model bears."""

    def __init__(self, module: nn.Module, call: Call, tensors: tuple[int, ...], dynamic: Dynamic) -> None:
        self.module, self.call, self.tensors, self.dynamic = module, call, tensors, dynamic
        self.failures: list[tuple[str, BaseException]] = []
        examples = [call.leaves[i] for i in tensors]
        self.real = not any(isinstance(t, FakeTensor) or t.device.type == "meta" for t in examples)
        self.reference: list[torch.Tensor] | None = self._plain_call() if self.real else None
        self.known: tuple[int, ...] = ()  # tensors whose values are baked in

    def _plain_call(self) -> list[torch.Tensor]:
        args, kwargs = pytree.tree_unflatten(self.call.leaves, self.call.spec)
        with torch.no_grad():
            leaves = pytree.tree_leaves(self.module(*args, **kwargs))
        return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]

    def best(self, numbers: tuple[int, ...]) -> tuple[StepProgram, ShapeRules]:
        free = tuple(index for index in numbers if self._may_vary(index))
        for name, way in _WAYS:
            found = self._try(name, way, free)
            if found is None and free:
                found = self._try(name, way, ())
            if found is not None:
                return found
        if self.real and self._bake():
            found = self._try("export with known values", _non_strict, ())
            if found is not None:
                return found
        raise CaptureError(self._explain()) from self.failures[0][1]

    def _bake(self) -> bool:
        """Make constants of the inputs that may decide shapes and branches; False if there are none."""
        leaves = list(self.call.leaves)
        self.known = layout_inputs(leaves, self.call.names)
        for index in self.known:
            leaves[index] = leaves[index].clone()  # the caller may write to his own
        self.call = dataclasses.replace(self.call, leaves=tuple(leaves))
        self.tensors = tuple(index for index in self.tensors if index not in self.known)
        return bool(self.known and self.tensors)

    def _may_vary(self, index: int) -> bool:
        """Whether the model runs on a tensor whose value is unknown in place of this number: it reaches no shape and no
        branch. Tried on fake tensors, which takes a fraction of a trace."""
        leaves = list(self.call.leaves)
        fake = next((leaf for leaf in leaves if isinstance(leaf, FakeTensor)), None)
        mode = FakeTensorMode(allow_non_fake_inputs=True) if fake is None else fake.fake_mode
        try:
            with mode, torch.no_grad(), _quiet():
                leaves = [
                    mode.from_tensor(leaf)
                    if isinstance(leaf, torch.Tensor) and not isinstance(leaf, FakeTensor)
                    else leaf
                    for leaf in leaves
                ]
                leaves[index] = mode.from_tensor(number_tensor(leaves[index]))
                args, kwargs = pytree.tree_unflatten(leaves, self.call.spec)
                self.module(*args, **kwargs)
        except Exception as error:
            log.debug("%s stays a constant: %s", self.call.names[index], error)
            return False
        return True

    def _try(
        self, name: str, way: Callable[..., Any], numbers: tuple[int, ...]
    ) -> tuple[StepProgram, ShapeRules] | None:
        variable = tuple(sorted((*self.tensors, *numbers)))
        output = ModelOutput()
        flat = FlatModel(self.module, self.call, variable, output, self.known)
        inputs = tuple(
            leaf.contiguous() if isinstance(leaf, torch.Tensor) else number_tensor(leaf)
            for leaf in (self.call.leaves[i] for i in variable)
        )
        try:
            with torch.no_grad(), _quiet():
                exported = way(flat, inputs, self.dynamic)
                exported = exported.run_decompositions({})
                program = to_program(exported, flat, output, self.call, variable, frozenset(numbers), name)
                self._check(program, inputs)
        except Exception as error:
            self.failures.append((name, error))
            log.info("capture by %s failed: %s", name, str(error).splitlines()[0] if str(error) else repr(error))
            return None
        guards = _guards(exported) if self.dynamic else []
        return program, ShapeRules(program, exported.range_constraints, guards)

    def _check(self, program: StepProgram, inputs: tuple[torch.Tensor, ...]) -> None:
        """Compare the program with the plain call: wrong numbers are worse than no program."""
        if self.reference is None:
            return
        given = program.bind(Parameters(self.module), list(inputs))
        note_sizes(program, given)
        got = program.module(*given)
        same = all(torch.equal(a, b) for a, b in zip(got, self.reference, strict=True))
        if same:
            return
        for ours, theirs in zip(got, self.reference, strict=True):
            scale = theirs.abs().amax().item() if theirs.numel() else 0.0
            worst = (ours.double() - theirs.double()).abs().amax().item() if theirs.numel() else 0.0
            rounding = 1e-4 if theirs.dtype in (torch.float32, torch.float64) else 5e-2
            if not worst <= rounding * max(scale, 1e-6):
                raise CaptureError(
                    f"the traced {type(self.module).__name__} computes something else than the model (off by "
                    f"{worst:.3g} of {scale:.3g}): it draws random numbers, or keeps state from call to call"
                )
        log.warning(
            "the traced %s agrees with the model to rounding only: the model takes another kernel in eager mode",
            type(self.module).__name__,
        )

    def _explain(self) -> str:
        kind = type(self.module).__name__
        _, error = self.failures[0]
        first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        if isinstance(error, CaptureError):
            return str(error)
        tried = ", ".join(dict.fromkeys(way for way, _ in self.failures))
        return (
            f"{kind} cannot be traced to one graph (tried: {tried}). {type(error).__name__}: {first[:300]}"
            f"{_user_line(error)} Try: passing varying numbers as tensors, fixed shapes instead of data-dependent "
            f"ones, or a smaller part of the model (for example `model.transformer`)."
        )


def _export(flat: nn.Module, inputs: tuple[torch.Tensor, ...], dynamic: Dynamic, strict: bool) -> Any:
    shapes = None
    if dynamic:
        auto = torch.export.Dim.AUTO
        most = 1 if dynamic == "batch" else None
        shapes = (tuple({dim: auto for dim, size in enumerate(tensor.shape[:most]) if size > 1} for tensor in inputs),)
    return torch.export.export(flat, inputs, dynamic_shapes=shapes, strict=strict)


def _non_strict(flat: nn.Module, inputs: tuple[torch.Tensor, ...], dynamic: Dynamic) -> Any:
    return _export(flat, inputs, dynamic, strict=False)


def _dynamo(flat: nn.Module, inputs: tuple[torch.Tensor, ...], dynamic: Dynamic) -> Any:
    return _export(flat, inputs, dynamic, strict=True)


_WAYS: tuple[tuple[str, Callable[..., Any]], ...] = (
    ("export", _non_strict),
    ("dynamo", _dynamo),
)


def _guards(exported: Any) -> list[Any]:
    for node in exported.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, FakeTensor):
            environment = value.fake_mode.shape_env
            return [guard.expr for guard in environment.guards] if environment is not None else []
    return []


def _user_line(error: BaseException) -> str:
    """Where in the model's own code tracing stopped: ` At FILE:LINE in NAME: CODE.`, or an empty string."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.line
        and not any(part in frame.filename for part in ("/torch/", "/sympy/"))
        and not frame.filename.endswith(("/diffcache_fx/capture.py", "/contextlib.py"))
    ]
    if not frames:
        return ""
    frame = frames[-1]
    return f" At {frame.filename.rpartition('/')[2]}:{frame.lineno} in {frame.name}: `{frame.line}`."


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep export's own warnings (deprecated tree specs and the like) out of the user's terminal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
