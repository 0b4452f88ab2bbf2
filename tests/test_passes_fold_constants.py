"""FoldConstants: what depends on no input is computed once."""

from __future__ import annotations

import pytest
import torch
from diffcache_fx.passes.conditional import branch, choose
from diffcache_fx.passes.emit import call, fake_mode_of, set_outputs
from diffcache_fx.passes.fold_constants import FoldConstants
from diffcache_fx.passes.normalize import Normalize
from torch import fx, nn

from diffcache_fx.parameters import Parameters
from diffcache_fx.program import InputKind, StepProgram, output_node

from .conftest import captured, equal, run, text

pytestmark = pytest.mark.usefixtures("one_thread")
X = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))


class Frequencies(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cos(x * torch.exp(torch.arange(8) * -1.1).unsqueeze(0))


class Two(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        waves = torch.sin(torch.arange(8) * 0.3)
        return x * waves + torch.cos(waves + 1.0)


class Rotated(nn.Module):
    """By the orthogonal part of a weight; the transposed weight itself is a view."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, generator=torch.Generator().manual_seed(1)))
        self.plain = nn.Parameter(torch.randn(8, 8, generator=torch.Generator().manual_seed(2)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        orthogonal, _ = torch.linalg.qr(self.weight)
        return x @ orthogonal @ self.plain.t().double().float()


class Kept(nn.Module):
    """Whole numbers, fills, what is repeated, and what is large."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        order = torch.arange(7, -1, -1) * 1
        table = torch.ones(8) * x
        large = torch.sin(torch.arange(1 << 19)).reshape(-1, 8)
        return x[:, order] + table + torch.zeros(2, 8) + large.sum(0)


def folded(program: StepProgram, model: nn.Module | None = None) -> StepProgram:
    return FoldConstants(None if model is None else Parameters(model))(program)


def test_before_and_after() -> None:
    program = Normalize()(captured(Frequencies(), X))
    before = text(program.graph)
    after = folded(program)
    assert "exp(" in before
    shown = text(after.graph)
    assert "exp(" not in shown
    assert "arange(" not in shown
    assert "cos(" in shown
    assert text(program.graph) == before
    assert folded(after) is after
    (constant,) = after.constants.values()
    assert torch.equal(constant.flatten(), torch.exp(torch.arange(8) * -1.1))
    assert equal(run(after, Frequencies(), [X]).outputs, [Frequencies()(X)])


def test_each_constant_has_a_name_of_its_own() -> None:
    after = folded(Normalize()(captured(Two(), X)))
    assert len(after.constants) == 2
    assert equal(run(after, Two(), [X]).outputs, [Two()(X)])


def test_functions_of_weights_are_folded_where_weights_are_held() -> None:
    model = Rotated()
    program = Normalize()(captured(model, X))
    assert folded(program) is program
    after = folded(program, model)
    shown = text(after.graph)
    assert "qr(" not in shown
    assert [entry.target for entry in after.inputs_of(InputKind.PARAMETER) for entry in entry[1:]] == ["plain"]
    assert equal(run(after, model, [X]).outputs, [model(X)])


def test_what_a_runtime_makes_as_well_stays() -> None:
    program = Normalize()(captured(Kept(), X))
    assert folded(program, Kept()) is program


def test_both_ways_of_a_conditional() -> None:
    model = Rotated()
    program = with_conditional(Normalize()(captured(model, X)))
    before = [text(way.graph) for way in ways(program)]
    assert sum("qr(" in shown for shown in before) == 1
    after = folded(program, model)
    shown = [text(way.graph) for way in ways(after)]
    assert not any("qr(" in way for way in shown)
    assert [text(way.graph) for way in ways(program)] == before
    for positive in (X.abs(), -X.abs()):
        assert equal(run(after, model, [positive]).outputs, run(program, model, [positive]).outputs)
    assert folded(after, model) is after


def ways(program: StepProgram) -> list[fx.GraphModule]:
    return [child for child in program.module.children() if isinstance(child, fx.GraphModule)]


def with_conditional(program: StepProgram) -> StepProgram:
    """The whole program in one way of a conditional, and its input doubled in the other."""
    result = program.copy()
    graph = result.graph
    operands = graph.find_nodes(op="placeholder")
    (value,) = output_node(graph).args[0]
    inner = [node for node in graph.nodes if node.op == "call_function"]

    def whole(into: fx.Graph, memo: dict[fx.Node, fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
        for node in inner:
            memo[node] = into.node_copy(node, memo.__getitem__)
        return [memo[value]], []

    def doubled(into: fx.Graph, memo: dict[fx.Node, fx.Node]) -> tuple[list[fx.Node], list[fx.Node]]:
        with fake_mode_of(into):
            return [call(into, torch.ops.aten.mul.Tensor, memo[operands[-1]], 2.0)], []

    arms = branch(operands, whole, result.module), branch(operands, doubled, result.module)
    with graph.inserting_before(output_node(graph)), fake_mode_of(graph):
        total = call(graph, torch.ops.aten.sum.default, operands[-1])
        positive = call(graph, torch.ops.aten.gt.Scalar, total, 0)
        chosen = choose(result.module, positive, *arms, operands)
    set_outputs(graph, chosen)
    for node in reversed(inner):
        graph.erase_node(node)
    result.module.recompile()
    return result
