"""The nested scales of a U-Net, found from the skip values that cross them.

Where a value s and a value m that was computed from s meet again in a concatenation, what lies between s and m is one
scale; a U-Net is a chain of such scales, one inside the other. DeepCache (Ma et al., CVPR 2024) caches m of one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import fx

from diffcache_fx.program import StepProgram, size_hint, value_of

from .flops import flops_of
from .reach import Reach, latent_input

aten = torch.ops.aten


@dataclass(frozen=True)
class Scale:
    """One scale: `inside` runs from the skip value to `main`, which `join` puts together with the skip again."""

    skip: fx.Node
    main: fx.Node
    join: fx.Node
    inside: int  # bit set over the graph's nodes, `main` included
    flops: int


def _joined(node: fx.Node) -> list[fx.Node]:
    if node.target == aten.cat.default and isinstance(node.args[0], (list, tuple)):
        return [value for value in node.args[0] if isinstance(value, fx.Node)]
    if node.target == aten.add.Tensor:
        return [value for value in node.args[:2] if isinstance(value, fx.Node)]
    return []


def _extent(node: fx.Node) -> int:
    """Number of positions (pixels, frames): the size without batch and channels."""
    value = value_of(node)
    if not isinstance(value, torch.Tensor) or value.dim() < 3:
        return 0
    return math.prod(size_hint(size) for size in value.shape[2:])


def find_scales(program: StepProgram, reach: Reach | None = None) -> list[Scale]:
    """The longest chain of nested scales, outermost first; empty for models without long skips.

    A concatenation joins a scale; so does an addition, if the values in between have a coarser resolution than the skip
    (otherwise it is an ordinary residual).
    """
    reach = reach or Reach(program.graph)
    latent = latent_input(program)
    if latent is None:
        return []
    on_path = reach.descendants([latent])
    cost = [flops_of(node) for node in reach.nodes]
    found: list[Scale] = []
    for node in reach.nodes:
        if node.op != "call_function" or not on_path >> reach.position[node] & 1:
            continue
        values = _joined(node)
        if len(values) != 2:
            continue
        for skip, main in (values, values[::-1]):
            place = reach.position[main]
            if not reach.above[place] >> reach.position[skip] & 1:
                continue
            inside = (reach.above[place] & reach.descendants([skip])) | (1 << place)
            nodes = reach.members(inside)
            flops = sum(cost[reach.position[n]] for n in nodes)
            coarser = 0 < min((_extent(n) for n in nodes if _extent(n)), default=0) < _extent(skip)
            if flops and (node.target == aten.cat.default or coarser):
                found.append(Scale(skip, main, node, inside, flops))
    found.sort(key=lambda scale: -scale.flops)
    chain: list[Scale] = []
    for scale in found:
        holds = not chain or (
            scale.inside & ~chain[-1].inside == 0
            and scale.inside != chain[-1].inside
            and chain[-1].inside >> reach.position[scale.join] & 1
        )
        if holds:
            chain.append(scale)
    return chain if len(chain) >= 2 else []


def is_unet(scales: list[Scale]) -> bool:
    """True if the scales differ in resolution (long skips inside one resolution make a transformer, not a U-Net)."""
    return len({_extent(scale.skip) for scale in scales}) > 1
