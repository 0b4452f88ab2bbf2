"""Decompose: operators as the simpler ones they stand for, to the last bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffcache_fx.passes.decompose import Decompose
from diffcache_fx.passes.guard import InsertGuards
from diffcache_fx.passes.normalize import Normalize
from torch import fx, nn

from diffcache_fx import Trunk

from .conftest import captured, equal, run, sample, text

pytestmark = pytest.mark.usefixtures("one_thread")
X, T = torch.randn(2, 3, 4), torch.tensor(0.5)
aten = torch.ops.aten


def einsum(equation: str, tensors: Any, path: Any = None) -> torch.Tensor:
    return torch.einsum(equation, tensors)


EINSUM = Decompose({aten.einsum.default: einsum})


class Sums(nn.Module):
    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        turned = torch.einsum("abc->cab", x * t)
        return torch.einsum("abc,cad->bd", x, turned)


def test_before_and_after() -> None:
    program = Normalize()(captured(Sums(), X, T))
    before = text(program.graph)
    assert before.count("einsum(") == 2
    after = EINSUM(program)
    shown = text(after.graph)
    assert "einsum" not in shown
    assert "permute(" in shown
    assert "bmm(" in shown
    assert text(program.graph) == before
    assert text(EINSUM(after).graph) == shown
    assert equal(run(after, Sums(), [X, T]).outputs, [Sums()(X, T)])


def test_in_branches_too() -> None:
    base = sample("DiTTransformer2DModel").with_regions(Trunk(), "value")
    guarded = InsertGuards()(base)
    inner = [m for m in guarded.module.modules() if isinstance(m, fx.GraphModule)]
    assert any("einsum(" in text(m.graph) for m in inner)
    after = EINSUM(guarded)
    inner = [m for m in after.module.modules() if isinstance(m, fx.GraphModule)]
    assert not any("einsum(" in text(m.graph) for m in inner)


def test_a_rule_for_several_results_and_rules_within_rules() -> None:
    class Halves(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            a, b = torch.chunk(x, 2, dim=2)
            return torch.nn.functional.silu(a) * b

    program = Normalize()(captured(Halves(), X))
    calls = {node.target for node in program.graph.nodes if node.op == "call_function"}
    cut = next(target for target in calls if "split" in str(target) or "chunk" in str(target))
    table = {
        cut: lambda x, *_: [aten.slice.Tensor(x, 2, 0, 2), aten.slice.Tensor(x, 2, 2, 4)],
        aten.silu.default: lambda x: x * aten.sigmoid.default(x),
        aten.sigmoid.default: lambda x: 1 / (1 + torch.exp(-x)),
    }
    after = Decompose(table)(program)
    left = {node.target for node in after.graph.nodes if node.op == "call_function"}
    assert not left & set(table)
    assert aten.exp.default in left
    assert torch.allclose(run(after, Halves(), [X]).outputs[0], Halves()(X))


def test_a_program_without_any_stays_as_it_is() -> None:
    class Plain(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.relu(x)

    program = captured(Plain(), X)
    assert text(EINSUM(program).graph) == text(program.graph)


def test_a_rule_may_decline() -> None:
    program = Normalize()(captured(Sums(), X, T))
    after = Decompose({aten.mul.Tensor: lambda *_: NotImplemented})(program)
    assert text(after.graph) == text(program.graph)
