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
        nodes = program.named_nodes()
        self._results = [value for value in returned(program.graph) if isinstance(value, fx.Node)]
        self._cost = {node: flops_of(node) for node in program.graph.nodes}
        self._region = {nodes[name]: region.name for region in program.regions for name in region.nodes}
        # A cut value's region, and the fresh value its forecast is added to, if it is kept as a residual.
        self._cut = {
            nodes[value.node]: (region.name, nodes[value.base] if value.base else None)
            for region in program.regions
            for value in region.cut
        }
        self._verified = {name for entry in program.measured for name in entry.checks}

    def __call__(self, reused: frozenset[str]) -> int:
        seen: set[fx.Node] = set()
        stack: list[fx.Node] = []

        def use(source: fx.Node, user: str | None) -> None:
            """`user`: the region of the node that reads `source`."""
            region, base = self._cut.get(source, (None, None))
            if region is not None and region in reused and user != region:
                if base is not None:
                    use(base, user)
            elif source not in seen:
                seen.add(source)
                stack.append(source)

        for value in self._results:
            use(value, None)
        for node, (name, base) in self._cut.items():
            if name not in reused or name in self._verified:
                use(node, name)  # returned as state, or computed to be compared with its forecast
                if base is not None:
                    use(base, name)
        total = 0
        while stack:
            node = stack.pop()
            total += self._cost[node]
            for source in node.all_input_nodes:
                use(source, self._region.get(node))
        return total


def program_flops(program: StepProgram) -> int:
    """FLOPs of one call of a program; 0-dimensional and elementwise work is not counted."""
    return total_flops(program.graph.nodes)
