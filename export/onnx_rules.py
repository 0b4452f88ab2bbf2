"""What ONNX, its exporter or ONNX Runtime take only in another form: rules for `Decompose`, by operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffcache_fx.passes.everywhere import everywhere
from torch import fx

from diffcache_fx.program import StepProgram

aten = torch.ops.aten


def _index(x: torch.Tensor, indices: list[torch.Tensor | None]) -> torch.Tensor:
    """GatherND takes int64 indices only."""
    return aten.index.Tensor(x, [i if i is None or i.dtype != torch.int32 else i.long() for i in indices])


def _where(condition: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """ONNX Runtime's CPU provider has no Where of booleans."""
    return (condition & a) | (~condition & b)


def _masked_fill(x: torch.Tensor, mask: torch.Tensor, value: Any) -> torch.Tensor:
    return (x | mask) if value else (x & ~mask)


def _product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return a & b


def _sort(x: torch.Tensor, *, stable: bool | None, dim: int = -1, descending: bool = False) -> Any:
    """TopK, which sorting becomes, keeps equal elements in order anyway."""
    return aten.sort.default(x, dim, descending)


def _flex_attention(*args: Any) -> Any:
    """By its definition, over all pairs of queries and keys."""
    from torch._higher_order_ops.flex_attention import math_attention

    return math_attention(*args)


RULES: dict[Any, Callable[..., Any]] = {
    aten.index.Tensor: _index,
    aten.where.self: _where,
    aten.masked_fill.Scalar: _masked_fill,
    aten.mul.Tensor: _product,
    aten.sort.stable: _sort,
    torch.ops.higher_order.flex_attention: _flex_attention,
}


def concerned(node: fx.Node) -> bool:
    """Whether a node is of the types that its rule is for."""
    if node.target is aten.index.Tensor:
        return any(_narrow(index.meta["val"]) for index in node.args[1] if index is not None)  # type: ignore[union-attr]
    if node.target in (aten.sort.stable, torch.ops.higher_order.flex_attention):
        return True
    values = [argument.meta["val"] for argument in node.args if isinstance(argument, fx.Node)]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    plain = len(tensors) == len(node.args) or node.target is aten.masked_fill.Scalar
    return plain and all(tensor.dtype == torch.bool for tensor in tensors)


def _narrow(index: Any) -> bool:
    return isinstance(index, torch.Tensor) and index.dtype == torch.int32


def with_reshapes(program: StepProgram) -> StepProgram:
    """Reshapes in place of views: ONNX knows no layout in memory, and a rule may have changed it."""

    def rewrite(graph: fx.Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=aten.view.default):
            node.target = aten.reshape.default

    return everywhere(program, rewrite)
