"""Floating-point operations of a graph, from the shapes recorded in it: the same formulas that
`torch.utils.flop_counter` applies at run time, so that the two agree."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch.utils.flop_counter import flop_registry

from diffcache_fx.program import StepProgram, returned, size_hint


def _shape(value: Any) -> tuple[int, ...]:
    tensor = value.meta["val"] if isinstance(value, fx.Node) else value
    return tuple(size_hint(size) for size in tensor.shape)


def _linear(node: fx.Node) -> int:
    source, weight = _shape(node.args[0]), _shape(node.args[1])
    return 2 * math.prod(source) * weight[0]


def _matmul(node: fx.Node) -> int:
    left = _shape(node.args[0])
    out = node.meta["val"]
    return 2 * math.prod(size_hint(size) for size in out.shape) * left[-1]


def _attention(node: fx.Node) -> int:
    query, key, value = (_shape(argument) for argument in node.args[:3])
    batch = math.prod(query[:-2])
    return 2 * batch * query[-2] * key[-2] * (query[-1] + value[-1])


def _einsum(node: fx.Node) -> int:
    """Two operands: 2 x the product of all index sizes, as the batched product it becomes."""
    equation, operands = node.args[0], node.args[1]
    assert isinstance(equation, str)
    assert isinstance(operands, (list, tuple))
    if len(operands) != 2 or "." in equation:
        return 0
    sizes: dict[str, int] = {}
    terms = equation.replace(" ", "").partition("->")[0].split(",")
    for term, operand in zip(terms, operands, strict=True):
        sizes.update(zip(term, _shape(operand), strict=True))
    contracted = set(terms[0]) & set(terms[1]) - set(equation.partition("->")[2])
    # An outer product runs as a multiplication, which the counter does not count.
    return 2 * math.prod(sizes.values()) if contracted else 0


_OWN = {
    "aten::linear": _linear,
    "aten::matmul": _matmul,
    "aten::scaled_dot_product_attention": _attention,
    "aten::einsum": _einsum,
}
_CONVOLUTIONS = ("aten::conv1d", "aten::conv2d", "aten::conv3d", "aten::conv_transpose", "aten::convolution")


def _convolution(node: fx.Node) -> int:
    source, weight = _shape(node.args[0]), _shape(node.args[1])
    transposed = "transpose" in str(node.target)
    spatial = source[2:] if transposed else _shape(node)[2:]
    return 2 * source[0] * math.prod(weight) * math.prod(spatial)


def flops_of(node: fx.Node) -> int:
    """FLOPs of one node (2 for each multiply-add); 0 for elementwise work, as the run-time counter does."""
    target = node.target
    if node.op != "call_function":
        return 0
    if isinstance(target, torch._ops.HigherOrderOperator):
        return 0
    if not isinstance(target, torch._ops.OpOverload):
        return 0
    name = target._schema.name
    if name in _OWN:
        return _OWN[name](node)
    if name.startswith(_CONVOLUTIONS):
        return _convolution(node)
    formula = flop_registry.get(target.overloadpacket)
    if formula is None:
        return 0
    args = fx.node.map_arg(node.args, lambda n: n.meta.get("val"))
    kwargs = fx.node.map_arg(node.kwargs, lambda n: n.meta.get("val"))
    return int(formula(*args, **kwargs, out_val=node.meta.get("val")))


def total_flops(nodes: Iterable[fx.Node]) -> int:
    return sum(flops_of(node) for node in nodes)


class StepFlops:
    """FLOPs of a program with regions, for any set of reused ones, without writing out the specialised program: the sum
    over the nodes from which an output, or the state of a computed region, is still reached."""

    def __init__(self, program: StepProgram) -> None:
        self._program = program
        nodes = program.named_nodes()
        self._results = [value for value in returned(program.graph) if isinstance(value, fx.Node)]
        self._cost = {node: flops_of(node) for node in program.graph.nodes}
        self._region = {nodes[name]: region.name for region in program.regions for name in region.nodes}
        self._cuts = {
            region.name: [nodes[name] for value in region.cut for name in (value.node, value.base) if name]
            for region in program.regions
        }
        self._base = {
            nodes[value.node]: nodes[value.base] for region in program.regions for value in region.cut if value.base
        }

    def __call__(self, reused: frozenset[str]) -> int:
        seen: set[fx.Node] = set()
        stack = [*self._results, *(n for name, cut in self._cuts.items() if name not in reused for n in cut)]
        total = 0
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            if self._region.get(node) in reused:
                # Only reached from outside, so a cut value: it comes from the cache, plus its fresh base if it has one.
                base = self._base.get(node)
                stack += [base] if base is not None else []
                continue
            total += self._cost[node]
            stack += node.all_input_nodes
        return total


def program_flops(program: StepProgram) -> int:
    """FLOPs of one call of a program; 0-dimensional and elementwise work is not counted."""
    return total_flops(program.graph.nodes)
