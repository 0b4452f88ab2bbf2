"""Normalize: remove what computes nothing, so that later passes and exporters meet only real work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from diffcache_fx.program import StepProgram, same_layout, value_of

from .aliasing import root_of
from .purity import draws_random, eliminate_dead, is_assert, mutates

aten = torch.ops.aten


@dataclass(frozen=True)
class Normalize:
    """Delete asserts, and replace operators that return their argument unchanged by that argument.

    Rules:
    1. Runtime asserts left by export are deleted.
    2. `dropout` in evaluation mode, `detach`, `alias`, `lift_fresh_copy` become their argument.
    3. `squeeze` on dimensions that are not 1, `view`/`reshape`/`expand` to the same shape, and a `slice` of everything
       become their argument.
    4. So do a `clone` or `_to_copy` that changes neither dtype nor strides, unless it is of one of the program's inputs
       or something writes in place; and a division or product of a floating-point tensor by the number 1.
    5. Unused nodes are deleted by the project's purity rule.

    Before:  a = squeeze(x, 1); b = dropout(a, 0.1, False); _assert_tensor_metadata(b); c = relu(b)
    After:   c = relu(x)

    Export writes dropout in evaluation mode as a `clone`: a copy of every activation it stands on. Nothing that
    changes values, dtypes, strides of a copied tensor, or the program's inputs and outputs is touched.
    """

    def __call__(self, program: StepProgram) -> StepProgram:
        result = program.copy()
        graph = result.graph
        for node in list(graph.nodes):
            if is_assert(node):
                graph.erase_node(node)
        written = any(mutates(node) for node in graph.nodes)
        for node in list(graph.nodes):
            if node.op == "call_function" and _is_no_op(node) and not (written and _copies(node)):
                source = node.args[0]
                assert isinstance(source, fx.Node)
                node.replace_all_uses_with(source)
                graph.erase_node(node)
        eliminate_dead(graph)
        graph.lint()
        return result


def _same_shape(node: fx.Node) -> bool:
    before, after = value_of(node.args[0]), value_of(node)  # type: ignore[arg-type]
    tensors = isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor)
    return tensors and same_layout(before, after, strides=True)


def _always(node: fx.Node) -> bool:
    return True


def _copies(node: fx.Node) -> bool:
    return str(getattr(node.target, "_schema", None)).startswith(("aten::clone", "aten::_to_copy"))


def _needless_copy(node: fx.Node) -> bool:
    return _same_shape(node) and root_of(node.args[0]).op == "call_function"  # type: ignore[arg-type]


def _by_one(node: fx.Node) -> bool:
    value = value_of(node)
    number = len(node.args) == 2 and not node.kwargs and isinstance(node.args[1], (int, float)) and node.args[1] == 1
    return number and isinstance(value, torch.Tensor) and value.is_floating_point() and _same_shape(node)


_NO_OPS: dict[str, Callable[[fx.Node], bool]] = {
    "aten::_to_copy": _needless_copy,
    "aten::alias": _always,
    "aten::clone": _needless_copy,
    "aten::detach": _always,
    "aten::div": _by_one,
    "aten::dropout": lambda node: not draws_random(node),
    "aten::mul": _by_one,
    "aten::squeeze": _same_shape,
    "aten::view": _same_shape,
    "aten::reshape": _same_shape,
    "aten::_unsafe_view": _same_shape,
    "aten::expand": _same_shape,
    "aten::slice": _same_shape,
    "aten::permute": _same_shape,
}


def _is_no_op(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload) or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    rule = _NO_OPS.get(node.target._schema.name)
    if rule is None or not rule(node):
        return False
    if node.target._schema.name == "aten::permute":
        order = node.args[1]
        return isinstance(order, (list, tuple)) and list(order) == sorted(int(d) for d in order)  # type: ignore[arg-type]
    return True
