"""What ONNX, its exporter or ONNX Runtime take only in another form: rules for `Decompose`, by operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

aten = torch.ops.aten


def _index(x: torch.Tensor, indices: list[torch.Tensor | None]) -> Any:
    """GatherND takes int64 indices only."""
    if not any(index is not None and index.dtype == torch.int32 for index in indices):
        return NotImplemented
    wide = [index.long() if index is not None and index.dtype == torch.int32 else index for index in indices]
    return aten.index.Tensor(x, wide)


def _where(condition: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> Any:
    """ONNX Runtime's CPU provider has no Where of booleans."""
    if a.dtype != torch.bool or b.dtype != torch.bool:
        return NotImplemented
    return (condition & a) | (~condition & b)


def _masked_fill(x: torch.Tensor, mask: torch.Tensor, value: Any) -> Any:
    if x.dtype != torch.bool or isinstance(value, torch.Tensor):
        return NotImplemented
    return (x | mask) if value else (x & ~mask)


RULES: dict[Any, Callable[..., Any]] = {
    aten.index.Tensor: _index,
    aten.where.self: _where,
    aten.masked_fill.Scalar: _masked_fill,
}
