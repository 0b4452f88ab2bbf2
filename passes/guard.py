"""InsertGuards: one program that holds both ways of every step, chosen inside the graph by `torch.cond`."""

from __future__ import annotations

import copy
from collections.abc import Iterable
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
from .emit import (
    aten,
    call,
    clone_after,
    drop_unused_inputs,
    fake_mode_of,
    history_target,
    own,
    placeholder,
    row_of,
    safe,
    set_outputs,
    weighted_sum,
)
from .purity import eliminate_dead
from .reach import Reach
from .specialize import Specialize

_cond = torch.ops.higher_order.cond


@dataclass(frozen=True)
class InsertGuards:
    """Put the refresh and the reuse of each group of regions into the branches of a conditional.

    groups: names of the regions that are refreshed together, for each independent decision; None: all regions together.

    Rules:
    1. One predicate input per group (bool scalar, True = refresh), a history input and output per cut value and slot.
    2. A single group becomes one conditional over two whole steps; its regions may be any sets of nodes.
    3. Several groups become one conditional per region, sharing their group's predicate; there each region must be
       convex: no path may leave it and come back.
    4. History moves by one slot at a refresh (newest first) and stays at a reuse. Branches return nothing that they were
       given: what passes through is cloned. Parameters are operands of the branches.

    Before:  a = block0(x); b = block1(a); return head(b)
    After:   (p, h): b, n = cond(p, [a = block0(x); b = block1(a); b, clone b], [h, clone h]); return head(b), n

    Refuses: a region that is not convex where several groups decide on their own.
    """

    groups: tuple[tuple[str, ...], ...] | None = None

    def __call__(self, program: StepProgram) -> StepProgram:
        groups = self.groups or (tuple(region.name for region in program.regions),)
        if len(groups) == 1 and len(groups[0]) == len(program.regions):
            return _whole_step(program)
        return _per_region(program, groups)


def group_name(group: Iterable[str]) -> str:
    """The name of a group's predicate: that of its first region."""
    return next(iter(group))


def _next_history(graph: fx.Graph, fresh: fx.Node, slots: list[fx.Node]) -> list[fx.Node]:
    """The history after a refresh: the fresh value first, the oldest one dropped."""
    return [fresh, *slots[:-1]]


def _subgraph(program: StepProgram, graph: fx.Graph) -> fx.GraphModule:
    graph.lint()
    return fx.GraphModule(program.module, graph)


def _whole_step(program: StepProgram) -> StepProgram:
    refresh = Specialize(frozenset())(program)
    reuse = Specialize(frozenset(region.name for region in program.regions))(program)
    users = [output for output in program.outputs if output.kind is OutputKind.USER]
    values = [(region, i, value) for region in program.regions for i, value in enumerate(region.cut)]
    state = [
        Output(OutputKind.STATE, history_target(region.name, i, slot))
        for region, i, value in values
        for slot in range(value.slots)
    ]
    # Every input of the reuse program, then those only the refresh program has; both branches take all of them.
    operands = {(entry.kind, entry.target): entry for entry in (*program.inputs, *reuse.inputs)}
    needed = {(entry.kind, entry.target) for entry in (*refresh.inputs, *reuse.inputs)}
    inputs = [entry for key, entry in operands.items() if key in needed]

    def branch(source: StepProgram, refreshing: bool) -> fx.GraphModule:
        """The given specialised program over all operands, returning the user's outputs and the whole history."""
        graph = fx.Graph()
        places: dict[tuple[InputKind, str], fx.Node] = {}
        examples = {
            (entry.kind, entry.target): node.meta
            for origin in (reuse, refresh)
            for entry, node in zip(origin.inputs, origin.graph.find_nodes(op="placeholder"), strict=True)
        }
        for entry in inputs:
            node = graph.placeholder(entry.name)
            node.meta = dict(examples[entry.kind, entry.target])
            places[entry.kind, entry.target] = node
        memo: dict[fx.Node, fx.Node] = {}
        for entry, node in zip(source.inputs, source.graph.find_nodes(op="placeholder"), strict=True):
            memo[node] = places[entry.kind, entry.target]
        for node in source.graph.nodes:
            if node.op == "call_function":
                memo[node] = graph.node_copy(node, memo.__getitem__)
        results = [memo[value] for value in returned(source.graph)]
        graph.output(())
        outputs, fresh = results[: len(users)], results[len(users) :]
        history: list[fx.Node] = []
        for number, (region, i, value) in enumerate(values):
            slots = [places[InputKind.HISTORY, history_target(region.name, i, slot)] for slot in range(value.slots)]
            history += _next_history(graph, fresh[number], slots) if refreshing else slots
        given = set(places.values())
        outputs = [clone_after(graph, node) if root_of(node) in given else node for node in outputs]
        set_outputs(graph, [*outputs, *own(graph, history)])
        return _subgraph(source, graph)

    graph = fx.Graph()
    examples = {
        (entry.kind, entry.target): node.meta
        for origin in (reuse, refresh)
        for entry, node in zip(origin.inputs, origin.graph.find_nodes(op="placeholder"), strict=True)
    }
    nodes = []
    for entry in inputs:
        node = graph.placeholder(entry.name)
        node.meta = dict(examples[entry.kind, entry.target])
        nodes.append(node)
    branches = (branch(refresh, True), branch(reuse, False))
    graph.output(())
    group = program.regions[0].name
    predicate = placeholder(graph, "refresh", (), torch.bool, torch.device("cpu"))
    root = fx.GraphModule(torch.nn.Module(), graph)
    root.add_submodule("on_refresh", branches[0])
    root.add_submodule("on_reuse", branches[1])
    graph = root.graph
    predicate = next(node for node in graph.nodes if node.name == "refresh")
    nodes = [node for node in graph.nodes if node.op == "placeholder" and node is not predicate]
    with graph.inserting_before(output_node(graph)):
        arms = [graph.get_attr("on_refresh"), graph.get_attr("on_reuse")]
        chosen = graph.call_function(_cond, (predicate, arms[0], arms[1], tuple(nodes)))
        examples_out = [node.meta["val"] for node in returned(branches[0].graph)]
        chosen.meta["val"] = tuple(examples_out)
        items = [_item(graph, chosen, i) for i in range(len(examples_out))]
    set_outputs(graph, items)
    graph.lint()
    root.recompile()
    return program.replace(
        module=root,
        inputs=(*inputs, Input(InputKind.PREDICATE, predicate.name, group)),
        outputs=(*users, *state),
    )


