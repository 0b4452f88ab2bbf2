"""ExpandEinsum: einsums as permutations and products, to the last bit."""

from __future__ import annotations

import pytest
import torch
from diffcache_fx.passes.expand_einsum import ExpandEinsum
from diffcache_fx.passes.guard import InsertGuards
from diffcache_fx.passes.normalize import Normalize
from torch import fx, nn

from diffcache_fx import Trunk

from .conftest import captured, equal, run, sample, text

pytestmark = pytest.mark.usefixtures("one_thread")
X, T = torch.randn(2, 3, 4), torch.tensor(0.5)


class Sums(nn.Module):
    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        turned = torch.einsum("abc->cab", x * t)
        return torch.einsum("abc,cad->bd", x, turned)


def test_before_and_after() -> None:
    program = Normalize()(captured(Sums(), X, T))
    before = text(program.graph)
    assert before.count("einsum(") == 2
    after = ExpandEinsum()(program)
    shown = text(after.graph)
    assert "einsum" not in shown
    assert "permute(" in shown
    assert "bmm(" in shown
    assert text(program.graph) == before
    assert text(ExpandEinsum()(after).graph) == shown
    assert equal(run(after, Sums(), [X, T]).outputs, [Sums()(X, T)])


def test_in_branches_too() -> None:
    base = sample("DiTTransformer2DModel").with_regions(Trunk(), "value")
    guarded = InsertGuards()(base)
    inner = [m for m in guarded.module.modules() if isinstance(m, fx.GraphModule)]
    assert any("einsum(" in text(m.graph) for m in inner)
    after = ExpandEinsum()(guarded)
    inner = [m for m in after.module.modules() if isinstance(m, fx.GraphModule)]
    assert not any("einsum(" in text(m.graph) for m in inner)


def test_a_program_without_any_stays_as_it_is() -> None:
    class Plain(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x)

    program = captured(Plain(), X)
    assert text(ExpandEinsum()(program).graph) == text(program.graph)
