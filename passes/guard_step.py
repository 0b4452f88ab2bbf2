"""One decision for the whole step, given from outside: a single conditional over the refresh and the reuse program."""

from __future__ import annotations

import torch
from torch import fx

from diffcache_fx.program import Input, InputKind, Output, OutputKind, StepProgram, output_node, returned

from .common import Common, common_parts, handed_on, nothing_common
from .conditional import Body, branch, choose, movable, next_history
from .emit import history_target, placeholder, set_outputs
from .specialize import Specialize

Slot = tuple[InputKind, str]


def guard_step(program: StepProgram, hoist: bool = False) -> StepProgram:
    """The guarded form of a program whose regions are all refreshed or all reused; they may be any sets of nodes."""
    refresh = Specialize(frozenset())(program)
    reuse = Specialize(frozenset(region.name for region in program.regions))(program)
    root, entries, places = gather(program, refresh, reuse)
    predicate = placeholder(root.graph, "refresh", (), torch.bool, torch.device("cpu"))
    items = conditional(root, predicate, refresh, reuse, program, places, hoist)
    set_outputs(root.graph, items)
    root.graph.lint()
    root.recompile()
    decision = Input(InputKind.PREDICATE, predicate.name, program.regions[0].name)
    outputs = (*without_state(refresh), *history_outputs(program))
    return program.replace(module=root, inputs=(*entries, decision), outputs=outputs)


def gather(
    program: StepProgram, *sources: StepProgram, leave: frozenset[InputKind] = frozenset()
) -> tuple[fx.GraphModule, tuple[Input, ...], dict[Slot, fx.Node]]:
    """An empty graph with a placeholder for each input of the sources, those of a kind in `leave` apart."""
    examples = {slot: node for source in sources for slot, node in by_slot(source).items()}
    known = (*program.inputs, *(entry for source in sources for entry in source.inputs))
    entries = {
        (entry.kind, entry.target): entry
        for entry in known
        if (entry.kind, entry.target) in examples and entry.kind not in leave
    }
    root = fx.GraphModule(torch.nn.Module(), fx.Graph())
    places: dict[Slot, fx.Node] = {}
    for slot, entry in entries.items():
        places[slot] = root.graph.placeholder(entry.name)
        places[slot].meta = dict(examples[slot].meta)
    root.graph.output(())
    return root, tuple(entries.values()), places


def conditional(
    root: fx.GraphModule,
    predicate: fx.Node,
    refresh: StepProgram,
    reuse: StepProgram,
    program: StepProgram,
    places: dict[Slot, fx.Node],
    hoist: bool,
) -> list[fx.Node]:
    """Add the conditional at the end of a graph; returns what both programs return beside the state, then the history.

    places: the node for each input of the two programs. hoist: put before and after it what both compute alike.
    """
    results = len(without_state(refresh))
    common = common_parts(program, refresh, reuse, results) if hoist else nothing_common(refresh, reuse, results)
    needed = {slot for source in (refresh, reuse) for slot in by_slot(source)}
    needed |= {(InputKind.HISTORY, output.target) for output in history_outputs(program)}
    chosen = {slot: node for slot, node in places.items() if slot in needed}
    memo = {node.name: places[slot] for source in (reuse, refresh) for slot, node in by_slot(source).items()}
    with root.graph.inserting_before(output_node(root.graph)):
        _copy(root, refresh, common.before, memo)
        live = {name: memo[name] for source in (refresh, reuse) for name in handed_on(source, common)}
        operands = list(dict.fromkeys([*chosen.values(), *live.values()]))
        flat = frozenset() if hoist else movable(operands)
        arms = [
            branch(operands, _body(source, program, chosen, live, common, source is refresh), source.module, flat)
            for source in (refresh, reuse)
        ]
        items = choose(root, predicate, arms[0], arms[1], operands, flat=flat)
        count = len(common.joints)
        memo.update({a.name: item for (a, _), item in zip(common.joints, items, strict=False)})
        _copy(root, refresh, common.after, memo)
    return [*(memo[value.name] for value in returned(refresh.graph)[:results]), *items[count:]]


def _copy(root: fx.GraphModule, source: StepProgram, names: frozenset[str], memo: dict[str, fx.Node]) -> None:
    """Copy these nodes of a program into a graph, in the program's order. memo: by name, what they are there."""
    for node in source.graph.nodes:
        if node.name not in names:
            continue
        for inner in node.all_input_nodes:
            if inner.op == "get_attr" and inner.name not in memo:
                target = str(inner.target)
                if not hasattr(root, target):
                    root.add_submodule(target, getattr(source.module, target))
                memo[inner.name] = root.graph.get_attr(target)
        memo[node.name] = root.graph.node_copy(node, lambda n: memo[n.name])


def without_state(source: StepProgram) -> tuple[Output, ...]:
    return tuple(output for output in source.outputs if output.kind is not OutputKind.STATE)


def history_outputs(program: StepProgram) -> tuple[Output, ...]:
    """The history that a guarded program returns, in order."""
    return tuple(
        Output(OutputKind.STATE, history_target(region.name, index, slot))
        for region in program.regions
        for index, value in enumerate(region.cut)
        for slot in range(value.slots)
    )


def by_slot(program: StepProgram) -> dict[Slot, fx.Node]:
    """The placeholder of each input."""
    nodes = program.graph.find_nodes(op="placeholder")
    return {(entry.kind, entry.target): node for entry, node in zip(program.inputs, nodes, strict=True)}


def _body(
    source: StepProgram,
    program: StepProgram,
    places: dict[Slot, fx.Node],
    live: dict[str, fx.Node],
    common: Common,
    refreshing: bool,
) -> Body:
    """A specialised program as a branch, without the common end, returning the joints and the whole history.

    live: what comes from the common beginning; views of it are taken anew."""

    def write(graph: fx.Graph, operands: dict[fx.Node, fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
        memo = {node: operands[places[slot]] for slot, node in by_slot(source).items()}
        for node in source.graph.nodes:
            if node.name in live:
                memo[node] = operands[live[node.name]]
            elif node.op in ("call_function", "get_attr") and node.name not in common.after:
                memo[node] = graph.node_copy(node, memo.__getitem__)
        results = len(without_state(source))
        fresh = iter([memo[value] for value in returned(source.graph)[results:]])
        history: list[fx.Node] = []
        for region in program.regions:
            for index, value in enumerate(region.cut):
                keys = [(InputKind.HISTORY, history_target(region.name, index, s)) for s in range(value.slots)]
                slots = [operands[places[key]] for key in keys]
                history += next_history(next(fresh), slots) if refreshing else slots
        return [memo[pair[0 if refreshing else 1]] for pair in common.joints], history

    return write
