"""One decision for the whole step, given from outside: a single conditional over the refresh and the reuse program."""

from __future__ import annotations

import torch
from torch import fx

from diffcache_fx.program import Input, InputKind, Output, OutputKind, StepProgram, output_node, returned

from .conditional import Body, branch, choose, next_history
from .emit import history_target, placeholder, set_outputs
from .specialize import Specialize

Slot = tuple[InputKind, str]


def guard_step(program: StepProgram) -> StepProgram:
    """The guarded form of a program whose regions are all refreshed or all reused; they may be any sets of nodes."""
    refresh = Specialize(frozenset())(program)
    reuse = Specialize(frozenset(region.name for region in program.regions))(program)
    root, entries, places = gather(program, refresh, reuse)
    predicate = placeholder(root.graph, "refresh", (), torch.bool, torch.device("cpu"))
    items = conditional(root, predicate, refresh, reuse, program, places)
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
) -> list[fx.Node]:
    """Add the conditional at the end of a graph; returns what both programs return beside the state, then the history.

    places: the node for each input of the two programs.
    """
    needed = {slot for source in (refresh, reuse) for slot in by_slot(source)}
    needed |= {(InputKind.HISTORY, output.target) for output in history_outputs(program)}
    chosen = {slot: node for slot, node in places.items() if slot in needed}
    operands = list(dict.fromkeys(chosen.values()))
    arms = [
        branch(operands, _body(source, program, chosen, source is refresh), source.module)
        for source in (refresh, reuse)
    ]
    with root.graph.inserting_before(output_node(root.graph)):
        return choose(root, predicate, arms[0], arms[1], operands)


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


def _body(source: StepProgram, program: StepProgram, places: dict[Slot, fx.Node], refreshing: bool) -> Body:
    """A specialised program as a branch, returning what it returns beside the state, and the whole history."""

    def write(graph: fx.Graph, operands: dict[fx.Node, fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
        memo = {node: operands[places[slot]] for slot, node in by_slot(source).items()}
        for node in source.graph.nodes:
            if node.op in ("call_function", "get_attr"):
                memo[node] = graph.node_copy(node, memo.__getitem__)
        results = [memo[value] for value in returned(source.graph)]
        common = len(without_state(source))
        fresh = iter(results[common:])
        history: list[fx.Node] = []
        for region in program.regions:
            for index, value in enumerate(region.cut):
                keys = [(InputKind.HISTORY, history_target(region.name, index, s)) for s in range(value.slots)]
                slots = [operands[places[key]] for key in keys]
                history += next_history(next(fresh), slots) if refreshing else slots
        return results[:common], history

    return write
