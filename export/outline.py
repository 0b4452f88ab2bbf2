"""Outlining: repeated blocks become one subgraph that is called many times, so that each distinct block is compiled once."""

from __future__ import annotations

from diffcache_fx.program import StepProgram


def outline(program: StepProgram) -> StepProgram:
    return program