def _item(graph: fx.Graph, source: fx.Node, index: int) -> fx.Node:
    import operator

    node = graph.call_function(operator.getitem, (source, index))
    node.meta["val"] = source.meta["val"][index]
    return node


def _per_region(program: StepProgram, groups: tuple[tuple[str, ...], ...]) -> StepProgram:
    names = [region.name for region in program.regions]
    predicate_of = {name: group_name(group) for group in groups for name in group}
    reach = Reach(program.graph)
    by_name = program.named_nodes()
    for region in program.regions:
        if not reach.is_convex(by_name[name] for name in region.nodes):
            raise RegionError(
                f"region {region.name!r} cannot be decided inside the graph on its own: a path leaves it and comes "
                "back. Split it into connected parts, let all regions share one decision, or use decide='host'"
            )
    result = program.copy()
    graph = result.graph
    nodes = result.named_nodes()
    inputs = list(program.inputs)
    root = fx.GraphModule(torch.nn.Module(), graph)
    graph = root.graph
    nodes = {node.name: node for node in graph.nodes}
    predicates: dict[str, fx.Node] = {}
    for group in groups:
        node = placeholder(graph, f"refresh_{safe(group_name(group))}", (), torch.bool, torch.device("cpu"))
        predicates[group_name(group)] = node
        inputs.append(Input(InputKind.PREDICATE, node.name, group_name(group)))
    width = max(value.slots for region in program.regions for value in region.cut)
    rows: fx.Node | None = None
    if width > 1:
        rows = placeholder(graph, "rows", (len(names), width), torch.float32, program.regions[0].cut[0].device)
        inputs.append(Input(InputKind.ROWS, rows.name, "rows"))
    histories: dict[str, list[list[fx.Node]]] = {}
    for region in program.regions:
        per_value = []
        for i, value in enumerate(region.cut):
            slots = []
            for slot in range(value.slots):
                name = f"h_{safe(region.name)}_{i}_{slot}"
                slots.append(placeholder(graph, name, value.shape, value.dtype, value.device))
                inputs.append(Input(InputKind.HISTORY, slots[-1].name, history_target(region.name, i, slot)))
            per_value.append(slots)
        histories[region.name] = per_value

    state: list[fx.Node] = []
    outputs = list(program.outputs)
    with graph.inserting_before(output_node(graph)):
        for number, region in enumerate(program.regions):
            flows, history = _guard_region(
                root, region, number, nodes, predicates[predicate_of[region.name]], histories[region.name], rows, names
            )
            inside = {nodes[name] for name in region.nodes}
            for i, value in enumerate(region.cut):
                fresh, flow = nodes[value.node], flows[i]
                fresh.replace_all_uses_with(
                    flow,
                    delete_user_cb=lambda user, inside=inside: user not in inside,  # type: ignore[misc]
                )
                nodes[value.node] = flow
                for slot in range(value.slots):
                    state.append(history[i][slot])
                    outputs.append(Output(OutputKind.STATE, history_target(region.name, i, slot)))
    users = [value for value in returned(graph) if isinstance(value, fx.Node)]
    held = {slot for per_value in histories.values() for slots in per_value for slot in slots}
    # Conditionals own what they return, so a user output can share memory with the state only by being that item.
    items = {id(node) for node in state}
    users = [clone_after(graph, n) if root_of(n) in held or id(root_of(n)) in items else n for n in users]
    set_outputs(graph, [*users, *state])
    _sort(graph)
    eliminate_dead(graph)
    graph.lint()
    root.recompile()
    result = program.replace(module=root, inputs=tuple(inputs), outputs=tuple(outputs))
    return drop_unused_inputs(result, frozenset({InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT}))


