"""Verify: the executable specification of the intermediate form, checked after each pass in tests and on request."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from diffcache_fx.errors import VerificationError
from diffcache_fx.program import InputKind, OutputKind, StepProgram, returned

from .aliasing import root_of
from .purity import mutates

_DECIDING = (InputKind.PREDICATE, InputKind.FORCE)
_cond = torch.ops.higher_order.cond


@dataclass(frozen=True)
class Verify:
    """Return the program unchanged if it obeys the rules; raise VerificationError naming `after` and the node if not.

    Rules:
    1. The graph is well formed; each placeholder and each result has its entry in `inputs` and `outputs`.
    2. No operator mutates; parameters are inputs (no `get_attr` of a tensor), in branches too.
    3. Every node carries an example value.
    4. State inputs and outputs agree in name, and no state output shares memory with a user output or an input.
    5. No branch of a conditional returns an operand; its two branches return values of the same shapes and types.
    6. Regions are disjoint, made of existing nodes, and their cuts come from them.
    """

    after: str = ""

    def __call__(self, program: StepProgram) -> StepProgram:
        for fault in _faults(program):
            raise VerificationError(f"after {self.after or 'capture'}: {fault}")
        return program


def walk(module: fx.GraphModule) -> Iterator[tuple[fx.GraphModule, fx.Node]]:
    """Every node of a graph and of the branch graphs inside it: the one place that descends into conditionals."""
    for node in module.graph.nodes:
        yield module, node
        if node.op == "get_attr":
            child = getattr(module, str(node.target), None)
            if isinstance(child, fx.GraphModule):
                yield from walk(child)


def _faults(program: StepProgram) -> Iterator[str]:
    graph = program.graph
    try:
        graph.lint()
    except RuntimeError as error:
        yield f"the graph is malformed: {error}"
        return
    names = [node.name for node in graph.nodes if node.op == "placeholder"]
    if names != [entry.name for entry in program.inputs]:
        yield f"the placeholders {names[:3]}... are not the declared inputs"
        return
    results = returned(graph)
    if len(results) != len(program.outputs):
        yield f"{len(results)} results for {len(program.outputs)} declared outputs"
        return
    for module, node in walk(program.module):
        if node.op == "call_function" and mutates(node):
            yield f"{node.name} writes in place ({node.target})"
        if node.op == "get_attr" and not isinstance(getattr(module, str(node.target), None), fx.GraphModule):
            yield f"{node.name} reads the attribute {node.target}: it should be an input"
        if node.op in ("call_function", "placeholder") and "val" not in node.meta:
            yield f"{node.name} carries no example value"
        if node.op == "call_function" and node.target is _cond:
            yield from _branch_faults(module, node)
    yield from _state_faults(program, results)
    yield from _region_faults(program)


def _branch_faults(module: fx.GraphModule, node: fx.Node) -> Iterator[str]:
    shapes = []
    for arm in node.args[1:3]:
        assert isinstance(arm, fx.Node)
        branch = getattr(module, str(arm.target))
        values = returned(branch.graph)
        for value in values:
            if isinstance(value, fx.Node) and root_of(value).op == "placeholder":
                yield f"a branch of {node.name} returns its operand {root_of(value).name}"
        shapes.append([(tuple(v.meta["val"].shape), v.meta["val"].dtype) for v in values])
    if shapes[0] != shapes[1]:
        yield f"the branches of {node.name} return different shapes or types"


def _state_faults(program: StepProgram, results: tuple[fx.Node, ...]) -> Iterator[str]:
    guarded = any(entry.kind in _DECIDING for entry in program.inputs)
    given = {entry.target for _, entry in program.inputs_of(InputKind.HISTORY)}
    made = {entry.target for _, entry in program.outputs_of(OutputKind.STATE)}
    if guarded and given != made:
        yield f"state goes in as {sorted(given)[:3]} and out as {sorted(made)[:3]}"
    roots = {root_of(results[i]) for i, _ in program.outputs_of(OutputKind.USER)}
    for i, entry in program.outputs_of(OutputKind.STATE):
        root = root_of(results[i])
        if root in roots or (root.op == "placeholder"):
            yield f"the state {entry.target} shares memory with {root.name}"
    held = {entry.name for kind in (InputKind.HISTORY, InputKind.ROWS) for _, entry in program.inputs_of(kind)}
    for root in roots:
        if root.op == "placeholder" and root.name in held:
            yield f"an output shares memory with the state input {root.name}"


def _region_faults(program: StepProgram) -> Iterator[str]:
    if program.reused or any(entry.kind in _DECIDING for entry in program.inputs):
        return  # the region's own nodes may be gone by design
    nodes = {node.name for node in program.graph.nodes}
    seen: dict[str, str] = {}
    for region in program.regions:
        for name in region.nodes:
            if name not in nodes:
                yield f"region {region.name!r} names the node {name}, which is not in the graph"
            if name in seen:
                yield f"regions {seen[name]!r} and {region.name!r} both hold {name}"
            seen[name] = region.name
        for value in region.cut:
            if value.node not in region.nodes:
                yield f"the cut of region {region.name!r} holds {value.node}, which it does not compute"
