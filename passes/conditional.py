"""Building one `torch.cond` in a graph: the two branch graphs, the call, and the values it returns."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence

import torch
from torch import fx

from diffcache_fx.program import StepProgram, output_node, returned

from .aliasing import root_of
from .emit import aten, call, clone_after, memory_order, own, set_outputs
from .purity import eliminate_dead
from .verify import walk

COND = torch.ops.higher_order.cond
# Given the branch's graph and its own copies of the operands: the values that flow on, and the next history.
Body = Callable[[fx.Graph, dict[fx.Node, fx.Node]], tuple[list[fx.Node], list[fx.Node]]]


def branch(
    operands: Sequence[fx.Node], body: Body, source: fx.GraphModule, flat: frozenset[fx.Node] = frozenset()
) -> fx.GraphModule:
    """A branch graph over `operands`. What it returns is fresh: no operand, and no memory returned twice. source: holds
    the graphs that copied nodes call (an attention's score function, say). flat: operands that arrive as `choose` sends
    them, in one axis."""
    graph = fx.Graph()
    memo: dict[fx.Node, fx.Node] = {}
    for operand in operands:
        memo[operand] = graph.placeholder(operand.name)
        memo[operand].meta = dict(operand.meta)
    given = set(memo.values())
    graph.output(())
    with graph.inserting_before(output_node(graph)):
        for operand in operands:
            if operand in flat:
                memo[operand] = _unflattened(graph, memo[operand], operand.meta["val"])
        flow, history = body(graph, memo)
    flow = [clone_after(graph, node) if root_of(node) in given else node for node in flow]
    kept = own(graph, [*dict.fromkeys(flow), *history])[len(dict.fromkeys(flow)) :]
    set_outputs(graph, [*flow, *kept])
    eliminate_dead(graph)
    module = fx.GraphModule(source, graph)
    graph.lint()
    return module


def choose(
    root: fx.GraphModule,
    predicate: fx.Node,
    on_refresh: fx.GraphModule,
    on_reuse: fx.GraphModule,
    operands: Sequence[fx.Node],
    label: str = "",
    flat: frozenset[fx.Node] = frozenset(),
) -> list[fx.Node]:
    """Call a conditional at the graph's insertion point; returns one node for each value its branches return."""
    graph = root.graph
    operands = [_flattened(graph, operand) if operand in flat else operand for operand in operands]
    arms = []
    for name, arm in (("on_refresh", on_refresh), ("on_reuse", on_reuse)):
        root.add_submodule(name + label, arm)
        arms.append(graph.get_attr(name + label))
    chosen = graph.call_function(COND, (predicate, *arms, tuple(operands)))
    chosen.meta["val"] = tuple(node.meta["val"] for node in returned(on_refresh.graph))
    items = []
    for index, value in enumerate(chosen.meta["val"]):
        item = graph.call_function(operator.getitem, (chosen, index))
        item.meta["val"] = value
        items.append(item)
    return items


def movable(operands: Sequence[fx.Node]) -> frozenset[fx.Node]:
    """The operands whose layout a branch could not rely on: computed values that do not lie in the order of their axes,
    and images and videos.

    Within torch.compile, Inductor lays out what it computes as it likes (what convolutions compute, channels last), and
    compiles a branch for the layout that was recorded. In one axis there is but one layout: there such values are
    handed over like that.
    """
    return frozenset(n for n in operands if n.op == "call_function" and _may_move(n.meta["val"]))


def _may_move(example: object) -> bool:
    if not isinstance(example, torch.Tensor):
        return False
    plain = all(isinstance(size, int) for size in example.shape)  # sizes that vary would be read inside the branch
    return memory_order(example) is not None or (plain and example.dim() >= 4 and example.is_contiguous())


def _order(example: torch.Tensor) -> list[int]:
    """The axes as they lie in memory."""
    return list(memory_order(example) or range(example.dim()))


def _flattened(graph: fx.Graph, node: fx.Node) -> fx.Node:
    packed = call(graph, aten.permute.default, node, _order(node.meta["val"]))
    return call(graph, aten.view.default, packed, [-1])


def _unflattened(graph: fx.Graph, node: fx.Node, example: torch.Tensor) -> fx.Node:
    """What was flattened, in its own shape and layout. node: the operand in the branch."""
    order = _order(example)
    packed = example.permute(order)
    node.meta["val"] = packed.reshape(-1)
    whole = call(graph, aten.view.default, node, list(packed.shape))
    return call(graph, aten.permute.default, whole, [order.index(axis) for axis in range(len(order))])


def next_history(fresh: fx.Node, slots: list[fx.Node]) -> list[fx.Node]:
    """The history after a refresh: the fresh value first, the oldest one dropped."""
    return [fresh, *slots[:-1]]


def conditionals_of(program: StepProgram) -> int:
    """How many conditionals a program holds, at any depth."""
    return sum(node.op == "call_function" and node.target is COND for _, node in walk(program.module))
