"""AddSignals: the graph measures what adaptive guards compare with their thresholds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import fx

from diffcache_fx.adaptive import AdaptiveGuard
from diffcache_fx.errors import RegionError
from diffcache_fx.program import (
    Input,
    InputKind,
    Measured,
    Output,
    OutputKind,
    StepProgram,
    output_node,
    returned,
    size_hint,
)

from .aliasing import is_view, root_of
from .emit import aten, call, placeholder, set_outputs
from .inline import inline
from .reach import Reach
from .references import References


def memory_name(rule: int, name: str) -> str:
    """How a number or tensor that a guard keeps is addressed among a program's inputs and outputs."""
    return f"{rule}/{name}"


@dataclass(frozen=True)
class AddSignals:
    """Add the reference quantities and signals of each rule's adaptive guard as outputs, and what it keeps as inputs.

    guards: (index of the rule, its guard). Without any, the program comes back as it is.

    Rules:
    1. A quantity is an output of kind MEMORY, "rule/name", in memory of its own; the caller decides whether it replaces
       the kept one, which is an input of kind MEMORY.
    2. A signal is a float32 scalar, an output of kind SIGNAL.
    3. A signal may look into a region, as long as nothing it depends on comes from the cache at a reuse step.
    4. Regions whose forecast is verified are noted in `measured`: Specialize compares them.

    Before:  a = block0(x); b = block1(a); return head(b)
    After:   (kept) a = block0(x); r = a - x; s = mean|r - kept| / mean|kept|; b = block1(a); return head(b), r, s

    Refuses: a model without the quantity; a signal that depends on what is cached, and so is not known before it.
    """

    guards: tuple[tuple[int, AdaptiveGuard], ...] = ()

    def __call__(self, program: StepProgram) -> StepProgram:
        if not self.guards:
            return program
        result = program.copy()
        writer = _Writer(program, result)
        measured = [writer.add(rule, guard) for rule, guard in self.guards]
        set_outputs(result.graph, writer.values)
        result.graph.lint()
        result.module.recompile()
        return result.replace(inputs=tuple(writer.inputs), outputs=tuple(writer.outputs), measured=tuple(measured))


class _Writer:
    """Adds the nodes of one guard after another to the copy of a program."""

    def __init__(self, program: StepProgram, result: StepProgram) -> None:
        self.program, self.graph = program, result.graph
        self.nodes = result.named_nodes()
        self.references = References(program)
        self.inputs, self.outputs = list(program.inputs), list(program.outputs)
        self.values: list[fx.Node] = list(returned(result.graph))
        reach = self.references.reach
        names = program.named_nodes()
        cached = [names[value.node] for region in program.regions for value in region.cut]
        self.tainted = reach.bits(cached) | reach.descendants(cached)  # differs between a refresh and a reuse

    def add(self, rule: int, guard: AdaptiveGuard) -> Measured:
        now: dict[str, fx.Node] = {}
        early: list[str] = []
        for name, reference in guard.references.items():
            try:
                node, base = self.references.find(reference)
            except RegionError as error:
                raise RegionError(f"the guard {guard.kind!r} does not apply to this model: {error}") from error
            if not self._late(node):
                early.append(name)
            with self.graph.inserting_before(output_node(self.graph)):
                now[name] = self.nodes[node.name]
                if base is not None:
                    now[name] = call(self.graph, aten.sub.Tensor, now[name], self.nodes[base.name])
        kept = {name: self._keep(rule, name, now[self._origin(guard, name)]) for name in guard.kept}
        with self.graph.inserting_before(output_node(self.graph)):
            known = {name: now[name] for name in early}
            before = self._measure(known, kept, rule, guard) if guard.references else {}
            after = inline(self.graph, guard.after, now, kept) if len(early) < len(now) else {}
            for name, node in {**before, **after}.items():
                self._output(OutputKind.SIGNAL, memory_name(rule, name), node)
            for name in dict.fromkeys(self._origin(guard, name) for name in guard.kept):
                node = now[name]
                shown = {root_of(value) for value in self.values}
                loose = not node.meta["val"].is_contiguous()
                if loose or is_view(node) or node.op == "placeholder" or node in shown:
                    node = call(self.graph, aten.clone.default, node, memory_format=torch.contiguous_format)
                self._output(OutputKind.MEMORY, memory_name(rule, name), node)
        checks = tuple(r.name for r in self.program.regions if r.rule == rule)[-1:] if guard.checks else ()
        late = tuple(name for name in now if name not in early)
        return Measured(rule, tuple(before), (*after, *(("error",) if checks else ())), checks, tuple(early), late)

    def _measure(
        self, known: dict[str, fx.Node], kept: dict[str, fx.Node], rule: int, guard: AdaptiveGuard
    ) -> dict[str, fx.Node]:
        try:
            return inline(self.graph, guard.before, known, kept)
        except KeyError as error:
            regions = [region.name for region in self.program.regions if region.rule == rule]
            raise RegionError(
                f"the guard {guard.kind!r} watches {error}, which is known only after the regions it decides for "
                f"({', '.join(regions[:3])}): leave more blocks out at the front (first=)"
            ) from error

    def _late(self, node: fx.Node) -> bool:
        return bool(self.tainted >> self.references.reach.position[node] & 1)

    @staticmethod
    def _origin(guard: AdaptiveGuard, name: str) -> str:
        """The reference quantity that a kept one goes back to."""
        source = guard.kept[name].of
        return source if source in guard.references else _Writer._origin(guard, source)

    def _keep(self, rule: int, name: str, like: fx.Node) -> fx.Node:
        example = like.meta["val"]
        node = placeholder(self.graph, f"kept_{rule}_{name}", example.shape, example.dtype, example.device)
        self.inputs.append(Input(InputKind.MEMORY, node.name, memory_name(rule, name)))
        return node

    def _output(self, kind: OutputKind, target: str, node: fx.Node) -> None:
        self.values.append(node)
        self.outputs.append(Output(kind, target))


def early_outputs(program: StepProgram) -> set[tuple[OutputKind, str]]:
    """Kind and target of the outputs that are known before the decision."""
    return {
        (kind, memory_name(entry.rule, name))
        for entry in program.measured
        for kind, names in ((OutputKind.SIGNAL, entry.before), (OutputKind.MEMORY, entry.early))
        for name in names
    }


def probe_nodes(program: StepProgram) -> frozenset[str]:
    """Names of the nodes that must run before the decision: all that the early signals and quantities depend on."""
    reach = Reach(program.graph)
    early = early_outputs(program)
    results = returned(program.graph)
    wanted = [results[i] for i, output in enumerate(program.outputs) if (output.kind, output.target) in early]
    bits = reach.bits(wanted) | reach.ancestors(wanted)
    return frozenset(node.name for node in reach.members(bits) if node.op == "call_function")


def kept_bytes(program: StepProgram) -> int:
    """Bytes of what adaptive guards keep, for one context."""
    nodes = program.graph.find_nodes(op="placeholder")
    values = [nodes[i].meta["val"] for i, _ in program.inputs_of(InputKind.MEMORY)]
    return sum(math.prod(size_hint(size) for size in value.shape) * value.dtype.itemsize for value in values)
