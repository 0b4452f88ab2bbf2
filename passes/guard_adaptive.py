"""One decision for the whole step, taken in the graph: probe, decision, then a conditional over the rest of the
step."""

from __future__ import annotations

from torch import fx

from diffcache_fx.program import Input, InputKind, Output, OutputKind, StepProgram, output_node, returned

from .decide import Control, Decided, decide_in_graph, settle_in_graph
from .emit import aten, call, own, set_outputs
from .guard_step import by_slot, conditional, gather, history_outputs, without_state
from .purity import eliminate_dead
from .signals import memory_name
from .specialize import Specialize
from .split import Probe, RestOfStep, live_names

Known = dict[tuple[OutputKind, str], fx.Node]


def guard_adaptive(program: StepProgram, control: Control, hoist: bool = False) -> StepProgram:
    """The guarded form of a program that measures signals for one rule, which holds all its regions.

    Inputs of kind MEMORY are what the guard keeps ("rule/name") and the numbers it carries ("rule/#name"); each comes
    out again under the same name, as it is to go into the next step.
    """
    every = frozenset(region.name for region in program.regions)
    refresh, reuse = (RestOfStep()(Specialize(reused)(program)) for reused in (frozenset[str](), every))
    probe = Probe(live_names(refresh))(program)
    (measured,) = program.measured
    rule, guard = control.rule, control.guard
    computed = frozenset({InputKind.LIVE, InputKind.ROWS})
    root, entries, places = gather(program, probe, refresh, reuse, leave=computed)
    graph = root.graph
    with graph.inserting_before(output_node(graph)):
        early = _copy(root, probe, {node: places[slot] for slot, node in by_slot(probe).items()})
        signals = {name: early[OutputKind.SIGNAL, memory_name(rule, name)] for name in measured.before}
        decided = decide_in_graph(graph, control, signals, program.regions[0].cut[0].device)
        for name in live_names(refresh):
            places[InputKind.LIVE, name] = early[OutputKind.LIVE, name]
        if decided.row is not None:
            size = [len(program.regions), max(value.slots for region in program.regions for value in region.cut)]
            row = call(graph, aten.unsqueeze.default, decided.row, 0)
            places[InputKind.ROWS, "rows"] = call(graph, aten.expand.default, row, size)
    items = conditional(root, decided.predicate, refresh, reuse, program, places, hoist)
    common = without_state(refresh)
    late: Known = {(o.kind, o.target): item for o, item in zip(common, items, strict=False)}
    with graph.inserting_before(output_node(graph)):
        signals = {name: late[OutputKind.SIGNAL, memory_name(rule, name)] for name in measured.after}
        settle_in_graph(graph, control, decided, signals)
        for name, kept in guard.kept.items():
            old = places[InputKind.MEMORY, memory_name(rule, name)]
            new = places[InputKind.MEMORY, memory_name(rule, kept.of)] if kept.of not in guard.references else None
            if new is None:
                key = (OutputKind.MEMORY, memory_name(rule, kept.of))
                new = early[key] if key in early else late[key]
            if kept.when == "refresh":
                new = call(graph, aten.where.self, decided.predicate, new, old)
            decided.give(OutputKind.MEMORY, memory_name(rule, name), new)
    return _finish(program, root, entries, decided, common, items)


def _copy(root: fx.GraphModule, source: StepProgram, memo: dict[fx.Node, fx.Node]) -> Known:
    """Copy a program's nodes, and the graphs they call, into a graph; returns its results by kind and target."""
    for node in source.graph.nodes:
        if node.op == "get_attr" and not hasattr(root, str(node.target)):
            root.add_submodule(str(node.target), getattr(source.module, str(node.target)))
        if node.op in ("call_function", "get_attr"):
            memo[node] = root.graph.node_copy(node, memo.__getitem__)
    results = zip(returned(source.graph), source.outputs, strict=True)
    return {(output.kind, output.target): memo[value] for value, output in results}


def _finish(
    program: StepProgram,
    root: fx.GraphModule,
    entries: tuple[Input, ...],
    decided: Decided,
    common: tuple[Output, ...],
    items: list[fx.Node],
) -> StepProgram:
    users = [i for i, output in enumerate(common) if output.kind is OutputKind.USER]
    with root.graph.inserting_before(output_node(root.graph)):
        kept = own(root.graph, decided.values)
    set_outputs(root.graph, [*(items[i] for i in users), *items[len(common) :], *kept])
    eliminate_dead(root.graph)
    root.graph.lint()
    root.recompile()
    outputs = (*(common[i] for i in users), *history_outputs(program), *decided.outputs)
    return program.replace(module=root, inputs=(*entries, *_in_order(root, decided.inputs)), outputs=outputs)


def _in_order(root: fx.GraphModule, inputs: list[Input]) -> list[Input]:
    """Inputs in the order of their placeholders."""
    order = {node.name: i for i, node in enumerate(root.graph.nodes)}
    return sorted(inputs, key=lambda entry: order[entry.name])
