"""The user's weights, read where they lie: by name at run time, never copied, with a fingerprint that tells whether
compiled programs still fit them (design: invariant 7, currency)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .errors import StaleProgramError

_PLAIN = (bool, int, float, str, type(None))


class Parameters:
    """Resolves fully qualified names in a module to the tensors that are there now."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        # Where a name was found: the submodule's own table. A submodule that is replaced changes the fingerprint, and
        # with it all that was captured, so the table stays the right one; what it holds is looked up at every call.
        self._tables: dict[str, tuple[dict[str, Any], str]] = {}

    def __call__(self, name: str) -> torch.Tensor:
        """The parameter or buffer called `name`. Raises StaleProgramError if it is gone or lies on the meta device."""
        known = self._tables.get(name)
        if known is not None:
            held = known[0].get(known[1])
            if held is not None:
                return held
        owner: Any = self._module
        *path, last = name.split(".")
        try:
            for part in path:
                owner = getattr(owner, part)
            value = getattr(owner, last)
        except AttributeError:
            raise StaleProgramError(
                f"the model no longer has {name!r}, which its compiled program reads: build the cached denoiser again"
            ) from None
        if not isinstance(value, torch.Tensor):
            raise StaleProgramError(f"{name!r} is no tensor any more but {type(value).__name__}")
        for table in (owner._parameters, owner._buffers) if isinstance(owner, nn.Module) else ():
            if table.get(last) is value:
                self._tables[name] = (table, last)
        return value


def fingerprint(module: nn.Module) -> tuple[Any, ...]:
    """What a captured program has baked in: two equal fingerprints mean that it still computes the module's function.

    Counted: each submodule's identity, whether it is in training mode, its hooks, and the Python scalars it holds
    (LoRA scales and switches, say); of parameters, buffers and plain tensor attributes name, shape, strides,
    dtype and device. Not counted: their values, which programs read at run time.
    """
    parts: list[Any] = []
    for name, child in module.named_modules():
        parts.append((name, type(child), id(child), child.training))
        for store in (child._parameters, child._buffers):
            for key, tensor in store.items():
                parts.append((key, None if tensor is None else _layout(tensor)))
        if child._forward_hooks or child._forward_pre_hooks:
            parts.append(
                (tuple(map(id, child._forward_hooks.values())), tuple(map(id, child._forward_pre_hooks.values())))
            )
        held = vars(child)
        for key in sorted(held.keys() - _INTERNAL):
            seen = _scalar(held[key])
            if seen is not _SKIP:
                parts.append((key, seen))
    return tuple(parts)


# What every module holds for PyTorch's own use; looked at above where it matters.
_INTERNAL = frozenset(vars(nn.Module()))
_SKIP = object()


def _layout(tensor: torch.Tensor) -> tuple[Any, ...]:
    return (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)


def _scalar(value: Any, depth: int = 0) -> Any:
    """A hashable picture of the plain Python data in an attribute, or _SKIP if it is something else."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, (torch.dtype, torch.device)):
        return str(value)
    if isinstance(value, torch.Tensor):
        return ("tensor", id(value), *_layout(value))
    if callable(value) and depth == 0 and not isinstance(value, (type, nn.Module)):
        return ("callable", id(value)) if hasattr(value, "__func__") is False else _SKIP
    if depth < 3 and isinstance(value, (list, tuple, set, frozenset)):
        items = [_scalar(entry, depth + 1) for entry in value]
        return (type(value).__name__, tuple(item for item in items if item is not _SKIP))
    if depth < 3 and isinstance(value, dict):
        items = [(str(key), _scalar(entry, depth + 1)) for key, entry in value.items()]
        return ("dict", tuple((key, item) for key, item in items if item is not _SKIP))
    return _SKIP


def difference(before: tuple[Any, ...], after: tuple[Any, ...]) -> str:
    """In words, the first thing that differs between two fingerprints."""
    module = ""
    for old, new in zip(before, after, strict=False):
        if isinstance(old, tuple) and len(old) == 4 and isinstance(old[1], type):
            module = str(old[0])
        if old != new:
            if isinstance(old[0], str) and len(old) == 2 and isinstance(new[0], str) and old[0] == new[0]:
                return f"{module}.{old[0]}: {old[1]!r} became {new[1]!r}".lstrip(".")
            return (
                f"the modules at or after {module!r}"
                if module
                else "the model itself (training mode, hooks, attributes)"
            )
    return "the number of modules or parameters" if len(before) != len(after) else ""