def _guard_region(
    root: fx.GraphModule,
    region: Region,
    number: int,
    nodes: dict[str, fx.Node],
    predicate: fx.Node,
    histories: list[list[fx.Node]],
    rows: fx.Node | None,
    names: list[str],
) -> tuple[list[fx.Node], list[list[fx.Node]]]:
    """Insert the conditional of one region; returns its cut values and its new history, as nodes of the main graph."""
    graph = root.graph
    inside = [node for node in graph.nodes if node.name in region.nodes]
    bases = [nodes[value.base] for value in region.cut if value.base is not None]
    entering = dict.fromkeys([*(s for node in inside for s in node.all_input_nodes if s not in set(inside)), *bases])
    slots = [slot for per_value in histories for slot in per_value]
    operands = [*entering, *slots, *([rows] if rows is not None else [])]

    def branch(refreshing: bool) -> fx.GraphModule:
        sub = fx.Graph()
        memo: dict[fx.Node, fx.Node] = {}
        for operand in operands:
            memo[operand] = sub.placeholder(operand.name)
            memo[operand].meta = dict(operand.meta)
        if refreshing:
            for node in inside:
                memo[node] = sub.node_copy(node, memo.__getitem__)
        sub.output(())
        flow: list[fx.Node] = []
        kept: list[fx.Node] = []
        with sub.inserting_before(output_node(sub)):
            for value, per_value in zip(region.cut, histories, strict=True):
                held = [memo[slot] for slot in per_value]
                base = memo[nodes[value.base]] if value.base is not None else None
                if refreshing:
                    fresh = memo[next(node for node in inside if node.name == value.node)]
                    stored = fresh if base is None else call(sub, aten.sub.Tensor, fresh, base)
                    kept += _next_history(sub, stored, held)
                    flow.append(fresh)
                else:
                    row = row_of(sub, memo[rows] if rows is not None else None, number, value.slots)
                    filled = weighted_sum(sub, held, row, value)
                    flow.append(filled if base is None else call(sub, aten.add.Tensor, base, filled))
                    kept += held
        set_outputs(sub, own(sub, [*flow, *kept]))
        eliminate_dead(sub)
        sub.lint()
        return fx.GraphModule(torch.nn.Module(), sub)

    arms = []
    for label, refreshing in (("on_refresh", True), ("on_reuse", False)):
        name = f"{label}_{number}"
        root.add_submodule(name, branch(refreshing))
        arms.append(graph.get_attr(name))
    chosen = graph.call_function(_cond, (predicate, arms[0], arms[1], tuple(operands)))
    with fake_mode_of(graph):
        chosen.meta["val"] = tuple(
            torch.empty_like(node.meta["val"], memory_format=torch.contiguous_format)
            for node in returned(root.get_submodule(f"on_refresh_{number}").graph)  # type: ignore[arg-type]
        )
    items = [_item(graph, chosen, i) for i in range(len(chosen.meta["val"]))]
    flows, rest = items[: len(region.cut)], items[len(region.cut) :]
    history = []
    for value in region.cut:
        history.append(rest[: value.slots])
        rest = rest[value.slots :]
    return flows, history


def _sort(graph: fx.Graph) -> None:
    """Bring the graph into topological order (conditionals were appended at its end), keeping it as it was otherwise."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    waiting = {node: len(node.all_input_nodes) for node in graph.nodes}
    import heapq

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


__all__ = ["CutValue", "InsertGuards", "copy", "group_name"]
