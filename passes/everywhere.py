"""Rewriting a finished program in all of its graphs: its own, and those of conditionals' branches."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from torch import fx

from diffcache_fx.program import StepProgram


def everywhere(program: StepProgram, rewrite: Callable[[fx.Graph], None]) -> StepProgram:
    """A copy of the program whose every graph `rewrite` has changed in place. What is new belongs to no region."""
    result = program.copy()
    for module in result.module.modules():
        if isinstance(module, fx.GraphModule):
            rewrite(module.graph)
            module.graph.lint()
            module.recompile()
    left = {node.name for node in result.graph.nodes}
    regions = tuple(dataclasses.replace(region, nodes=region.nodes & left) for region in result.regions)
    return result.replace(regions=regions)
