"""One decision for the whole step: a single conditional over the refresh and the reuse program."""

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
    examples = {key: node for source in (refresh, reuse) for key, node in _by_slot(source).items()}
    entries = {(e.kind, e.target): e for e in (*program.inputs, *reuse.inputs) if (e.kind, e.target) in examples}

    root = fx.GraphModule(torch.nn.Module(), fx.Graph())
    graph = root.graph
    places: dict[Slot, fx.Node] = {}
    for slot, entry in entries.items():
        places[slot] = graph.placeholder(entry.name)
        places[slot].meta = dict(examples[slot].meta)
    graph.output(())
    predicate = placeholder(graph, "refresh", (), torch.bool, torch.device("cpu"))
    operands = list(places.values())
    arms = [
        branch(operands, _body(source, program, places, source is refresh), source.module)
        for source in (refresh, reuse)
    ]
    with graph.inserting_before(output_node(graph)):
        items = choose(root, predicate, arms[0], arms[1], operands)
    set_outputs(graph, items)
    graph.lint()
    root.recompile()
    users = tuple(output for output in program.outputs if output.kind is OutputKind.USER)
    state = tuple(
        Output(OutputKind.STATE, history_target(region.name, index, slot))
        for region in program.regions
        for index, value in enumerate(region.cut)
        for slot in range(value.slots)
    )
    decision = Input(InputKind.PREDICATE, predicate.name, program.regions[0].name)
    return program.replace(module=root, inputs=(*entries.values(), decision), outputs=(*users, *state))


def _by_slot(program: StepProgram) -> dict[Slot, fx.Node]:
    nodes = program.graph.find_nodes(op="placeholder")
    return {(entry.kind, entry.target): node for entry, node in zip(program.inputs, nodes, strict=True)}


def _body(source: StepProgram, program: StepProgram, places: dict[Slot, fx.Node], refreshing: bool) -> Body:
    """A specialised program as a branch, returning the user's outputs and the whole history."""

    def write(graph: fx.Graph, operands: dict[fx.Node, fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
        memo = {node: operands[places[slot]] for slot, node in _by_slot(source).items()}
        for node in source.graph.nodes:
            if node.op in ("call_function", "get_attr"):
                memo[node] = graph.node_copy(node, memo.__getitem__)
        results = [memo[value] for value in returned(source.graph)]
        users = sum(output.kind is OutputKind.USER for output in source.outputs)
        fresh = iter(results[users:])
        history: list[fx.Node] = []
        for region in program.regions:
            for index, value in enumerate(region.cut):
                keys = [(InputKind.HISTORY, history_target(region.name, index, s)) for s in range(value.slots)]
                slots = [operands[places[key]] for key in keys]
                history += next_history(next(fresh), slots) if refreshing else slots
        return results[:users], history

    return write
