"""ExpandEinsum: an einsum as the permutations and products it stands for."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import fx

from diffcache_fx.program import StepProgram

from .inline import inline

_EINSUM = torch.ops.aten.einsum.default


@dataclass(frozen=True)
class ExpandEinsum:
    """Replace every einsum by what PyTorch computes for it.

    ONNX's Einsum takes no bfloat16. The operators are those that PyTorch itself runs, so the result is the same to the
    last bit.

    Before:  y = einsum("nhwpqc->nchpwq", x)
    After:   y = permute(x, [0, 5, 1, 3, 2, 4])

    Rules:
    1. Einsums in the branches of conditionals are replaced, too.
    2. Only in finished programs: the new nodes belong to no region.
    """

    def __call__(self, program: StepProgram) -> StepProgram:
        result = program.copy()
        for module in result.module.modules():
            if isinstance(module, fx.GraphModule):
                _expand(module)
        left = {node.name for node in result.graph.nodes}
        regions = tuple(dataclasses.replace(region, nodes=region.nodes & left) for region in result.regions)
        return result.replace(regions=regions)


def _expand(module: fx.GraphModule) -> None:
    graph = module.graph
    found = graph.find_nodes(op="call_function", target=_EINSUM)
    for node in found:
        equation, operands = node.args[0], list(node.args[1])
        with graph.inserting_before(node):
            made = inline(graph, lambda tensors, equation=equation: torch.einsum(equation, tensors), operands)
        node.replace_all_uses_with(made)
        graph.erase_node(node)
    if found:
        graph.lint()
        module.recompile()
