"""Attention and feed-forward layers, found from what modules compute: no layer is recognised by its name."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import fx

from diffcache_fx.program import StepProgram, module_path

from .flops import flops_of
from .reach import Reach, latent_input

_SMALL = 0.02  # of the parent's work: below it, a child is a norm's modulation, not a layer


@dataclass(frozen=True)
class Sublayer:
    """One layer: kind is "attention", "cross_attention" or "mlp"."""

    path: str
    kind: str
    nodes: tuple[fx.Node, ...]


def _attends(node: fx.Node) -> bool:
    return (
        "scaled_dot_product" in str(node.target)
        or node.target == torch.ops.aten._softmax.default
        or (node.target == torch.ops.aten.softmax.int)
    )


def find_sublayers(program: StepProgram, reach: Reach | None = None) -> list[Sublayer]:
    """All layers of the modules that hold attention, in graph order.

    An attention layer is the innermost module that both attends and multiplies by weights. Its siblings (children of
    the same module) that do a fair share of the work on values that depend on the latents are feed-forward layers.
    """
    reach = reach or Reach(program.graph)
    calls: dict[str, list[fx.Node]] = defaultdict(list)
    parents: dict[str, str] = {}
    paths: dict[fx.Node, list[str]] = {}
    for node in program.graph.nodes:
        if node.op != "call_function":
            continue
        path = [fqn for fqn, _ in module_path(node)]
        paths[node] = path
        for above, fqn in pairwise(path):
            parents.setdefault(fqn, above)
            calls[fqn].append(node)
    attention: dict[str, fx.Node] = {}
    for node, path in paths.items():
        if _attends(node):
            for fqn in reversed(path[1:]):
                if any(flops_of(other) and not _attends(other) for other in calls[fqn]):
                    attention.setdefault(fqn, node)
                    break
    latent = latent_input(program)
    touched = reach.descendants([latent]) if latent is not None else -1
    layers = []
    for parent in dict.fromkeys(parents[fqn] for fqn in attention):
        children = [fqn for fqn, above in parents.items() if above == parent]
        work = {
            fqn: sum(flops_of(node) for node in calls[fqn] if touched >> reach.position[node] & 1) for fqn in children
        }
        total = sum(work.values())
        for fqn in children:
            nodes = tuple(calls[fqn])
            if fqn in attention:
                layers.append(Sublayer(fqn, _attention_kind(attention[fqn], reach, touched), nodes))
            elif work[fqn] > _SMALL * total and not _holds(fqn, attention):
                layers.append(Sublayer(fqn, "mlp", nodes))
    layers.sort(key=lambda layer: reach.position[layer.nodes[0]])
    return layers


def _attention_kind(node: fx.Node, reach: Reach, touched: int) -> str:
    """Cross attention: the keys depend on nothing that is being denoised."""
    if "scaled_dot_product" not in str(node.target):
        return "attention"
    key = node.args[1]
    assert isinstance(key, fx.Node)
    return "attention" if touched >> reach.position[key] & 1 else "cross_attention"


def _holds(fqn: str, others: dict[str, fx.Node]) -> bool:
    return any(other.startswith(fqn + ".") for other in others)
