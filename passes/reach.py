"""Def-use questions about a graph: who feeds whom, what depends on the caller's inputs, what lies in between.

Sets of nodes are Python integers used as bit sets (bit = position in the graph), so that questions about all pairs of
7,000 nodes stay cheap.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property

import torch
from torch import fx

from diffcache_fx.program import InputKind, StepProgram, returned, value_of


class Reach:
    """Reachability over one graph, computed once."""

    def __init__(self, graph: fx.Graph) -> None:
        self.nodes: list[fx.Node] = list(graph.nodes)
        self.position: dict[fx.Node, int] = {node: i for i, node in enumerate(self.nodes)}

    def bits(self, nodes: Iterable[fx.Node]) -> int:
        result = 0
        for node in nodes:
            result |= 1 << self.position[node]
        return result

    def members(self, bits: int) -> list[fx.Node]:
        found = []
        while bits:
            low = bits & -bits
            found.append(self.nodes[low.bit_length() - 1])
            bits ^= low
        return found

    @cached_property
    def above(self) -> list[int]:
        """For each node, the nodes it depends on (itself excluded)."""
        result: list[int] = []
        for node in self.nodes:
            bits = 0
            for source in node.all_input_nodes:
                place = self.position[source]
                bits |= result[place] | (1 << place)
            result.append(bits)
        return result

    @cached_property
    def below(self) -> list[int]:
        """For each node, the nodes that depend on it (itself excluded)."""
        result = [0] * len(self.nodes)
        for place in range(len(self.nodes) - 1, -1, -1):
            bits = 0
            for user in self.nodes[place].users:
                at = self.position[user]
                bits |= result[at] | (1 << at)
            result[place] = bits
        return result

    def ancestors(self, nodes: Iterable[fx.Node]) -> int:
        bits = 0
        for node in nodes:
            bits |= self.above[self.position[node]]
        return bits

    def descendants(self, nodes: Iterable[fx.Node]) -> int:
        bits = 0
        for node in nodes:
            bits |= self.below[self.position[node]]
        return bits

    def between(self, nodes: Iterable[fx.Node]) -> int:
        """The convex hull: `nodes` and everything on a path from one of them to another."""
        chosen = list(nodes)
        return self.bits(chosen) | (self.ancestors(chosen) & self.descendants(chosen))

    def is_convex(self, nodes: Iterable[fx.Node]) -> bool:
        chosen = list(nodes)
        return self.between(chosen) == self.bits(chosen)


def placeholders(program: StepProgram) -> list[fx.Node]:
    return [node for node in program.graph.nodes if node.op == "placeholder"]


def varying(program: StepProgram) -> set[fx.Node]:
    """Nodes that depend on something that may change from step to step: the caller's inputs, the state, the rows."""
    fixed = {InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT}
    found: set[fx.Node] = set()
    for node, entry in zip(placeholders(program), program.inputs, strict=True):
        if entry.kind not in fixed:
            found.add(node)
    for node in program.graph.nodes:
        if node.op != "placeholder" and any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


_LATENT_NAMES = ("hidden_states", "sample", "latents", "latent", "x", "z", "noisy", "input")


def latent_input(program: StepProgram) -> fx.Node | None:
    """The caller's input that is being denoised.

    It is a floating tensor of at least two dimensions; of several, the one shaped like the first output, else the one
    with a usual name, else the first.
    """
    nodes = placeholders(program)
    candidates = []
    for position, _ in program.inputs_of(InputKind.USER):
        value = value_of(nodes[position])
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() >= 2:
            candidates.append(nodes[position])
    if not candidates:
        return None
    outputs = returned(program.graph)
    target = value_of(outputs[0]) if outputs and isinstance(outputs[0], fx.Node) else None
    named = [node for node in candidates if node.name in _LATENT_NAMES]
    if isinstance(target, torch.Tensor):
        shaped = [node for node in candidates if str(node.meta["val"].shape) == str(target.shape)]
        if shaped:
            return next((node for node in shaped if node in named), shaped[0])
    return (named or candidates)[0]


TIME_NAMES = ("timestep", "timesteps", "t", "time", "times", "sigma", "sigmas", "noise_level", "timestep_proj")


def timestep_input(program: StepProgram) -> fx.Node | None:
    """The caller's input that says how noisy the latents are: one with a usual name, else the small one that goes
    through a sine or cosine."""
    nodes = placeholders(program)
    latent = latent_input(program)
    users = [nodes[position] for position, _ in program.inputs_of(InputKind.USER) if nodes[position] is not latent]
    for node in users:
        if node.name in TIME_NAMES:
            return node
    waves = {"aten::sin", "aten::cos"}
    for node in users:
        value = value_of(node)
        if not isinstance(value, torch.Tensor) or value.dim() > 1:
            continue
        seen, queue = {node}, [node]
        while queue:
            for user in queue.pop().users:
                name = getattr(getattr(user.target, "_schema", None), "name", "")
                if name in waves:
                    return node
                small = isinstance(value_of(user), torch.Tensor) and value_of(user).dim() <= 2
                if user not in seen and small:
                    seen.add(user)
                    queue.append(user)
    return None
