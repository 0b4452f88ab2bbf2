"""What two specialised programs of one step have in common: what they compute alike before they part, and after they
meet again. It need not stand in both branches of a conditional."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx

from diffcache_fx.program import InputKind, StepProgram, returned, value_of

from .split import owns_memory

_STATE = (InputKind.HISTORY, InputKind.ROWS)


@dataclass(frozen=True)
class Common:
    """before: names of nodes that depend on no state in either program. after: names of nodes that are the same
    computation on what the branches return. joints: those values, as pairs (in the refresh program, in the reuse
    program)."""

    before: frozenset[str]
    after: frozenset[str]
    joints: tuple[tuple[fx.Node, fx.Node], ...]


def nothing_common(refresh: StepProgram, reuse: StepProgram, results: int) -> Common:
    """Where each branch computes everything by itself."""
    ends = (tuple(returned(source.graph)[:results]) for source in (refresh, reuse))
    return Common(frozenset(), frozenset(), tuple(zip(*ends, strict=True)))


def common_parts(original: StepProgram, refresh: StepProgram, reuse: StepProgram, results: int) -> Common:
    """Compare two specialisations of `original`. results: how many values both return, the state after them."""
    fresh, held = ({node.name: node for node in source.graph.nodes} for source in (refresh, reuse))
    known = {node.name for node in original.graph.nodes if node.op == "call_function"}
    shared = known & fresh.keys() & held.keys()
    stateful = _depending(reuse)
    before = frozenset(name for name in shared if held[name] not in stateful)
    ends = [tuple(returned(source.graph)[:results]) for source in (refresh, reuse)]
    after = _closed(shared - before, fresh, held, ends)
    joints = _joints(after, before, fresh, held, ends)
    if not all(_joinable(*pair) for pair in joints):
        after = frozenset()
        joints = _joints(after, before, fresh, held, ends)
    return Common(before, after, joints)


def _depending(program: StepProgram) -> set[fx.Node]:
    """Nodes that the cache state reaches."""
    found: set[fx.Node] = set()
    kinds = dict(zip(program.graph.find_nodes(op="placeholder"), program.inputs, strict=True))
    for node in program.graph.nodes:
        entry = kinds.get(node)
        if (entry is not None and entry.kind in _STATE) or any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _closed(
    names: set[str], fresh: dict[str, fx.Node], held: dict[str, fx.Node], ends: list[tuple[fx.Node, ...]]
) -> frozenset[str]:
    """The largest part of `names` that nothing outside of it uses, results aside."""
    outputs = [{node.name for node in side} for side in ends]
    left = set(names)
    changed = True
    while changed:
        changed = False
        for name in list(left):
            for nodes, returns in zip((fresh, held), outputs, strict=True):
                users = {user.name for user in nodes[name].users if user.op != "output"}
                escapes = any(user.op == "output" for user in nodes[name].users) and name not in returns
                if users - left or escapes:
                    left.discard(name)
                    changed = True
                    break
    return frozenset(left)


def _joints(
    after: frozenset[str],
    before: frozenset[str],
    fresh: dict[str, fx.Node],
    held: dict[str, fx.Node],
    ends: list[tuple[fx.Node, ...]],
) -> tuple[tuple[fx.Node, fx.Node], ...]:
    """What the common end takes from the branches, and results that they compute themselves."""
    pairs: dict[fx.Node, fx.Node] = {}

    def note(a: fx.Node, b: fx.Node) -> None:
        outside = a.op == "placeholder" or a.name in before or a.name in after
        if not outside or a.name != b.name:
            pairs.setdefault(a, b)

    for name in (node.name for node in fresh.values() if node.name in after):
        for a, b in zip(_sources(fresh[name]), _sources(held[name]), strict=True):
            note(a, b)
    for a, b in zip(*ends, strict=True):
        if a.name not in after or a.name != b.name:
            pairs.setdefault(a, b)
    return tuple(pairs.items())


def _sources(node: fx.Node) -> list[fx.Node]:
    """The nodes among a node's arguments, in order, repeated ones included."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), lambda n: found.append(n) or n)  # type: ignore[func-returns-value]
    return found


def _joinable(a: fx.Node, b: fx.Node) -> bool:
    """Whether a conditional may return either: tensors of one layout, which is that of a copy."""
    values = value_of(a), value_of(b)
    return all(
        isinstance(value, torch.Tensor) and value.is_contiguous() and value.dtype == values[0].dtype for value in values
    )


def handed_on(source: StepProgram, common: Common) -> set[str]:
    """Names of the nodes of the common beginning that a branch takes as operands: tensors in memory of their own.
    Views of them, and sizes, are taken anew in the branch."""
    nodes = {node.name: node for node in source.graph.nodes}
    found: set[str] = set()
    waiting: list[fx.Node] = []

    def ask(sources: Iterable[fx.Node]) -> None:
        for node in sources:
            if node.name in common.before and node.name not in found:
                if owns_memory(node):
                    found.add(node.name)
                else:
                    waiting.append(node)

    for node in nodes.values():
        inner = node.op == "call_function" and node.name not in common.before and node.name not in common.after
        if inner or node.op == "output":
            ask(node.all_input_nodes)
    while waiting:
        ask(waiting.pop().all_input_nodes)
    return found
