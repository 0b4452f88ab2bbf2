"""Split: the step at the decision, into a probe program and the rest of the step."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import fx

from diffcache_fx.program import Input, InputKind, Output, OutputKind, StepProgram, returned, value_of

from .aliasing import root_of
from .emit import drop_unused_inputs, placeholder, safe, set_outputs
from .purity import eliminate_dead
from .signals import early_outputs, probe_nodes

_DROPPABLE = frozenset(set(InputKind) - {InputKind.HISTORY, InputKind.ROWS, InputKind.PREDICATE})


@dataclass(frozen=True)
class RestOfStep:
    """A specialised program without what the probe program has computed before the decision.

    Rules:
    1. What the early signals depend on comes in as inputs of kind LIVE, named by node.
    2. Only tensors in memory of their own are handed on: views of them, and sizes, are taken anew.
    3. The early signals and quantities are no outputs any more: the probe program returned them.

    Before:  (kept) a = block0(x); s = change(a, kept); b = block1(a); return head(b), s
    After:   (a) b = block1(a); return head(b)
    """

    def __call__(self, program: StepProgram) -> StepProgram:
        names = probe_nodes(program)
        early = early_outputs(program)
        result = program.copy()
        graph = result.graph
        kept = [
            (value, output)
            for value, output in zip(returned(graph), program.outputs, strict=True)
            if (output.kind, output.target) not in early
        ]
        set_outputs(graph, [value for value, _ in kept])
        eliminate_dead(graph)
        inputs = list(program.inputs)
        for node in [node for node in graph.nodes if node.name in names and owns_memory(node)]:
            value = node.meta["val"]
            live = placeholder(graph, f"live_{safe(node.name)}", value.shape, value.dtype, value.device)
            live.meta["val"] = value
            inputs.append(Input(InputKind.LIVE, live.name, node.name))
            node.replace_all_uses_with(live)
        eliminate_dead(graph)
        left = {node.name for node in graph.nodes}
        regions = tuple(dataclasses.replace(region, nodes=region.nodes & left) for region in program.regions)
        result = result.replace(inputs=tuple(inputs), outputs=tuple(output for _, output in kept), regions=regions)
        return drop_unused_inputs(result, _DROPPABLE)


@dataclass(frozen=True)
class Probe:
    """The part of a step that runs before the decision: signals, quantities to keep, and what the rest needs of it.

    live: names of the nodes that the rest of the step takes as inputs of kind LIVE.

    Before:  (kept) a = block0(x); s = change(a, kept); b = block1(a); return head(b), s
    After:   (kept) a = block0(x); s = change(a, kept); return s, a
    """

    live: tuple[str, ...]

    def __call__(self, program: StepProgram) -> StepProgram:
        early = early_outputs(program)
        result = program.copy()
        graph = result.graph
        nodes = result.named_nodes()
        kept = [
            (value, output)
            for value, output in zip(returned(graph), program.outputs, strict=True)
            if (output.kind, output.target) in early
        ]
        values, outputs = [value for value, _ in kept], [output for _, output in kept]
        values += [nodes[name] for name in self.live]
        outputs += [Output(OutputKind.LIVE, name) for name in self.live]
        set_outputs(graph, values)
        eliminate_dead(graph)
        result = result.replace(inputs=program.inputs, outputs=tuple(outputs), regions=())
        return drop_unused_inputs(result, _DROPPABLE)


def owns_memory(node: fx.Node) -> bool:
    """Whether a node's value is a tensor that is no view of another."""
    return node.op == "call_function" and isinstance(value_of(node), torch.Tensor) and root_of(node) is node


def live_names(rest: StepProgram) -> tuple[str, ...]:
    """What a rest program takes from the probe program."""
    return tuple(entry.target for _, entry in rest.inputs_of(InputKind.LIVE))
