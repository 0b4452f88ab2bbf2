"""Repeated blocks, found from which module each node was traced in and from def-use: no model is named.

A stack is a numbered container of modules of one class that run in sequence on the latents' path. A transformer's trunk
is its stacks in order (double blocks, then single blocks, say).
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from torch import fx

from diffcache_fx.program import StepProgram, module_path

from .flops import flops_of
from .reach import Reach, latent_input

# A stack that does less than this share of the work of the largest one is an embedder or a head, not part of the trunk.
_SMALL = 0.02


@dataclass(frozen=True)
class Block:
    """One member of a stack: its module path, class, nodes in graph order, and FLOPs."""

    path: str
    kind: str
    nodes: tuple[fx.Node, ...]
    flops: int


@dataclass(frozen=True)
class Stack:
    """Blocks of one class under one container, in the order they run."""

    container: str
    kind: str
    blocks: tuple[Block, ...]

    @property
    def flops(self) -> int:
        return sum(block.flops for block in self.blocks)


def _numbered(fqn: str) -> str | None:
    """The container's path if the last part of the path is a number, else None."""
    container, _, last = fqn.partition("@")[0].rpartition(".")
    return container if last.isdigit() and container else None


def find_stacks(program: StepProgram) -> list[Stack]:
    """All outermost stacks of at least two blocks, in the order of their first node."""
    paths = {node: module_path(node) for node in program.graph.nodes if node.op == "call_function"}
    members: dict[tuple[str, str], dict[str, list[fx.Node]]] = defaultdict(lambda: defaultdict(list))
    inner: set[tuple[str, str]] = set()
    for node, path in paths.items():
        for depth, (fqn, kind) in enumerate(path):
            container = _numbered(fqn)
            if container is not None:
                members[container, kind][fqn].append(node)
                if depth + 1 < len(path):
                    inner.add((container, kind))
    # Only modules with submodules of their own count as blocks: `proj_out.0`, `proj_out.2` are two linears, no stack.
    groups = {key: found for key, found in members.items() if len(found) >= 2 and key in inner}
    outermost: dict[tuple[str, str], dict[str, list[fx.Node]]] = {}
    for (container, kind), found in groups.items():
        parents = {fqn.partition("@")[0] for (_, _), other in groups.items() for fqn in other}
        if not any(container == parent or container.startswith(parent + ".") for parent in parents):
            outermost[container, kind] = found
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    stacks = []
    for (container, kind), found in outermost.items():
        blocks = [Block(fqn, kind, tuple(nodes), sum(flops_of(node) for node in nodes)) for fqn, nodes in found.items()]
        blocks.sort(key=lambda block: order[block.nodes[0]])
        stacks.append(Stack(container, kind, tuple(blocks)))
    stacks.sort(key=lambda stack: order[stack.blocks[0].nodes[0]])
    return stacks


def find_trunk(program: StepProgram, reach: Reach | None = None) -> list[Block]:
    """The blocks a denoiser spends its time in, in order: those of all stacks in series on the latents' path.

    Returns an empty list where no stack is found.
    """
    stacks = find_stacks(program)
    if not stacks:
        return []
    reach = reach or Reach(program.graph)
    latent = latent_input(program)
    if latent is not None:
        touched = reach.descendants([latent])
        on_path = [s for s in stacks if all(reach.bits(block.nodes) & touched for block in s.blocks)]
        stacks = on_path or stacks
    anchor = max(stacks, key=lambda stack: stack.flops)
    anchor_bits = reach.bits(node for block in anchor.blocks for node in block.nodes)
    chosen = []
    for stack in stacks:
        nodes = [node for block in stack.blocks for node in block.nodes]
        in_series = reach.descendants(nodes) & anchor_bits or reach.ancestors(nodes) & anchor_bits
        if stack is anchor or (in_series and stack.flops >= _SMALL * anchor.flops):
            chosen.append(stack)
    blocks = [block for stack in chosen for block in stack.blocks]
    blocks.sort(key=lambda block: reach.position[block.nodes[0]])
    return _in_series(blocks, reach)


def _in_series(blocks: list[Block], reach: Reach) -> list[Block]:
    """Drop blocks that nothing after them in the list depends on, unless they are the last of the chain."""
    kept: list[Block] = []
    for block in blocks:
        if kept and not reach.ancestors(block.nodes) & reach.bits(kept[-1].nodes):
            # Runs beside the chain (a control branch, say): the hull of the region takes it in where it belongs.
            continue
        kept.append(block)
    return kept
