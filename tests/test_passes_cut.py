"""ComputeCut: what a reuse step needs of a region, in as few bytes as changes nothing."""

from __future__ import annotations

import pytest
import torch
from diffcache_fx.passes.cut import ComputeCut, RuleStorage
from diffcache_fx.passes.normalize import Normalize
from diffcache_fx.passes.regions import SelectRegions
from torch import nn

from diffcache_fx import Modules, RegionError
from diffcache_fx.program import CutValue, Region, StepProgram

from .conftest import captured, text

pytestmark = pytest.mark.usefixtures("one_thread")
X, T = torch.randn(2, 6, 8), torch.tensor(0.5)


class Mid(nn.Module):
    def __init__(self, residual: bool = True, whole: bool = False) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 8)
        self.residual, self.whole = residual, whole

    def forward(self, x: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        y = torch.tanh(self.lin(x))
        y = x + y if self.residual else y
        return (y, x.argmax(-1)) if self.whole else y


class Net(nn.Module):
    def __init__(self, tail: str, residual: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.mid = Mid(residual, whole=tail == "mask")
        self.last = nn.Linear(8, 2)
        self.tail = tail

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        h = self.first(x) * t
        y = self.mid(h)
        if self.tail == "slice":
            return self.last(y[:, 4:]) * t
        if self.tail == "narrow":
            return self.last(y).sum(dim=1) * t
        if self.tail == "fresh":
            return self.last(y * t)[:, :2]
        if self.tail == "mask":
            y, best = y
            return self.last(torch.where(best[..., None] > 3, y, -y)) * t
        return self.last(y) * t


def cut(tail: str, storage: str = "value", slots: int = 1, residual: bool = True) -> tuple[Region, StepProgram]:
    program = Normalize()(captured(Net(tail, residual), X, T))
    chosen = SelectRegions((Modules(("mid",)),))(program)
    before = text(chosen.graph), chosen.regions
    result = ComputeCut((RuleStorage(storage, slots),))(chosen)
    assert (text(chosen.graph), chosen.regions) == before
    assert text(result.graph) == before[0]  # the graph is the same, only the regions know more
    return result.regions[0], result


def shapes(region: Region) -> list[tuple[int, ...]]:
    return [tuple(int(size) for size in value.shape) for value in region.cut]


def test_the_boundary_by_default() -> None:
    region, program = cut("fresh")  # the next node reads a fresh value: nothing may move
    assert shapes(region) == [(2, 6, 8)]
    assert region.nbytes == 2 * 6 * 8 * 4
    assert program.named_nodes()[region.cut[0].node].target == torch.ops.aten.add.Tensor
    assert region.cut[0].base is None


def test_it_moves_across_moves_of_data() -> None:
    for slots in (1, 2):
        region, program = cut("slice", slots=slots)
        # hold may move it further, over the last linear
        assert shapes(region) == ([(2, 2, 2)] if slots == 1 else [(2, 2, 8)])
        assert any("slice" in name for name in program.regions[0].nodes)  # a reuse step does not run it either


def test_it_moves_across_computation_only_when_held_as_a_value() -> None:
    assert shapes(cut("narrow")[0]) == [(2, 2)]
    assert shapes(cut("narrow", slots=2)[0]) == [(2, 6, 8)]
    assert shapes(cut("narrow", storage="residual")[0]) == [(2, 6, 8)]


def test_the_residual_is_over_what_was_added_onto() -> None:
    region, program = cut("plain", storage="auto")
    (value,) = region.cut
    assert value.base is not None
    assert program.named_nodes()[value.base].target == torch.ops.aten.mul.Tensor
    assert cut("plain", storage="auto", residual=False)[0].cut[0].base is None
    forced = cut("plain", storage="residual", residual=False)[0].cut[0]
    assert forced.base == value.base  # on demand: any value of the shape that enters


def test_values_that_are_no_floats_are_kept_as_they_are() -> None:
    region, _ = cut("mask", storage="auto", slots=3)
    kept = {value.dtype: value for value in region.cut}
    assert kept[torch.float32].slots == 3
    assert kept[torch.float32].base is not None
    assert kept[torch.int64].slots == 1
    assert kept[torch.int64].base is None


def test_bytes_count_what_is_stored() -> None:
    value = CutValue("n", (2, 3), torch.bfloat16, torch.device("cpu"), slots=2)
    assert value.nbytes == 12
    assert Region("r", frozenset("n"), (value, value)).nbytes == 48


class Widening(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mid = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.mid(x) * t


def test_refusals() -> None:
    program = SelectRegions((Modules(("mid",)),))(captured(Widening(), X, T))
    with pytest.raises(RegionError, match=r"cannot be stored as a residual.*storage='value'"):
        ComputeCut((RuleStorage("residual"),))(program)
    dead = program.replace(regions=(Region("nothing", frozenset()),))
    with pytest.raises(RegionError, match="nothing outside region"):
        ComputeCut((RuleStorage(),))(dead)


def test_idempotent() -> None:
    region, program = cut("slice")
    again = ComputeCut((RuleStorage("value"),))(program)
    assert again.regions == (region,)
