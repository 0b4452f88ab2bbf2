"""FoldEmpty: tensors without elements as what they are, whatever computes them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from diffcache_fx.program import StepProgram

from .emit import call, fake_mode_of
from .everywhere import everywhere
from .purity import eliminate_dead

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class FoldEmpty:
    """Replace what computes an empty tensor by an empty tensor, and attention over no keys by zeros.

    Models have such tensors where a part of the input is absent. Runtimes read a size of 0 in other ways than PyTorch:
    in ONNX's Reshape it stands for the size that was there before.

    Before:  y = slice(x, 1, 0, -500); k = view(linear(y, w), [2, 0, 4, 8])
    After:   k = zeros([2, 0, 4, 8])

    Rules:
    1. Only where the size is known to be 0. Branches of conditionals are rewritten, too.
    2. Only in finished programs: the new nodes belong to no region.
    """

    def __call__(self, program: StepProgram) -> StepProgram:
        modules = [module for module in program.module.modules() if isinstance(module, fx.GraphModule)]
        if not any(_folds(node) for module in modules for node in module.graph.nodes):
            return program
        return everywhere(program, _fold)


def _folds(node: fx.Node) -> bool:
    if node.op != "call_function" or node.target is torch.ops.aten.zeros.default:
        return False
    if node.target is _ATTENTION and _is_empty(node.args[1]):
        return True
    return _is_empty(node)


def _is_empty(node: Any) -> bool:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    return isinstance(value, torch.Tensor) and any(isinstance(size, int) and size == 0 for size in value.shape)


def _fold(graph: fx.Graph) -> None:
    for node in [node for node in graph.nodes if _folds(node)]:
        value = node.meta["val"]
        with graph.inserting_before(node), fake_mode_of(graph):
            zeros = torch.ops.aten.zeros.default
            made = call(graph, zeros, list(value.shape), dtype=value.dtype, device=value.device)
        node.replace_all_uses_with(made)
    eliminate_dead(graph)
