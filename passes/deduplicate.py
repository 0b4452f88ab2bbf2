"""Deduplicate: compute once what the program computes twice."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from diffcache_fx.program import StepProgram, returned

from .purity import draws_random, eliminate_dead, mutates

_COPIES = ("aten::clone", "aten::_to_copy", "aten::lift_fresh_copy")


@dataclass(frozen=True)
class Deduplicate:
    """Replace a node by an earlier one with the same operator and arguments (common subexpressions).

    Blocks that each embed the same timestep are the usual case: twelve of them make twelve equal tables of sines.

    Before:  a = sin(t); b = linear(a, w0); c = sin(t); d = linear(c, w1)
    After:   a = sin(t); b = linear(a, w0); d = linear(a, w1)

    Rules:
    1. Only in finished programs, where it cannot move a value into a region or out of one.
    2. Operators that draw random numbers stay; so do copies, and what is returned: no two outputs share memory.
    3. A program in which something writes in place stays as it is.
    """

    def __call__(self, program: StepProgram) -> StepProgram:
        result = program.copy()
        graph = result.graph
        if any(mutates(node) for node in graph.nodes):
            return result
        returns = {node for node in returned(graph) if isinstance(node, fx.Node)}
        first: dict[Hashable, fx.Node] = {}
        for node in list(graph.nodes):
            key = None if node in returns else _key(node)
            if key is None:
                continue
            known = first.setdefault(key, node)
            if known is not node:
                node.replace_all_uses_with(known)
                graph.erase_node(node)
        eliminate_dead(graph)
        graph.lint()
        left = {node.name for node in graph.nodes}
        regions = tuple(dataclasses.replace(region, nodes=region.nodes & left) for region in result.regions)
        return result.replace(regions=regions)


def _key(node: fx.Node) -> Hashable | None:
    """What tells whether another node computes the same, or None where that must not be asked."""
    if node.op != "call_function":
        return None
    if isinstance(node.target, torch._ops.OpOverload):
        if node.target._schema.name in _COPIES and not _converts(node):
            return None
        if draws_random(node):
            return None
    elif node.target is not operator.getitem:
        return None
    return node.target, _frozen(node.args), _frozen(node.kwargs)


def _converts(node: fx.Node) -> bool:
    """Whether a copy is of another dtype than its argument."""
    before, after = (getattr(n, "meta", {}).get("val") for n in (node.args[0], node))
    return isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor) and before.dtype != after.dtype


def _frozen(value: Any) -> Hashable:
    """Arguments as something hashable; 1, 1.0 and True are three things, and so are 0.0 and -0.0."""
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(entry) for entry in value)
    if isinstance(value, dict):
        return tuple((name, _frozen(entry)) for name, entry in sorted(value.items()))
    if isinstance(value, slice):
        return "slice", _frozen((value.start, value.stop, value.step))
    return value if isinstance(value, fx.Node) else (type(value), repr(value))
