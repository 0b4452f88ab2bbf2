"""Tracing with the values of some inputs baked in, for models whose shapes or branches depend on them: text lengths
read from a mask, places of tokens, the largest position.

What is computed from baked inputs alone is computed for real while the model is traced, so `.tolist()`, `.item()`, a
branch or a boolean index finds plain numbers. The values belong to the key of the captured program.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from .errors import CaptureError
from .passes.reach import TIME_NAMES

# Larger tensors are data, not a layout, and comparing them at every call would cost.
_LARGEST = 1 << 16


def layout_inputs(leaves: Sequence[Any], names: Sequence[str]) -> tuple[int, ...]:
    """The leaves worth baking in: small boolean and integer tensors that are no timestep."""
    return tuple(
        index
        for index, leaf in enumerate(leaves)
        if isinstance(leaf, torch.Tensor)
        and not leaf.is_floating_point()
        and not leaf.is_complex()
        and 0 < leaf.numel() <= _LARGEST
        and names[index] not in TIME_NAMES
    )


class KnownValues(TorchFunctionMode):
    """While active, functions of known tensors alone run for real, and their results are known too."""

    def __init__(self, known: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self._known = {id(tensor): tensor for tensor in known}
        self._traced: dict[int, torch.Tensor] = {}  # constants of the graph, for known tensors that meet others
        self._overwritten: dict[int, torch.Tensor] = {}  # tensors once known that varying values were written to

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        known = [tensor for tensor in tensors if id(tensor) in self._known]
        if not known:
            return func(*args, **kwargs)
        if len(known) == len(tensors) and not any(id(tensor) in self._overwritten for tensor in tensors):
            with _disable_current_modes(), torch._C.DisableTorchFunction():
                result = func(*args, **kwargs)
            for leaf in pytree.tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    self._known[id(leaf)] = leaf
            return result
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            args = (args[0], self._places(args[1]), *args[2:])
        if args and id(args[0]) in self._known and _writes(func):
            self._overwrite(args[0])
        args, kwargs = pytree.tree_map_only(torch.Tensor, self._in_graph, (args, kwargs))
        return func(*args, **kwargs)

    def _in_graph(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor itself, or, if known, a constant of the graph that is being traced."""
        place = id(tensor)
        if place not in self._known:
            return tensor
        if place not in self._traced:
            with _disable_current_modes(), torch._C.DisableTorchFunction():
                data, shape = tensor.reshape(-1).tolist(), tuple(tensor.shape)
            constant = torch.tensor(data, dtype=tensor.dtype, device=tensor.device)
            self._traced[place] = constant.reshape(shape).clone()
        return self._traced[place]

    def _places(self, index: Any) -> Any:
        """An index in which known masks are replaced by the places where they are true: a size known ahead."""
        parts: list[Any] = []
        for part in index if isinstance(index, tuple) else (index,):
            if isinstance(part, torch.Tensor) and id(part) in self._known and part.dtype == torch.bool and part.dim():
                with _disable_current_modes(), torch._C.DisableTorchFunction():
                    found = part.nonzero(as_tuple=True)
                self._known |= {id(places): places for places in found}
                parts += found
            else:
                parts.append(part)
        return tuple(parts)

    def _overwrite(self, tensor: torch.Tensor) -> None:
        """From here on the tensor is one of the graph. Refused where another known tensor shows the same memory."""
        if id(tensor) in self._overwritten:
            return
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            memory = tensor.untyped_storage().data_ptr()
            shared = [other for other in self._known.values() if other.untyped_storage().data_ptr() == memory]
        if len(shared) > 1:
            raise CaptureError("varying values are written into a view of a tensor made from baked values")
        self._overwritten[id(tensor)] = tensor


def _writes(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) or name.startswith("__i")
