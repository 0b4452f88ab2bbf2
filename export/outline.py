"""Outlining, inside the Inductor lowering: repeated blocks become one subgraph that is called many times, so that each
distinct block is compiled once."""

from __future__ import annotations

import operator
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from diffcache_fx.passes.aliasing import root_of
from diffcache_fx.passes.flops import total_flops
from diffcache_fx.passes.purity import is_impure
from diffcache_fx.passes.reach import Reach
from torch import fx

from diffcache_fx.program import StepProgram, module_path, output_node

# Nothing is fused across the border of a subgraph, and its call costs a few microseconds: only blocks that do a fair
# share of the program's work are worth it.
_FEWEST_NODES = 40
_SMALLEST_SHARE = 0.1


@dataclass(frozen=True)
class Piece:
    """One call of a module that could be outlined: its nodes in graph order, what enters and what leaves."""

    path: str
    nodes: tuple[fx.Node, ...]
    entering: tuple[fx.Node, ...]
    leaving: tuple[fx.Node, ...]


def outline(program: StepProgram, *, fewest_nodes: int = _FEWEST_NODES) -> StepProgram:
    """Replace module calls that compute the same thing on the same shapes by calls of one shared subgraph.

    Of nested candidates the largest go first. A piece must be convex (nothing leaves it and comes back), pure, and must
    return whole tensors of its own. Programs without repetition come back unchanged.

    Before:  a = block0(x); b = block1(a); return b        (each block spelled out)
    After:   a = call(block, x, weights0); b = call(block, a, weights1); return b
    """
    groups = repeated(program, fewest_nodes)
    if not groups:
        return program
    result = program.copy()
    module, graph = result.module, result.module.graph
    twins = {node.name: node for node in graph.nodes}
    for number, pieces in enumerate(groups):
        name = f"outlined_{number}"
        module.add_submodule(name, _body(pieces[0]))
        for piece in pieces:
            _call(graph, name, piece, twins)
    graph.lint()
    module.recompile()
    return result


def repeated(program: StepProgram, fewest_nodes: int = _FEWEST_NODES) -> list[list[Piece]]:
    """Groups of at least two pieces that compute the same thing, disjoint, largest first."""
    calls: dict[str, list[fx.Node]] = defaultdict(list)
    for node in program.graph.nodes:
        if node.op == "call_function":
            for fqn, _ in module_path(node):
                if fqn:
                    calls[fqn].append(node)
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    groups: dict[Any, list[Piece]] = defaultdict(list)
    for path, nodes in calls.items():
        if len(nodes) >= fewest_nodes:
            piece = _piece(path, nodes, order)
            groups[_picture(piece)].append(piece)
    ranked = sorted((g for g in groups.values() if len(g) >= 2), key=lambda g: -len(g[0].nodes))
    reach = Reach(program.graph)
    least = _SMALLEST_SHARE * total_flops(program.graph.nodes)
    taken: set[fx.Node] = set()
    chosen = []
    for group in ranked:
        free = [p for p in group if not taken & set(p.nodes) and p.leaving and _fits(p, reach)]
        if len(free) >= 2 and sum(total_flops(piece.nodes) for piece in free) >= least:
            chosen.append(free)
            taken.update(node for piece in free for node in piece.nodes)
    return chosen


def _piece(path: str, nodes: list[fx.Node], order: dict[fx.Node, int]) -> Piece:
    inside = set(nodes)
    entering = dict.fromkeys(source for node in nodes for source in node.all_input_nodes if source not in inside)
    leaving = [node for node in nodes if any(user not in inside for user in node.users)]
    return Piece(path, tuple(nodes), tuple(entering), tuple(leaving))


def _picture(piece: Piece) -> Any:
    """A hashable picture of what a piece computes: equal pictures mean interchangeable bodies."""
    number: dict[fx.Node, int] = {node: i for i, node in enumerate((*piece.entering, *piece.nodes))}

    def of(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return ("node", number[value])
        if isinstance(value, (list, tuple)):
            return tuple(of(entry) for entry in value)
        if isinstance(value, dict):
            return tuple((key, of(entry)) for key, entry in sorted(value.items()))
        if isinstance(value, float):
            return ("float", repr(value))
        return (type(value).__name__, str(value))

    return (
        tuple(_shape(node) for node in piece.entering),
        tuple((str(node.target), of(node.args), of(dict(node.kwargs)), _shape(node)) for node in piece.nodes),
        tuple(number[node] for node in piece.leaving),
    )


def _shape(node: fx.Node) -> Any:
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        return (str(tuple(value.shape)), str(value.stride()), value.dtype, value.device)
    return str(value) if not isinstance(value, (tuple, list)) else len(value)


def _fits(piece: Piece, reach: Reach) -> bool:
    inside = set(piece.nodes)
    if any(is_impure(node) for node in piece.nodes):
        return False
    values = [node.meta.get("val") for node in piece.leaving]
    # Inductor hands a subgraph's results on as whole buffers: a strided view of one would be misread.
    if any(not isinstance(value, torch.Tensor) or not value.is_contiguous() for value in values):
        return False
    if any(root_of(node) not in inside for node in piece.leaving):
        return False
    roots = [root_of(node) for node in piece.leaving]
    return len(set(roots)) == len(roots) and reach.is_convex(piece.nodes)


def _body(piece: Piece) -> fx.GraphModule:
    graph = fx.Graph()
    memo: dict[fx.Node, fx.Node] = {}
    for position, node in enumerate(piece.entering):
        memo[node] = graph.placeholder(f"arg{position}")
        memo[node].meta = dict(node.meta)
    for node in piece.nodes:
        memo[node] = graph.node_copy(node, memo.__getitem__)
    graph.output(tuple(memo[node] for node in piece.leaving))
    output_node(graph).meta["val"] = tuple(node.meta["val"] for node in piece.leaving)
    return fx.GraphModule(torch.nn.Module(), graph)


def _call(graph: fx.Graph, name: str, piece: Piece, twins: dict[str, fx.Node]) -> None:
    """Replace the nodes of one piece by a call; what it needs may have been replaced before."""
    nodes = [twins[node.name] for node in piece.nodes]
    entering = [twins[node.name] for node in piece.entering]
    order = {node: i for i, node in enumerate(graph.nodes)}
    # Convex, so all that enters can run before all that uses what leaves: right after the last thing that enters,
    # unless something of the piece's users comes earlier, which is then moved behind by the caller's topological order.
    anchor = max((nodes[0], *(n for n in entering if n.op != "placeholder")), key=order.__getitem__)
    insert = graph.inserting_before(anchor) if anchor is nodes[0] else graph.inserting_after(anchor)
    with insert:
        body = graph.get_attr(name)
    with graph.inserting_after(body):
        call = graph.call_function(torch.ops.higher_order.invoke_subgraph, (body, name, *entering))
    call.meta["val"] = tuple(node.meta["val"] for node in piece.leaving)
    last = call
    for position, node in enumerate(piece.leaving):
        with graph.inserting_after(last):
            item = graph.call_function(operator.getitem, (call, position))
        item.meta = dict(node.meta)
        last = item
        twins[node.name].replace_all_uses_with(item)
        twins[node.name] = item
    for node in reversed(nodes):
        graph.erase_node(node)
