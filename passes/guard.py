"""InsertGuards: one program that holds both ways of every step, chosen inside the graph by `torch.cond`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from diffcache_fx.errors import RegionError
from diffcache_fx.program import StepProgram

from .decide import Control
from .guard_adaptive import guard_adaptive
from .guard_regions import guard_regions
from .guard_step import guard_step


@dataclass(frozen=True)
class InsertGuards:
    """Put the refresh and the reuse of each group of regions into the branches of a conditional.

    groups: names of the regions that are refreshed together, for each independent decision; None: all regions together.

    Rules:
    1. One predicate input per group (bool scalar, True = refresh), a history input and output per cut value and slot.
    2. A single group becomes one conditional over two whole steps; its regions may be any sets of nodes. With
       `hoist`, what both steps compute alike, before they part and after they meet again, stands outside of it, once:
       for files. Not within torch.compile: Inductor passes a branch what it computed in a layout of its own choice, and
       the branch expects the recorded one.
    3. Several groups become one conditional per region, sharing their group's predicate; there each region must be
       convex: no path may leave it and come back.
    4. With `control` the graph measures the signal and decides by itself; a single group, as in rule 2.
    5. Without `hoist`, computed values that do not lie in the order of their axes, and images, enter a branch in one
       axis, the only layout that Inductor cannot change; both branches return their values in the order of their axes.
    6. History moves by one slot at a refresh (newest first) and stays at a reuse. Branches return nothing they were
       given: what passes through is cloned. Parameters are operands of the branches.

    Before:  a = block0(x); b = block1(a); return head(b)
    After:   (p, h): b, n = cond(p, [a = block0(x); b = block1(a); b, clone b], [h, clone h]); return head(b), n

    Refuses: a region that is not convex where several groups decide on their own.
    """

    groups: tuple[tuple[str, ...], ...] | None = None
    control: Control | None = None
    hoist: bool = False

    def __call__(self, program: StepProgram) -> StepProgram:
        groups = self.groups or (tuple(region.name for region in program.regions),)
        if self.control is not None:
            if len(groups) > 1:
                raise RegionError(
                    "an adaptive guard decides in the graph for all regions at once, and this schedule has "
                    f"{len(groups)} groups: use decide='host', or a schedule of one rule"
                )
            return guard_adaptive(program, self.control, self.hoist)
        if len(groups) == 1 and len(groups[0]) == len(program.regions):
            return guard_step(program, self.hoist)
        return guard_regions(program, {name: group_name(group) for group in groups for name in group}, self.hoist)


def group_name(group: Iterable[str]) -> str:
    """The name of a group's predicate: that of its first region."""
    return next(iter(group))
