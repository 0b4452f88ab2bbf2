"""Several decisions in one step: a conditional for each region, those of one group sharing their predicate."""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import torch
from torch import fx

from diffcache_fx.errors import RegionError
from diffcache_fx.program import (
    CutValue,
    Input,
    InputKind,
    Output,
    OutputKind,
    Region,
    StepProgram,
    output_node,
    returned,
)

from .aliasing import root_of
from .conditional import Body, branch, choose, movable, next_history
from .correct import corrected
from .emit import (
    aten,
    call,
    clone_after,
    drop_unused_inputs,
    from_stored,
    history_target,
    placeholder,
    row_of,
    safe,
    set_outputs,
    to_stored,
    weighted_sum,
)
from .purity import eliminate_dead
from .reach import Reach


def guard_regions(program: StepProgram, predicate_of: dict[str, str], hoist: bool = False) -> StepProgram:
    """The guarded form with a conditional per region. predicate_of: region name -> name of its group's predicate.

    Raises RegionError for a region that is not convex: its two ways would have to run partly before and partly after
    what lies between.
    """
    reach = Reach(program.graph)
    by_name = program.named_nodes()
    for region in program.regions:
        if not reach.is_convex(by_name[name] for name in region.nodes):
            raise RegionError(
                f"region {region.name!r} cannot be decided inside the graph on its own: a path leaves it and comes "
                "back. Split it into connected parts, let all regions share one decision, or use decide='host'"
            )
    root = fx.GraphModule(program.module, program.copy().graph)
    graph = root.graph
    nodes = {node.name: node for node in graph.nodes}
    inputs = list(program.inputs)
    predicates: dict[str, fx.Node] = {}
    for group in dict.fromkeys(predicate_of.values()):
        predicates[group] = placeholder(graph, f"refresh_{safe(group)}", (), torch.bool, torch.device("cpu"))
        inputs.append(Input(InputKind.PREDICATE, predicates[group].name, group))
    rows = _rows(graph, program, inputs)
    histories = {region.name: _history(graph, region, inputs) for region in program.regions}

    state: list[fx.Node] = []
    outputs = list(program.outputs)
    for number, region in enumerate(program.regions):
        guarded = _Guarded(region, number, nodes, histories[region.name], rows, hoist)
        with graph.inserting_before(output_node(graph)):
            flows, history = guarded.insert(root, predicates[predicate_of[region.name]])
        inside = {nodes[name] for name in region.nodes}
        for value, flow in zip(region.cut, flows, strict=True):
            nodes[value.node].replace_all_uses_with(
                flow,
                delete_user_cb=lambda user, inside=inside: user not in inside,  # type: ignore[misc]
            )
            nodes[value.node] = flow
        for index, slots in enumerate(history):
            state += slots
            outputs += [
                Output(OutputKind.STATE, history_target(region.name, index, slot)) for slot in range(len(slots))
            ]
    users = [value for value in returned(graph) if isinstance(value, fx.Node)]
    held = {slot for per_value in histories.values() for slots in per_value for slot in slots} | set(state)
    users = [clone_after(graph, node) if root_of(node) in held else node for node in users]
    set_outputs(graph, [*users, *state])
    _sort(graph)
    eliminate_dead(graph)
    graph.lint()
    root.recompile()
    result = program.replace(module=root, inputs=tuple(inputs), outputs=tuple(outputs))
    return drop_unused_inputs(
        result, frozenset({InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT, InputKind.MOMENT})
    )


def _rows(graph: fx.Graph, program: StepProgram, inputs: list[Input]) -> fx.Node | None:
    width = max(value.slots for region in program.regions for value in region.cut)
    if width == 1:
        return None
    device = program.regions[0].cut[0].device
    node = placeholder(graph, "rows", (len(program.regions), width), torch.float32, device)
    inputs.append(Input(InputKind.ROWS, node.name, "rows"))
    return node


def _history(graph: fx.Graph, region: Region, inputs: list[Input]) -> list[list[fx.Node]]:
    """One input per cut value and slot."""
    per_value = []
    for index, value in enumerate(region.cut):
        slots = []
        for slot in range(value.slots):
            name = f"h_{safe(region.name)}_{index}_{slot}"
            slots.append(placeholder(graph, name, value.shape, value.dtype, value.device))
            inputs.append(Input(InputKind.HISTORY, slots[-1].name, history_target(region.name, index, slot)))
        per_value.append(slots)
    return per_value


