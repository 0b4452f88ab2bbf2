"""The eager lowering: the step program's own generated Python, operator by operator."""

from __future__ import annotations

from diffcache_fx.program import StepProgram

from .lowered import Lowered


def lower(program: StepProgram) -> Lowered:
    """Run the graph as it is; bit-identical to the module it was captured from."""
    return Lowered.of(program, program.module.forward)
