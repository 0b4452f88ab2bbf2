"""Specialize: straight-line code for a known set of reused regions."""

from __future__ import annotations

import pytest
import torch
from diffcache_fx.passes.specialize import Specialize
from torch import nn

from diffcache_fx import Modules, RegionError
from diffcache_fx.program import InputKind, OutputKind, StepProgram

from .conftest import captured, equal, history, run, storages, text, with_regions

pytestmark = pytest.mark.usefixtures("one_thread")
X, T = torch.randn(2, 8), torch.tensor(0.5)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.lin(x)


class Net(nn.Module):
    """head(b1(b0(x)) * t)"""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.b0, self.b1, self.head = Residual(), Residual(), nn.Linear(8, 3, bias=False)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.head(self.b1(self.b0(x)) * t)


NET = Net()


def program(storage: str = "value", slots: int = 1, *patterns: str) -> StepProgram:
    return with_regions(captured(NET, X, T), Modules(patterns or ("b1",)), storage=storage, slots=slots)


def test_refresh_returns_the_cut_beside_the_output() -> None:
    base = program()
    before = text(base.graph)
    refresh = Specialize(frozenset())(base)
    assert text(refresh.graph) == "\n".join(
        [
            "linear = linear(x, p_b0_lin_weight)",
            "add = add(x, linear)",
            "linear_1 = linear(add, p_b1_lin_weight)",
            "add_1 = add(add, linear_1)",
            "mul = mul(add_1, t)",
            "linear_2 = linear(mul, p_head_weight)",
            "return linear_2, add_1",
        ]
    )
    assert [(o.kind, o.target) for o in refresh.outputs] == [(OutputKind.USER, "0"), (OutputKind.STATE, "b1/0")]
    assert text(base.graph) == before
    assert refresh.reused == frozenset()


def test_reuse_of_a_value_needs_nothing_before_it() -> None:
    reuse = Specialize(frozenset({"b1"}))(program())
    assert text(reuse.graph) == "mul = mul(h_b1_0_0, t)\nlinear_2 = linear(mul, p_head_weight)\nreturn linear_2"
    kinds = {entry.kind: entry.target for entry in reuse.inputs if entry.kind is not InputKind.USER}
    assert kinds == {InputKind.PARAMETER: "head.weight", InputKind.HISTORY: "b1/0/0"}
    assert reuse.reused == {"b1"}


def test_reuse_of_a_residual_computes_what_it_is_over() -> None:
    base = program("residual")
    lines = text(Specialize(frozenset({"b1"}))(base).graph).splitlines()
    assert lines[:2] == ["linear = linear(x, p_b0_lin_weight)", "add = add(x, linear)"]
    assert lines[2].endswith("= add(add, h_b1_0_0)")
    refresh = text(Specialize(frozenset())(base).graph)
    assert "= sub(add_1, add)" in refresh
    assert "mul = mul(add_1, t)" in refresh  # the fresh value itself flows on, not base + (value - base)


def test_a_forecast_is_a_weighted_sum_of_the_history() -> None:
    base = program("value", 2)
    reuse = Specialize(frozenset({"b1"}))(base)
    rows = torch.tensor([[1.5, -0.5]])
    state = {"b1/0/0": torch.randn(2, 8), "b1/0/1": torch.randn(2, 8)}
    got = run(reuse, NET, [X, T], state, rows)
    mixed = 1.5 * state["b1/0/0"] - 0.5 * state["b1/0/1"]
    with torch.no_grad():
        assert torch.allclose(got.outputs[0], NET.head(mixed * T))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_are_summed_in_float32(dtype: torch.dtype) -> None:
    net = Net().to(dtype)
    x, t = X.to(dtype), T.to(dtype)
    base = with_regions(captured(net, x, t), Modules(("b1",)), storage="value", slots=2)
    reuse = Specialize(frozenset({"b1"}))(base)
    state = {f"b1/0/{slot}": torch.randn(2, 8).to(dtype) * 100 for slot in (0, 1)}
    got = run(reuse, net, [x, t], state, torch.tensor([[9.0, -8.0]]))
    mixed = (9.0 * state["b1/0/0"].float() - 8.0 * state["b1/0/1"].float()).to(dtype)
    with torch.no_grad():
        assert torch.equal(got.outputs[0], net.head(mixed * t))
    assert got.outputs[0].dtype == dtype


def test_some_of_several_regions() -> None:
    base = program("value", 1, "b0", "b1")
    full = run(Specialize(frozenset())(base), NET, [X, T])
    for reused in ({"b0"}, {"b1"}, {"b0", "b1"}):
        part = Specialize(frozenset(reused))(base)
        result = run(part, NET, [X, T], history(base, full.state))
        assert equal(result.outputs, full.outputs)
        assert set(result.state) == {f"{name}/0" for name in {"b0", "b1"} - reused}
        assert not storages(result.outputs) & storages(result.state.values())


class Handing(nn.Module):
    """Returns views: of a region's value, of its own output, and the region's value itself."""

    def __init__(self) -> None:
        super().__init__()
        self.b1 = Residual()

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = self.b1(x * t)
        return y, y[:, :4], y.t(), y + 1


@pytest.mark.parametrize("storage", ["value", "residual"])
def test_outputs_that_are_views_of_the_cache_are_copied(storage: str) -> None:
    net = Handing()
    base = with_regions(captured(net, X, T), Modules(("b1",)), storage=storage)
    full = run(Specialize(frozenset())(base), net, [X, T])
    state = history(base, full.state)
    copies = {key: value.clone() for key, value in state.items()}
    assert all(value.is_contiguous() for value in state.values())
    assert not storages(full.outputs) & storages(full.state.values())
    again = run(Specialize(frozenset({"b1"}))(base), net, [X, T], state)
    assert not storages(again.outputs) & storages(state.values())
    for value in (*full.outputs, *again.outputs):
        value.zero_()
    assert all(torch.equal(state[key], value) for key, value in copies.items())


def test_refusals() -> None:
    base = program()
    with pytest.raises(RegionError, match=r"no region is called 'b2'.*'b1'"):
        Specialize(frozenset({"b2"}))(base)
    for reused in (frozenset(), frozenset({"b1"})):
        with pytest.raises(RegionError, match="specialised already"):
            Specialize(frozenset())(Specialize(reused)(base))