@dataclass(frozen=True)
class _Guarded:
    """One region on its way into a conditional."""

    region: Region
    number: int
    nodes: dict[str, fx.Node]
    histories: list[list[fx.Node]]
    rows: fx.Node | None
    hoist: bool

    def insert(self, root: fx.GraphModule, predicate: fx.Node) -> tuple[list[fx.Node], list[list[fx.Node]]]:
        """Insert the conditional; returns the cut values that flow on, and the new history of each."""
        inside = [node for node in root.graph.nodes if node.name in self.region.nodes]
        within = set(inside)
        beside = [name for value in self.region.cut for name in (value.base, value.scale, value.shift) if name]
        outside = (s for n in inside for s in n.all_input_nodes if s not in within and s.op != "get_attr")
        entering = dict.fromkeys([*outside, *(self.nodes[name] for name in beside)])
        slots = [slot for per_value in self.histories for slot in per_value]
        operands = [*entering, *slots, *([self.rows] if self.rows is not None else [])]
        flat = frozenset() if self.hoist else movable(operands)
        arms = [branch(operands, body, root, flat) for body in (self._refresh(inside), self._reuse())]
        items = iter(choose(root, predicate, arms[0], arms[1], operands, f"_{self.number}", flat))
        flows = [self._flow(root.graph, next(items), value) for value in self.region.cut]
        return flows, [[next(items) for _ in per_value] for per_value in self.histories]

    def _beside(self, name: str | None, memo: dict[fx.Node, fx.Node]) -> fx.Node | None:
        """What one of the nodes beside the region is in a branch."""
        return memo[self.nodes[name]] if name is not None else None

    def _packed(self, graph: fx.Graph, node: fx.Node) -> fx.Node:
        """Both branches must return one layout. Within torch.compile a movable one does not last (sums are fused
        with products, whose results lie in the order of their axes): values leave a branch in that order."""
        if self.hoist or node.meta["val"].is_contiguous():
            return node
        return call(graph, aten.clone.default, node, memory_format=torch.contiguous_format)

    def _flow(self, graph: fx.Graph, item: fx.Node, value: CutValue) -> fx.Node:
        """What a branch returned, lying as it does without a cache: kernels differ in rounding between layouts."""
        if not self.hoist and value.order is not None:
            stored = to_stored(graph, item, value)
            item = call(graph, aten.clone.default, stored, memory_format=torch.contiguous_format)
        return from_stored(graph, item, value)

    def _refresh(self, inside: list[fx.Node]) -> Body:
        def write(graph: fx.Graph, operands: dict[fx.Node, fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
            memo = dict(operands)
            for node in inside:
                for source in node.all_input_nodes:
                    if source.op == "get_attr" and source not in memo:
                        memo[source] = graph.get_attr(str(source.target))
                memo[node] = graph.node_copy(node, memo.__getitem__)
            named = {node.name: memo[node] for node in inside}
            flow, kept = [], []
            for value, slots in zip(self.region.cut, self.histories, strict=True):
                fresh, base = self._packed(graph, named[value.node]), self._beside(value.base, memo)
                flow.append(to_stored(graph, fresh, value) if self.hoist else fresh)
                stored = fresh if base is None else call(graph, aten.sub.Tensor, fresh, base)
                kept += next_history(to_stored(graph, stored, value), [memo[slot] for slot in slots])
            return flow, kept

        return write

    def _reuse(self) -> Body:
        def write(graph: fx.Graph, operands: dict[fx.Node, fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
            flow, kept = [], []
            for value, slots in zip(self.region.cut, self.histories, strict=True):
                held = [operands[slot] for slot in slots]
                row = row_of(graph, operands[self.rows] if self.rows is not None else None, self.number, value.slots)
                filled = weighted_sum(graph, held, row, value)
                scale, shift = (self._beside(name, operands) for name in (value.scale, value.shift))
                if scale is not None and shift is not None:
                    filled = corrected(graph, filled, value, scale, shift)
                base = self._beside(value.base, operands)
                filled = filled if base is None else call(graph, aten.add.Tensor, base, filled)
                filled = self._packed(graph, filled)
                flow.append(to_stored(graph, filled, value) if self.hoist else filled)
                kept += held
            return flow, kept

        return write


def _sort(graph: fx.Graph) -> None:
    """Bring the graph into topological order (the conditionals were appended at its end), otherwise as it was."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    waiting = {node: len(node.all_input_nodes) for node in graph.nodes}
    ready = [(order[node], node) for node, count in waiting.items() if count == 0]
    heapq.heapify(ready)
    anchor = graph._root
    while ready:
        _, node = heapq.heappop(ready)
        anchor.append(node)
        anchor = node
        for user in node.users:
            waiting[user] -= 1
            if waiting[user] == 0:
                heapq.heappush(ready, (order[user], user))
