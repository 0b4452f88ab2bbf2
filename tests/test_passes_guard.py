"""InsertGuards: both ways of a step in one program."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffcache_fx.passes.guard import InsertGuards, group_name
from diffcache_fx.passes.specialize import Specialize
from diffcache_fx.passes.verify import Verify, walk
from torch import nn

from diffcache_fx import Listed, Modules, RegionError, compile_with_cache, schedules
from diffcache_fx.program import InputKind, OutputKind, StepProgram, returned

from .conftest import captured, equal, run, text, with_regions
from .test_passes_specialize import NET, Residual, T, X, program

pytestmark = pytest.mark.usefixtures("one_thread")


def predicates(guarded: StepProgram) -> list[str]:
    return [entry.target for entry in guarded.inputs if entry.kind is InputKind.PREDICATE]


def test_one_group_is_one_conditional_over_the_whole_step() -> None:
    base = program()
    before = text(base.graph)
    guarded = Verify()(InsertGuards()(base))
    assert text(base.graph) == before
    main = text(guarded.graph)
    assert main.count("cond(") == 1
    assert "linear" not in main.replace("p_", "")
    assert predicates(guarded) == [group_name(("b1",))] == ["b1"]
    arms = {
        str(node.target): getattr(guarded.module, str(node.target))
        for _, node in walk(guarded.module)
        if node.op == "get_attr"
    }
    refresh, reuse = (text(arm.graph) for arm in arms.values())
    assert refresh.count("linear(") == 3
    assert reuse.count("linear(") == 1
    assert "clone" in reuse  # the history passes through
    assert [(o.kind, o.target) for o in guarded.outputs] == [(OutputKind.USER, "0"), (OutputKind.STATE, "b1/0/0")]


@pytest.mark.parametrize("storage", ["value", "residual"])
@pytest.mark.parametrize("slots", [1, 3])
def test_both_branches_and_the_history(storage: str, slots: int) -> None:
    base = program(storage, slots)
    guarded = InsertGuards()(base)
    old = {f"b1/0/{slot}": torch.randn(2, 8) for slot in range(slots)}
    rows = torch.tensor([[0.5, 0.3, 0.2][:slots]]) if slots > 1 else None
    fresh = run(Specialize(frozenset())(base), NET, [X, T])
    taken = run(guarded, NET, [X, T], old, rows, {"b1": True})
    assert equal(taken.outputs, fresh.outputs)
    expected = [fresh.state["b1/0"], *(old[f"b1/0/{slot}"] for slot in range(slots - 1))]
    assert equal([taken.state[f"b1/0/{slot}"] for slot in range(slots)], expected)
    kept = run(guarded, NET, [X, T], old, rows, {"b1": False})
    assert equal(kept.outputs, run(Specialize(frozenset({"b1"}))(base), NET, [X, T], old, rows).outputs)
    assert equal(list(kept.state.values()), list(old.values()))


def test_groups_get_a_conditional_per_region_and_a_predicate_per_group() -> None:
    net = Chain()
    base = with_regions(captured(net, X, T), Modules(("blocks.*",)))
    groups = (("blocks.0", "blocks.2"), ("blocks.1",), ("blocks.3",))
    guarded = Verify()(InsertGuards(groups)(base))
    assert predicates(guarded) == ["blocks.0", "blocks.1", "blocks.3"]
    assert text(guarded.graph).count("cond(") == 4
    old = {f"blocks.{i}/0/0": torch.randn(2, 8) for i in range(4)}
    for bits in range(8):
        choice = {name: bool(bits >> i & 1) for i, name in enumerate(predicates(guarded))}
        reused = frozenset(name for group in groups for name in group if not choice[group[0]])
        expected = run(Specialize(reused)(base), net, [X, T], old)
        got = run(guarded, net, [X, T], old, None, choice)
        assert equal(got.outputs, expected.outputs)
        for key, value in got.state.items():
            name = key.partition("/")[0]
            assert torch.equal(value, old[key] if name in reused else expected.state[f"{name}/0"])


class Chain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Residual() for _ in range(4))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        x = x * t
        for block in self.blocks:
            x = block(x)
        return x


class Turned(nn.Module):
    """What enters its first block was computed transposed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Residual() for _ in range(2))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        y = (x * t).t() + 1.0
        for block in self.blocks:
            y = block(y)
        return y


