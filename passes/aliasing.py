"""Which values may share memory: needed so that no output of a program aliases its cache, or another output."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

# Operators whose schema promises no alias although their result may be their argument or a view of it.
_MAYBE_ALIAS = frozenset(
    {
        "aten::reshape",
        "aten::_reshape_alias",
        "aten::contiguous",
        "aten::to",
        "aten::type_as",
        "aten::flatten",
        "aten::dropout",
        "aten::expand_as",
        "aten::view_as",
        "aten::alias",
        "aten::detach",
        "aten::chunk",
        "aten::tensor_split",
        "aten::unflatten",
        "aten::movedim",
        "aten::narrow",
        "aten::moveaxis",
        "aten::swapaxes",
        "aten::reshape_as",
        "aten::ravel",
        "aten::lift_fresh",
        "aten::conj",
        "aten::resolve_conj",
        "aten::resolve_neg",
        "aten::real",
    }
)


def source_of(node: fx.Node) -> fx.Node | None:
    """The argument whose memory this node's result may share, or None if the result is fresh."""
    if node.op != "call_function" or not node.args:
        return None
    first = node.args[0]
    if not isinstance(first, fx.Node):
        return None
    if node.target is operator.getitem:
        return first
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    if node.target._schema.name in _MAYBE_ALIAS:
        return first
    arguments = node.target._schema.arguments
    if arguments and arguments[0].alias_info is not None:
        return first
    return None


def root_of(node: fx.Node) -> fx.Node:
    """The node that owns the memory `node` may show: the end of its chain of views."""
    current = node
    while True:
        above = source_of(current)
        if above is None:
            return current
        # A tuple-valued operator that makes fresh tensors: each of its items owns its memory.
        if current.target is operator.getitem and source_of(above) is None and above.op == "call_function":
            return current
        current = above


def is_view(node: fx.Node) -> bool:
    """True if the node's result may share memory with another node's."""
    return root_of(node) is not node


def clone_after(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """Insert, before the graph's output, a contiguous clone of `node`; returns the clone."""
    with graph.inserting_before(next(reversed(graph.nodes))):
        copied = graph.call_function(torch.ops.aten.clone.default, (node,), {"memory_format": torch.contiguous_format})
    value: Any = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        copied.meta["val"] = torch.empty_like(value, memory_format=torch.contiguous_format)
    copied.meta["nn_module_stack"] = dict(node.meta.get("nn_module_stack") or {})
    return copied
