"""Cut: for each region, the values a reuse step needs of it, in as few bytes as changes nothing."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import networkx as nx
import torch
from torch import fx

from diffcache_fx.errors import RegionError
from diffcache_fx.program import CutValue, Region, StepProgram, same_layout, size_hint, value_of

from .emit import memory_order
from .purity import is_impure
from .reach import varying

aten = torch.ops.aten

# Operators that only move data: a weighted sum of moved values is the moved weighted sum, bit for bit.
_MOVES = frozenset(
    f"aten::{name}"
    for name in [
        "slice",
        "view",
        "reshape",
        "_unsafe_view",
        "permute",
        "transpose",
        "t",
        "select",
        "unsqueeze",
        "squeeze",
        "split",
        "split_with_sizes",
        "chunk",
        "unbind",
        "clone",
        "contiguous",
        "expand",
        "flatten",
        "unflatten",
        "narrow",
    ]
)
# Operators that carry a value on in another type: of its arguments only the first counts.
_CASTS = ("aten::_to_copy", "aten::to", "aten::type_as", "aten::clone")


@dataclass(frozen=True)
class RuleStorage:
    """What the cut needs to know of a schedule rule: how values are stored, and how many refreshes are kept."""

    storage: str = "auto"
    slots: int = 1


@dataclass(frozen=True)
class ComputeCut:
    """Fill in each region's cut.

    Rules:
    1. The cut is the region's boundary: the values computed inside that something outside uses.
    2. It moves outward to fewer bytes (minimum cut) across nodes that read nothing but the cut and step-invariants, and
       that only move data; with one slot stored as a value (hold), across any such node. What it moves across joins
       the region: a reuse step does not run it either.
    3. Stored as a residual, a value is kept as its difference to a value of the same shape that enters the region: the
       one it was added onto, if the graph shows it. "auto" takes the residual only in that case, else the value.
    4. Values that are no floating-point tensors are kept as they are, in one slot.

    Before:  r = block(x); y = r[:, 77:]; out = head(y)      cut: r (all tokens)
    After:   the same graph                                   cut: y (image tokens only)

    Refuses: a residual where nothing of the same shape enters; a value that is no tensor; a region nothing depends on.
    """

    rules: tuple[RuleStorage, ...]

    def __call__(self, program: StepProgram) -> StepProgram:
        nodes = program.named_nodes()
        changing = varying(program)
        owner = {nodes[name]: region.name for region in program.regions for name in region.nodes}
        regions = tuple(self._cut(region, nodes, changing, owner) for region in program.regions)
        return program.replace(regions=regions)

    def _cut(
        self, region: Region, nodes: dict[str, fx.Node], changing: set[fx.Node], owner: dict[fx.Node, str]
    ) -> Region:
        rule = self.rules[region.rule]
        inside = {nodes[name] for name in region.nodes}
        boundary = [node for node in sorted(inside) if any(user not in inside for user in node.users)]
        if not boundary:
            raise RegionError(f"nothing outside region {region.name!r} uses what it computes: select another part")
        hold = rule.slots == 1 and rule.storage == "value"
        moved, grown = _cheapest(boundary, inside, changing, owner, hold)
        for cut, members in ((moved, grown), (boundary, inside)):
            bases = (
                {value: _base(value, members, changing, rule.storage) for value in cut}
                if rule.storage != "value"
                else {}
            )
            if rule.storage == "value" or any(base is not None for base in bases.values()) or cut is boundary:
                break
        values = []
        for node in cut:
            example = value_of(node)
            if not isinstance(example, torch.Tensor):
                raise RegionError(
                    f"region {region.name!r} hands on {node.name}, which is no tensor ({type(example).__name__}): "
                    "choose a region whose results are tensors"
                )
            floating = example.is_floating_point()
            base = bases.get(node) if floating else None
            if rule.storage == "residual" and base is None and floating:
                raise RegionError(
                    f"region {region.name!r} cannot be stored as a residual: no value shaped {tuple(example.shape)} "
                    f"enters it to compare {node.name} with; use a schedule that holds values, such as interval, or "
                    "storage='value' in a Rule of your own"
                )
            order = memory_order(example)
            values.append(
                CutValue(
                    node=node.name,
                    shape=tuple(example.shape if order is None else example.permute(order).shape),
                    dtype=example.dtype,
                    device=example.device,
                    base=base.name if base is not None else None,
                    slots=rule.slots if floating else 1,
                    order=order,
                )
            )
        return Region(region.name, frozenset(n.name for n in members), tuple(values), region.rule, region.blocks)


def _bytes(node: fx.Node) -> int:
    value = value_of(node)
    if not isinstance(value, torch.Tensor):
        return 1 << 50
    count = 1
    for size in value.shape:
        count *= size_hint(size)
    return max(count * value.dtype.itemsize, 1)


def _operator(node: fx.Node) -> str:
    return node.target._schema.name if isinstance(node.target, torch._ops.OpOverload) else ""


def _moves_data(node: fx.Node) -> bool:
    return node.target is operator.getitem or _operator(node) in _MOVES


def _cheapest(
    boundary: list[fx.Node],
    inside: set[fx.Node],
    changing: set[fx.Node],
    owner: dict[fx.Node, str],
    hold: bool,
) -> tuple[list[fx.Node], set[fx.Node]]:
    """The cut of fewest bytes at or after the boundary, and the region grown by what lies before it."""
    movable: set[fx.Node] = set()
    frontier = {user for node in boundary for user in node.users}
    graph = boundary[0].graph
    for node in graph.nodes:
        if node not in frontier or node in inside or node in owner or node.op != "call_function" or is_impure(node):
            continue
        sources = [source for source in node.all_input_nodes if source in changing]
        if all(source in inside or source in movable for source in sources) and (hold or _moves_data(node)):
            movable.add(node)
            frontier.update(node.users)
    if not movable:
        return list(boundary), inside
    flow = nx.DiGraph()
    for node in [*boundary, *movable]:
        flow.add_edge((node, "in"), (node, "out"), capacity=_bytes(node))
        for user in node.users:
            if user in movable:
                flow.add_edge((node, "out"), (user, "in"))
            elif user not in inside:
                flow.add_edge((node, "out"), "rest")
    for node in boundary:
        flow.add_edge("region", (node, "in"))
    flow.add_node("rest")
    _, (near, _) = nx.minimum_cut(flow, "region", "rest")
    cut = [node for node in [*boundary, *sorted(movable)] if (node, "in") in near and (node, "out") not in near]
    before = {node for node in movable if (node, "in") in near}
    return cut, inside | before


def _base(value: fx.Node, inside: set[fx.Node], changing: set[fx.Node], storage: str) -> fx.Node | None:
    """The value entering the region that `value` is a residual over: reached backwards through additions, or, where a
    residual is demanded, the last one of the same shape that `value` depends on."""
    base = carried_from(value, inside, changing)
    if base is not None or storage != "residual":
        return base
    entering = []
    seen = {value}
    stack = [value]
    while stack:
        for source in stack.pop().all_input_nodes:
            if source in seen:
                continue
            seen.add(source)
            if source in inside:
                stack.append(source)
            elif _fits(source, value, changing):
                entering.append(source)
    return max(entering, default=None)


def _fits(node: fx.Node, value: fx.Node, changing: set[fx.Node]) -> bool:
    """Whether a node can be subtracted from a floating `value`."""
    other, example = value_of(node), value_of(value)
    both = isinstance(other, torch.Tensor) and isinstance(example, torch.Tensor)
    return both and example.is_floating_point() and node in changing and same_layout(other, example)


def carried_from(value: fx.Node, inside: set[fx.Node], changing: set[fx.Node]) -> fx.Node | None:
    """The value outside that `value` was added onto, of the same shape, reached backwards through additions inside;
    None where the graph shows none. changing: the nodes that may differ from step to step."""
    seen: set[fx.Node] = set()
    queue = [value]
    while queue:
        node = queue.pop(0)
        for source in _carried(node):
            if source in seen:
                continue
            seen.add(source)
            if source in inside:
                queue.append(source)
            elif _fits(source, value, changing):
                return source
    return None


def _carried(node: fx.Node) -> list[fx.Node]:
    """The arguments whose values live on in the result: terms of a sum, parts of a concatenation, what is moved."""
    if node.target in (aten.add.Tensor, aten.sub.Tensor):
        return [argument for argument in node.args[:2] if isinstance(argument, fx.Node)]
    if node.target == aten.cat.default and isinstance(node.args[0], (list, tuple)):
        return [argument for argument in node.args[0] if isinstance(argument, fx.Node)]
    if _moves_data(node) or _operator(node) in _CASTS:
        return node.all_input_nodes[:1]
    return []
