"""Normalize, and the purity rule it deletes by."""

from __future__ import annotations

import pytest
import torch
from diffcache_fx.passes.normalize import Normalize
from diffcache_fx.passes.purity import draws_random, eliminate_dead, is_assert, is_impure, mutates
from torch import nn
from torch.nn import functional as F

from .conftest import captured, equal, run, text

pytestmark = pytest.mark.usefixtures("one_thread")


class NoOps(nn.Module):
    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        a = torch.squeeze(x, 1)
        c = a.detach().view(2, 3, 4).expand(2, 3, 4)[:, :]
        return torch.relu(c) + c.permute(0, 1, 2) * t.to(torch.float32)


class Kept(nn.Module):
    """Everything here changes something."""

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        a = x.squeeze(0).view(4, 3).expand(4, 3)[:, 1:]
        return a.permute(1, 0) + t.to(torch.float64)


X, T = torch.randn(2, 3, 4), torch.tensor(0.5)


def test_before_and_after() -> None:
    program = captured(NoOps(), X, T)
    before = text(program.graph)
    assert all(name in before for name in ("squeeze", "view", "expand", "permute"))
    after = Normalize()(program)
    assert text(after.graph) == "relu = relu(x)\nmul = mul(x, t)\nadd = add(relu, mul)\nreturn add"
    assert text(program.graph) == before  # the input is untouched
    assert equal(run(after, NoOps(), [X, T]).outputs, [NoOps().eval()(X, T)])


def test_idempotent() -> None:
    once = Normalize()(captured(NoOps(), X, T))
    assert text(Normalize()(once).graph) == text(once.graph)


def test_what_computes_something_stays() -> None:
    x = torch.randn(1, 3, 4)
    program = captured(Kept(), x, T)
    after = Normalize()(program)
    for name in ("squeeze", "view", "slice", "permute"):
        assert name in text(after.graph), name
    assert equal(run(after, Kept(), [x, T]).outputs, [Kept()(x, T)])


class Copies(nn.Module):
    """Dropout in evaluation mode, as export writes it, and what blocks do with a factor of 1."""

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        a = F.dropout(torch.relu(x), 0.1, self.training) / 1.0
        return a.to(torch.float32, copy=True) * 1.0 + t


class KeptCopies(nn.Module):
    """A copy of an input, one in another layout, one in another dtype; whole numbers become fractions."""

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, ...]:
        wide = torch.relu(x).transpose(0, 1)
        return x.clone(), wide.clone(memory_format=torch.contiguous_format), wide.to(torch.float64), (wide > 0) / 1


def test_copies_that_change_nothing_go() -> None:
    program = captured(Copies(), X, T)
    assert "clone" in text(program.graph)
    after = Normalize()(program)
    assert text(after.graph) == "relu = relu(x)\nadd = add(relu, t)\nreturn add"
    assert equal(run(after, Copies(), [X, T]).outputs, [Copies().eval()(X, T)])


def test_copies_that_change_something_stay() -> None:
    after = Normalize()(captured(KeptCopies(), X, T))
    shown = text(after.graph)
    assert shown.count("clone(") == 2
    assert "_to_copy" in shown
    assert "div" in shown
    assert equal(run(after, KeptCopies(), [X, T]).outputs, list(KeptCopies()(X, T)))


def test_no_copy_goes_where_something_writes() -> None:
    program = captured(Copies(), X, T)
    graph = program.copy().module.graph
    relu = next(node for node in graph.nodes if "relu" in node.name)
    copied = next(node for node in graph.nodes if "clone" in node.name)
    with graph.inserting_after(copied):
        graph.call_function(torch.ops.aten.add_.Tensor, (relu, 1.0))
    after = Normalize()(program.replace(module=torch.fx.GraphModule(program.module, graph)))
    assert "clone" in text(after.graph)


def test_asserts_go() -> None:
    program = captured(NoOps(), X, T)
    graph = program.copy().module.graph
    placeholder = next(node for node in graph.nodes if node.op == "placeholder")
    with graph.inserting_after(placeholder):
        node = graph.call_function(torch.ops.aten._assert_tensor_metadata.default, (placeholder, None, None))
    assert is_assert(node)
    assert not is_impure(node)
    after = Normalize()(program.replace(module=torch.fx.GraphModule(program.module, graph)))
    assert "assert" not in text(after.graph)


def graph_of(module: nn.Module, *args: torch.Tensor) -> dict[str, torch.fx.Node]:
    exported = torch.export.export(module, args, strict=False)
    return {node.name: node for node in exported.graph.nodes}


def test_attention_and_dropout_are_pure_unless_they_draw() -> None:
    class Draws(nn.Module):
        def __init__(self, rate: float, training: bool) -> None:
            super().__init__()
            self.rate, self.on = rate, training

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = F.scaled_dot_product_attention(x, x, x, dropout_p=self.rate)
            return F.dropout(y, 0.5, self.on) + torch.rand_like(x) * 0

    x = torch.randn(1, 2, 3, 4)
    for rate, training in ((0.0, False), (0.1, True)):
        nodes = graph_of(Draws(rate, training), x)
        attention, dropout = nodes["scaled_dot_product_attention"], nodes["dropout"]
        assert draws_random(attention) == is_impure(attention) == (rate > 0)
        assert draws_random(dropout) == is_impure(dropout) == training
        assert draws_random(nodes["rand_like"])


def test_writing_is_impure() -> None:
    class Writes(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = x * 2
            y.add_(1)
            return x + 1

    nodes = graph_of(Writes(), torch.randn(3))
    assert mutates(nodes["add_"])
    assert not mutates(nodes["mul"])
    graph = nodes["mul"].graph
    eliminate_dead(graph)
    assert "add_" in {node.name for node in graph.nodes}


def test_dead_nodes_go_and_inputs_stay() -> None:
    class Dead(nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            unused = F.scaled_dot_product_attention(x, x, x)
            unused = F.dropout(unused, 0.5, False) + t
            return x + 1

    x = torch.randn(1, 2, 3, 4)
    nodes = graph_of(Dead(), x, T)
    graph = nodes["x"].graph
    eliminate_dead(graph)
    assert [node.op for node in graph.nodes] == ["placeholder", "placeholder", "call_function", "output"]
