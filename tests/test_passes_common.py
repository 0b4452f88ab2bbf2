"""What both ways of a step have in common stands outside of the conditional, once, and computes the same."""

from __future__ import annotations

import pytest
import torch
from diffcache_fx.passes.common import common_parts
from diffcache_fx.passes.guard import InsertGuards
from diffcache_fx.passes.specialize import Specialize

from diffcache_fx import Trunk
from diffcache_fx.compile import run_passes
from diffcache_fx.program import OutputKind, StepProgram

from .conftest import equal, run, sample, text

pytestmark = pytest.mark.usefixtures("one_thread")
MODEL = "DiTTransformer2DModel"


def parts(storage: str = "residual") -> tuple[StepProgram, StepProgram, StepProgram]:
    base = sample(MODEL).with_regions(Trunk(first=1), storage)
    return base, *(run_passes(base, (Specialize(r),)) for r in (frozenset[str](), frozenset({base.regions[0].name})))


def test_the_first_block_and_the_head_are_common() -> None:
    base, refresh, reuse = parts()
    common = common_parts(base, refresh, reuse, 1)
    inside = base.regions[0].nodes
    assert common.before
    assert common.after
    assert not (common.before | common.after) & inside
    assert len(common.joints) == 1  # the trunk's output
    main = InsertGuards(hoist=True)(base)
    shown = text(main.graph)
    assert shown.count("cond(") == 1
    assert shown.count("linear(") == text(reuse.graph).count("linear(")
    reuse_arm = main.module.on_reuse
    assert "linear" not in text(reuse_arm.graph)


def test_what_only_feeds_the_trunk_stays_in_its_branch() -> None:
    """Stored as a value, the trunk leaves nothing of the first block to a reuse step."""
    base, refresh, reuse = parts("value")
    main = InsertGuards(hoist=True)(base)
    assert (
        text(main.graph).count("linear(") == text(reuse.graph).count("linear(") < text(refresh.graph).count("linear(")
    )


@pytest.mark.parametrize("storage", ["value", "residual"])
def test_both_ways_equal_their_programs(storage: str) -> None:
    found = sample(MODEL)
    base, refresh, reuse = parts(storage)
    main = InsertGuards(hoist=True)(base)
    users = found.users(1)
    name = base.regions[0].name
    fresh = run(refresh, found.module, users)
    held = {f"{name}/0/0": fresh.state[f"{name}/0"]}
    taken = run(main, found.module, users, held, None, {name: True})
    kept = run(main, found.module, found.users(2), held, None, {name: False})
    assert equal(taken.outputs, fresh.outputs)
    assert equal(kept.outputs, run(reuse, found.module, found.users(2), held).outputs)
    assert equal(list(kept.state.values()), list(held.values()))
    assert [output.kind for output in main.outputs] == [OutputKind.USER, OutputKind.STATE]
    assert not any(out.data_ptr() == old.data_ptr() for out in kept.outputs for old in held.values())


def test_layouts_that_differ_are_not_joined() -> None:
    """Where a branch's value is no plain tensor in memory order, the end stays in the branches."""
    base, refresh, reuse = parts()
    for node in refresh.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and node.name == base.regions[0].cut[0].node:
            node.meta["val"] = value.transpose(0, 1)
    assert common_parts(base, refresh, reuse, 1).after == frozenset()