@pytest.mark.parametrize("storage", ["value", "residual"])
def test_what_lies_transposed_enters_a_branch_in_one_axis(storage: str) -> None:
    net, x = Turned(), torch.randn(8, 8)
    base = with_regions(captured(net, x, T), Modules(("blocks.*",)), storage=storage)
    groups = (("blocks.0",), ("blocks.1",))
    assert "[-1]" not in text(InsertGuards(groups, hoist=True)(base).graph)  # files know no layouts
    guarded = Verify()(InsertGuards(groups)(base))
    assert text(guarded.graph).count("[-1]") >= 1
    for number in range(2):
        arms = [getattr(guarded.module, f"on_{way}_{number}") for way in ("refresh", "reuse")]
        strides = [[node.meta["val"].stride() for node in returned(arm.graph)] for arm in arms]
        assert strides[0] == strides[1]
    old = {f"blocks.{i}/0/0": torch.randn(8, 8) for i in range(2)}
    for choice in ((True, True), (True, False), (False, True), (False, False)):
        wanted = dict(zip(("blocks.0", "blocks.1"), choice, strict=True))
        expected = run(Specialize(frozenset(n for n, r in wanted.items() if not r))(base), net, [x, T], old)
        assert equal(run(guarded, net, [x, T], old, None, wanted).outputs, expected.outputs)


def test_inductor_keeps_to_the_layouts_of_branches() -> None:
    """It chooses that of what it computes itself, and a branch is compiled for the one that was recorded."""
    net, x = Turned().eval(), torch.randn(8, 4)

    def whole(module: nn.Module, examples: object) -> object:
        return torch.compile(module, fullgraph=True, backend="inductor")

    bits = ((1, 1), (0, 1), (1, 0), (0, 0))
    schedule = schedules.mask(bits, regions=Modules(("blocks.*",)))
    outputs = []
    for backend in ("eager", whole):
        cached = compile_with_cache(net, schedule, backend=backend, decide="graph", num_steps=4)
        with torch.no_grad():
            outputs.append([cached(x + 0.1 * step, torch.tensor(1.0 - 0.2 * step)) for step in range(4)])
    for one, other in zip(*outputs, strict=True):
        torch.testing.assert_close(one, other)


def test_a_region_with_a_gap_needs_one_decision_for_all() -> None:
    raw = captured(Chain(), X, T)
    gap = Listed((("blocks.0", "blocks.2"),), fill=False)
    base = with_regions(raw, gap, Modules(("blocks.1",)))
    names = [region.name for region in base.regions]
    with pytest.raises(RegionError) as error:
        InsertGuards(tuple((name,) for name in names))(base)
    assert "blocks.0+blocks.2" in str(error.value)
    assert "decide='host'" in str(error.value)
    assert Verify()(InsertGuards((tuple(names),))(base)) is not None
    assert predicates(InsertGuards()(base)) == ["blocks.0+blocks.2"]


class Twice(nn.Module):
    """Hands out the same value twice, its view, and its input."""

    def __init__(self) -> None:
        super().__init__()
        self.b1 = Residual()

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = self.b1(x * t)
        return y, y, y.view(4, 4), x


@pytest.mark.parametrize("apart", [False, True])
def test_outputs_that_share_memory(apart: bool) -> None:
    net = Twice()
    base = with_regions(captured(net, X, T), Modules(("b1",)))
    guarded = Verify()(InsertGuards((("b1",),) if apart else None)(base))
    old = {"b1/0/0": torch.randn(2, 8)}
    for choice, reused in ((True, frozenset()), (False, frozenset({"b1"}))):
        expected = run(Specialize(reused)(base), net, [X, T], old)
        got = run(guarded, net, [X, T], old, None, {"b1": choice})
        assert equal(got.outputs, expected.outputs)


class Images(nn.Module):
    """Convolutions, each added to what enters it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Convolution() for _ in range(3))

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        sample = sample * (1 + timestep)
        for block in self.blocks:
            sample = block(sample)
        return sample


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.inner(x))


@pytest.mark.parametrize("dynamic", [False, "batch"])
def test_images_in_any_batch(dynamic: Any) -> None:
    """Sizes that vary are not read inside a branch."""
    model, plan = Images().eval(), [[1] * 3, [0, 1, 0], [0, 0, 1]]
    schedule = schedules.block_cache(plan)
    for batch in (2, 3) if dynamic else (2,):
        host, graph = (
            compile_with_cache(model, schedule, backend="eager", decide=decide, dynamic=dynamic, max_programs=None)
            for decide in ("host", "graph")
        )
        for step in range(3):
            call = torch.randn(batch, 4, 8, 8) + step, torch.tensor(1.0 - 0.1 * step)
            torch.testing.assert_close(graph(*call), host(*call))
