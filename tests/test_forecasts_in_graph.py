"""Forecasts traced into a graph: the same row there as on the host, by the same arithmetic."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from diffcache_fx import arithmetic
from diffcache_fx.forecasts import (
    Forecast,
)

from .test_forecasts import EQUATIONS, UNEVEN, label, numbers


def traced(forecast: Forecast, count: int) -> GraphModule:
    """positions..., step, ratio -> the row, as make_fx sees it without knowing any value."""

    def row(*given: torch.Tensor) -> torch.Tensor:
        *positions, step, ratio = given
        weights = forecast.weights(positions, step, {"ratio": ratio})
        assert len(weights) == count
        return torch.stack([step * 0.0 + weight for weight in weights])

    with FakeTensorMode():
        return make_fx(row)(*[torch.empty(()) for _ in range(count + 2)])


@pytest.mark.parametrize("forecast", EQUATIONS, ids=label)
def test_the_same_row_inside_a_graph(forecast: Forecast) -> None:
    for count in range(1, forecast.slots + 1):
        graph = traced(forecast, count)
        assert not [node for node in graph.graph.nodes if node.op == "get_attr"]
        # One graph serves all: values far apart, close together, refined at one position.
        for positions in (
            UNEVEN[:count],
            [20.0 - 4 * i for i in range(count)],
            [9.0 - (i + 1) // 2 for i in range(count)],
        ):
            for steps, ratio in ((1.0, 0.3), (5.5, 1.3)):
                host = numbers(forecast.weights(positions, positions[0] + steps, {"ratio": ratio}))
                inside = graph(*map(torch.tensor, (*positions, positions[0] + steps, ratio)))
                size = max(1.0, *map(abs, host))
                np.testing.assert_allclose(inside.numpy(), np.array(host), rtol=2e-5, atol=2e-5 * size)


def everything(a: Any, b: Any, c: Any) -> list[Any]:
    """All of `arithmetic`; c is 0."""
    large = arithmetic.at_least(a, b)
    unknown = c / c if isinstance(c, torch.Tensor) else math.nan
    return [
        arithmetic.divide(a, b),
        arithmetic.divide(a, c),
        arithmetic.divide(c, c),
        arithmetic.minimum(a, 2.0),
        arithmetic.clip(a, 1.0, 1.5),
        arithmetic.where(large, a, b),
        arithmetic.where(large, 3.0, b),
        arithmetic.where(large, a, 4.0),
        arithmetic.where(large, 3.0, 4.0),
        arithmetic.where(arithmetic.at_least(1.5, a), a, unknown),
        arithmetic.where(arithmetic.at_least(1.5, a), 3.0, unknown),
        arithmetic.where(arithmetic.at_least(a, 1.5), unknown, 3.0),
        arithmetic.where(arithmetic.both(large, arithmetic.differs(a, b)), 1.0, 0.0),
        arithmetic.where(arithmetic.either(large, arithmetic.differs(b, c)), 1.0, 0.0),
    ]


@pytest.mark.parametrize(("a", "b"), [(1.25, 0.5), (-2.0, 3.0), (0.75, 0.75), (1.0, -4.0)])
def test_arithmetic_on_floats_and_on_tensors(a: float, b: float) -> None:
    host = everything(a, b, 0.0)
    divided = [a / b, 0.0, 0.0]
    held = [min(a, 2.0), min(max(a, 1.0), 1.5)]
    chosen = [(a, 3.0, a, 3.0), (b, b, 4.0, 4.0)][a < b]
    assert host == pytest.approx([*divided, *held, *chosen, a, 3.0, 3.0, float(a > b), 1.0])
    with FakeTensorMode():
        graph = make_fx(everything)(*[torch.empty(()) for _ in range(3)])
    assert not [node for node in graph.graph.nodes if node.op == "get_attr"]
    inside = graph(torch.tensor(a), torch.tensor(b), torch.tensor(0.0))
    assert [float(value) for value in inside] == pytest.approx(host)
    assert {value.dtype for value in inside} == {torch.float32}


@pytest.mark.parametrize("tensor", [0, 1, 2], ids=["none", "first", "second"])
def test_truths_of_both_kinds_mix(tensor: int) -> None:
    for a in (True, False):
        for b in (True, False):
            pair: list[Any] = [torch.tensor(v) if tensor == i else v for i, v in enumerate((a, b), 1)]
            assert bool(arithmetic.both(*pair)) is (a and b)
            assert bool(arithmetic.either(*pair)) is (a or b)
