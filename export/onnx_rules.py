"""What ONNX, its exporter or ONNX Runtime take only in another form: rules for `Decompose`, by operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffcache_fx.passes.decompose import Decompose
from diffcache_fx.passes.everywhere import everywhere
from diffcache_fx.passes.fold_constants import LARGEST, FoldConstants
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


def _attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None, *rest: Any, **by_name: Any
) -> Any:
    """The exporter takes [batch, heads, tokens, width] only."""
    if not q.dim() == k.dim() == v.dim() == 3:
        return NotImplemented
    if mask is not None and mask.dim() == 3:
        mask = mask.unsqueeze(1)
    q, k, v = (x.unsqueeze(1) for x in (q, k, v))
    return aten.scaled_dot_product_attention.default(q, k, v, mask, *rest, **by_name).squeeze(1)


def _flex_attention(*args: Any) -> Any:
    """By its definition, over all pairs of queries and keys."""
    from torch._higher_order_ops.flex_attention import math_attention

    return math_attention(*args)


def _smoothed(kind: Any) -> Callable[..., Any]:
    """Resizing that guards against aliasing is linear along each axis: two products with matrices, which are what the
    operator makes of the unit vectors. ONNX Runtime's weights near an edge are others than PyTorch's, and TensorRT has
    no such operator at all."""

    def rule(x: torch.Tensor, size: Any, aligned: bool, *given: Any) -> Any:
        scales = list(given[0] or [None, None]) if given and isinstance(given[0], (list, tuple)) else [*given]
        scales = [*scales, None, None][:2]
        old = x.shape[-2:]
        new = size or [int(length * scale) for length, scale in zip(old, scales, strict=True)]
        lengths = (*old, *new)
        if not x.is_floating_point() or not all(isinstance(length, int) for length in lengths):
            return NotImplemented
        if max(length * max(old) for length in lengths) > LARGEST:  # the unit vectors and the weights
            return NotImplemented
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32

        def weights(axis: int) -> torch.Tensor:
            unit = torch.eye(old[axis], dtype=wide, device=x.device)[None, None]
            made = kind(unit, [new[axis], old[axis]], aligned, scales[axis], None)
            return made[0, 0].T.to(x.dtype)

        return (x @ weights(1)).transpose(-1, -2).matmul(weights(0)).transpose(-1, -2)

    return rule


_SMOOTHED = {
    overload: _smoothed(packet.default)
    for packet in (aten._upsample_bicubic2d_aa, aten._upsample_bilinear2d_aa)
    for overload in (packet.default, packet.vec)
}


def with_constants(program: StepProgram, parameters: Callable[[str], torch.Tensor] | None) -> StepProgram:
    """A program as it is written: what depends on no input is a constant (parameters: see FoldConstants)."""
    return FoldConstants(parameters)(Decompose(_SMOOTHED, _of_inputs)(program))


def _of_inputs(node: fx.Node) -> bool:
    """Whether what is resized is more than the unit vectors, which the rule itself resizes."""
    source: Any = node.args[0]
    while source.op == "call_function" and source.target is aten.unsqueeze.default:
        source = source.args[0]
    return source.target is not aten.eye.default


RULES: dict[Any, Callable[..., Any]] = {
    aten.index.Tensor: _index,
    aten.where.self: _where,
    aten.masked_fill.Scalar: _masked_fill,
    aten.mul.Tensor: _product,
    aten.sort.stable: _sort,
    aten.scaled_dot_product_attention.default: _attention,
    torch.ops.higher_order.flex_attention: _flex_attention,
}


def concerned(node: fx.Node) -> bool:
    """Whether a node is of the types that its rule is for."""
    if node.target is aten.index.Tensor:
        return any(_narrow(index.meta["val"]) for index in node.args[1] if index is not None)  # type: ignore[union-attr]
    if node.target is aten.scaled_dot_product_attention.default:
        return node.args[0].meta["val"].dim() == 3  # type: ignore[union-attr]
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
