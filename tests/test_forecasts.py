"""Forecasts: each row of weights against the equation of its paper, on the host and traced into a graph."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.polynomial import hermite

from diffcache_fx import arithmetic
from diffcache_fx.errors import ScheduleError
from diffcache_fx.forecasts import (
    FORECASTS,
    Barycentric,
    Binomial,
    Damped,
    Extrapolate,
    FoCa,
    Forecast,
    Hermite,
    Hold,
    Lagrange,
    Linear,
    Newton,
    ProbeRatio,
    Rows,
    Taylor,
)
from diffcache_fx.rows import unit

# One of each kind or more; Rows aside, which is a table and not an equation.
EQUATIONS: tuple[Forecast, ...] = (
    Hold(),
    Linear(),
    *(Taylor(order) for order in (1, 2, 3, 4)),
    *(Newton(order) for order in (1, 2, 3, 4)),
    *(Lagrange(nodes) for nodes in (1, 2, 3, 5)),
    Hermite(),
    Hermite(order=4, sigma=0.3),
    Damped(),
    Damped(order=3, factor=0.7),
    FoCa(),
    FoCa(horizon=1e6),
    *(Binomial(order) for order in (1, 2, 3, 5)),
    *(Barycentric(history) for history in (1, 2, 3, 4, 8)),
    Extrapolate(),
    Extrapolate(1.2),
    ProbeRatio(),
)
TABLE = Rows(((1.0,), (1.0,), (1.5, -0.5), (2.0, -1.5, 0.5)))
RATIO = {"ratio": 1.2}
UNEVEN = (11.0, 10.0, 7.0, 5.0, 4.0, 1.0, 0.5, 0.0)

# Positions on a grid of quarters: exact in binary, distinct or not at will.
quarters = st.integers(0, 60).map(lambda n: n / 4)
ahead = st.integers(1, 24).map(lambda n: n / 4)


def apart(least: int, most: int) -> st.SearchStrategy[tuple[float, ...]]:
    """Distinct positions, newest first."""
    found = st.lists(quarters, min_size=least, max_size=most, unique=True)
    return found.map(lambda p: tuple(sorted(p, reverse=True)))


def numbers(weights: Sequence[arithmetic.Number]) -> list[float]:
    return [float(w) for w in weights]


def weigh(weights: Sequence[arithmetic.Number], values: Any) -> Any:
    return sum(w * v for w, v in zip(numbers(weights), values, strict=True))


def label(forecast: Any) -> str:
    return repr(forecast)


def brief(**options: Any) -> settings:
    return settings(max_examples=60, deadline=None, derandomize=True, database=None, **options)


def test_every_kind_is_listed_once() -> None:
    assert {type(forecast) for forecast in (*EQUATIONS, TABLE)} == set(FORECASTS)
    kinds = [kind.kind for kind in FORECASTS]  # type: ignore[attr-defined]
    assert len(set(kinds)) == len(kinds) == 13
    assert [kind for kind in FORECASTS if kind.wants] == [ProbeRatio]  # type: ignore[attr-defined]
    assert [kind for kind in FORECASTS if not kind.in_graph] == [Rows]  # type: ignore[attr-defined]


# ---- what holds for all of them


@pytest.mark.parametrize("forecast", EQUATIONS, ids=label)
@brief()
@given(positions=st.lists(quarters, min_size=1, max_size=8), steps=ahead)
def test_weights_are_finite_and_sum_to_one_wherever_the_values_lie(
    forecast: Forecast, positions: list[float], steps: float
) -> None:
    positions.sort(reverse=True)
    weights = numbers(forecast.weights(positions, positions[0] + steps, RATIO))
    assert len(weights) == len(positions)
    assert all(math.isfinite(w) for w in weights)
    assert sum(weights) == pytest.approx(1.0, abs=1e-9 * max(abs(w) for w in weights))
    assert not any(weights[forecast.slots :])


@pytest.mark.parametrize("forecast", [*EQUATIONS, TABLE], ids=label)
def test_one_value_is_held(forecast: Forecast) -> None:
    assert forecast.weights([2.0], 3.0) == (1.0,)


@pytest.mark.parametrize(
    ("forecast", "lower"),
    [
        *((Taylor(4), Taylor(order)) for order in (1, 2, 3)),
        *((Newton(4), Newton(order)) for order in (1, 2, 3)),
        *((Lagrange(5), Lagrange(nodes)) for nodes in (2, 3, 4)),
        *((Hermite(4), Hermite(order)) for order in (1, 2, 3)),
        *((Damped(4), Damped(order)) for order in (1, 2, 3)),
        *((Binomial(5), Binomial(order)) for order in (2, 3, 4)),
        *((Barycentric(8), Barycentric(history)) for history in (2, 3, 5)),
        (FoCa(), Linear()),
    ],
    ids=label,
)
def test_a_short_history_gives_the_lower_order(forecast: Forecast, lower: Forecast) -> None:
    positions = UNEVEN[: lower.slots]
    assert forecast.weights(positions, 13.0) == pytest.approx(lower.weights(positions, 13.0))
    assert len(set(lower.weights(positions, 13.0))) > 1  # not merely held


@pytest.mark.parametrize("make", [lambda n: Newton(n - 1), Lagrange, Barycentric], ids=["newton", "lagrange", "bary"])
@brief()
@given(positions=apart(2, 4), index=st.integers(0, 3), steps=ahead)
def test_a_value_refined_at_its_position_takes_the_place_of_the_older_one(
    make: Callable[[int], Forecast], positions: tuple[float, ...], index: int, steps: float
) -> None:
    index %= len(positions)
    twice = (*positions[: index + 1], *positions[index:])
    step = positions[0] + steps
    expected = list(make(len(positions)).weights(positions, step))
    expected.insert(index + 1, 0.0)
    assert make(len(twice)).weights(twice, step) == pytest.approx(expected)


def test_differences_over_no_interval_count_as_zero() -> None:
    for forecast in (Linear(), Newton(1), Lagrange(2), Taylor(1), Taylor(3), Hermite(), FoCa(), Barycentric(2)):
        assert forecast.weights([4.0, 4.0], 6.0) == (1.0, 0.0)
    assert Taylor(2).weights([4.0, 4.0, 2.0], 6.0) == (1.0, 0.0, 0.0)  # every level is divided by the last interval
    # d_2 = (d_1 - 0) / 2, since the step before had no interval
    assert Taylor(2).weights([6.0, 4.0, 4.0], 8.0) == (1 + 1 + 0.5, -1 - 0.5, 0.0)
    assert FoCa().weights([6.0, 4.0, 4.0], 8.0) == pytest.approx((2.0, -1.0, 0.0))
    assert FoCa().weights([4.0, 4.0, 2.0], 6.0) == pytest.approx((2.0, 0.0, -1.0))


# ---- polynomials


@brief()
@given(
    order=st.integers(1, 4),
    positions=apart(5, 5),
    steps=ahead,
    coefficients=st.lists(st.integers(-3, 3), min_size=5, max_size=5),
)
def test_newton_and_lagrange_continue_polynomials(
    order: int, positions: tuple[float, ...], steps: float, coefficients: list[int]
) -> None:
    positions, step = positions[: order + 1], positions[0] + steps
    polynomial = np.polynomial.Polynomial(coefficients[: order + 1])
    newton, lagrange = Newton(order).weights(positions, step), Lagrange(order + 1).weights(positions, step)
    size = sum(abs(w) for w in numbers(lagrange)) * sum(abs(c) for c in coefficients) * max(step, 1.0) ** order + 1
    assert newton == pytest.approx(lagrange, rel=1e-9, abs=1e-9 * size)
    for weights in (newton, lagrange):
        assert weigh(weights, polynomial(np.array(positions))) == pytest.approx(polynomial(step), abs=1e-9 * size)


@brief()
@given(positions=apart(2, 2), steps=ahead)
def test_all_first_orders_are_the_straight_line(positions: tuple[float, ...], steps: float) -> None:
    step = positions[0] + steps
    expected = pytest.approx(Linear().weights(positions, step))
    for forecast in (Taylor(1), Newton(1), Lagrange(2), Barycentric(2), Hermite(1, math.sqrt(0.5)), Damped(1, 1.0)):
        assert forecast.weights(positions, step) == expected
    assert FoCa(horizon=1e6).weights(positions, step) == expected


# ---- TaylorSeer and its relatives


class Seer:
    """The recursion of the published code, on data: `basis` gives the factors of d_0, d_1, ..."""

    def __init__(self, order: int, basis: Callable[[float, int], float]) -> None:
        self.order, self.basis = order, basis
        self.d: list[np.ndarray] = []
        self.last = 0

    def full(self, step: int, value: np.ndarray) -> None:
        fresh = [value]
        for i in range(self.order):
            if i >= len(self.d):
                break
            fresh.append((fresh[i] - self.d[i]) / (step - self.last))
        self.d, self.last = fresh, step

    def skipped(self, step: int) -> np.ndarray:
        x = float(step - self.last)
        return sum((self.basis(x, i) * d / math.factorial(i) for i, d in enumerate(self.d)), np.zeros(6))


def scaled_hermite(x: float, i: int) -> float:
    return float(0.4**i * hermite.hermval(0.4 * x, unit(i, i + 1)))


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("full", [(0, 4, 8, 12, 16, 20), (0, 1, 2, 5, 9, 11, 18, 19)], ids=["even", "uneven"])
@pytest.mark.parametrize(
    ("make", "basis"),
    [
        (Taylor, lambda x, i: x**i),
        (lambda order: Hermite(order, 0.4), scaled_hermite),
        (lambda order: Damped(order, 0.7), lambda x, i: 0.7**i * x**i),
    ],
    ids=["taylor", "hermite", "damped"],
)
def test_the_published_recursion_step_by_step(
    make: Callable[[int], Forecast], basis: Callable[[float, int], float], full: tuple[int, ...], order: int
) -> None:
    generator = np.random.default_rng(order)
    seer, forecast = Seer(order, basis), make(order)
    history: list[tuple[float, np.ndarray]] = []
    compared = 0
    for step in range(24):
        if step in full:
            value = generator.normal(size=6)
            seer.full(step, value)
            history = [(float(step), value), *history][: forecast.slots]
            continue
        weights = forecast.weights([position for position, _ in history], float(step))
        assert weigh(weights, [value for _, value in history]) == pytest.approx(seer.skipped(step), rel=1e-9, abs=1e-9)
        compared += 1
    assert compared == 24 - len(full)


def test_taylor_as_diffusers_has_it() -> None:
    module = pytest.importorskip("diffusers.hooks.taylorseer_cache")
    state = module.TaylorSeerState(taylor_factors_dtype=torch.float64, max_order=2)
    history: list[tuple[float, torch.Tensor]] = []
    generator = torch.Generator().manual_seed(0)
    for step in range(14):
        state.current_step = step
        if step in (0, 1, 4, 9):
            value = torch.randn(5, generator=generator, dtype=torch.float64)
            state.update((value,))
            history = [(float(step), value), *history][:3]
        else:
            weights = Taylor(2).weights([position for position, _ in history], float(step))
            torch.testing.assert_close(weigh(weights, [value for _, value in history]), state.predict()[0])


def test_taylor_of_order_two_is_not_the_parabola() -> None:
    """x^2 where Newton's form has x (x + N): it misses x N / 2 times the second derivative."""
    r = 3 / 4
    weights = Taylor(2).weights([8.0, 4.0, 0.0], 11.0)
    assert weights == pytest.approx((1 + r + r**2 / 2, -r - r**2, r**2 / 2))
    square = [position**2 for position in (8.0, 4.0, 0.0)]
    assert weigh(Newton(2).weights([8.0, 4.0, 0.0], 11.0), square) == pytest.approx(121.0)
    assert weigh(weights, square) == pytest.approx(121.0 - 3 * 4 / 2 * 2)


def test_hermite_shrinks_the_slope_by_twice_sigma_squared() -> None:
    positions, step = [8.0, 4.0], 11.0
    slope = Linear().weights(positions, step)[1]
    for sigma in (0.5, 0.3, math.sqrt(0.5), 1.0):
        assert Hermite(1, sigma).weights(positions, step)[1] == pytest.approx(2 * sigma**2 * slope)
    assert Hermite(1).weights(positions, step)[1] == pytest.approx(slope / 2)
    assert Hermite(1).weights(positions, step) == pytest.approx(Damped(1).weights(positions, step))
    # H~_2 / 2 = x^2 / 8 - 1 / 4 for sigma 1/2: the second difference acts even at no distance
    assert Hermite(2).weights([8.0, 4.0, 0.0], 8.0) == pytest.approx((1 - 1 / 64, 2 / 64, -1 / 64))


# ---- FoCa


def test_foca_collapses_to_the_published_row() -> None:
    for n in (1.0, 4.0, 6.5):
        positions, step = (2 * n, n, 0.0), 3 * n
        assert FoCa().predicted(positions, step) == pytest.approx((7 / 3, -5 / 3, 1 / 3))
        # F_0 + n/2 (F'_full + F'_{k+1}), n F'_full = 3/2 F_0 - 2 F_1 + 1/2 F_2, n F'_{k+1} = F^ - F_0
        calibrated = (1 + (3 / 2 + 4 / 3) / 2, (-2 - 5 / 3) / 2, (1 / 2 + 1 / 3) / 2)
        assert FoCa(horizon=100).weights(positions, step) == pytest.approx(calibrated)


@brief()
@given(positions=apart(3, 3), steps=ahead, values=st.tuples(*[st.integers(-5, 5)] * 3))
def test_foca_forecasts_by_bdf2_on_uneven_steps(
    positions: tuple[float, ...], steps: float, values: tuple[int, ...]
) -> None:
    """The parabola through F^, F_0, F_1 has the slope at F^ that the one through F_0, F_1, F_2 has at F_0."""

    def slope(places: Sequence[float], heights: Sequence[float]) -> float:
        (a, b, c), (fa, fb, fc) = places, heights
        first, second = (fa - fb) / (a - b), (fb - fc) / (b - c)
        return first + (a - b) * (first - second) / (a - c)

    step = positions[0] + steps
    forecast = weigh(FoCa().predicted(positions, step), values)
    at_newest = slope(positions, values)
    at_forecast = slope((step, *positions[:2]), (forecast, *values[:2]))
    assert at_forecast == pytest.approx(at_newest, rel=1e-6, abs=1e-6)
    calibrated = values[0] + steps / 2 * (at_newest + (forecast - values[0]) / steps)
    assert weigh(FoCa(horizon=100).weights(positions, step), values) == pytest.approx(calibrated, rel=1e-6, abs=1e-6)


@brief()
@given(positions=apart(3, 3), steps=ahead)
def test_foca_goes_back_to_the_newest_value_beyond_its_horizon(positions: tuple[float, ...], steps: float) -> None:
    line = [3 * position - 1 for position in positions]
    change = weigh(FoCa(horizon=3).weights(positions, positions[0] + steps), line) - line[0]
    assert change == pytest.approx(3 * steps if steps <= 3 else 3 * 3 * 3 / steps, abs=1e-6)


# ---- the others


def test_binomial_rows() -> None:
    rows = {1: (1,), 2: (2, -1), 3: (3, -3, 1), 4: (4, -6, 4, -1), 5: (5, -10, 10, -5, 1)}
    values = np.random.default_rng(0).normal(size=5)
    for order, row in rows.items():
        for step in (12.0, 40.0):  # whatever the distance
            assert Binomial(order).weights(UNEVEN[:order], step) == row
        continued = [*values[:order][::-1], weigh(row, values[:order])]
        assert np.diff(continued, n=order) == pytest.approx([0.0])


@brief()
@given(positions=apart(2, 8), steps=ahead)
def test_barycentric_is_the_published_quotient(positions: tuple[float, ...], steps: float) -> None:
    nodes, step = np.array(positions), positions[0] + steps
    rho = (-1.0) ** np.arange(len(nodes))
    rho[[0, -1]] *= 0.5
    terms = rho / (step - nodes)
    assume(abs(terms.sum()) > 1e-6)
    assert Barycentric(8).weights(positions, step) == pytest.approx(terms / terms.sum(), rel=1e-6, abs=1e-9)


def test_barycentric_holds_at_a_pole() -> None:
    assert Barycentric(3).weights((10.0, 9.0, 4.0), 11.5) == (1.0, 0.0, 0.0)
    assert Barycentric(3).weights((10.0, 9.0, 4.0), 11.0) == (7.0, -7.0, 1.0)
    assert Barycentric(3).weights((10.0, 5.0, 4.0), 11.5)[0] > 0  # none ahead where the newer interval is the longer


@brief()
@given(positions=apart(1, 8), index=st.integers(0, 7))
def test_barycentric_returns_the_value_at_a_node(positions: tuple[float, ...], index: int) -> None:
    index %= len(positions)
    assert Barycentric(8).weights(positions, positions[index]) == unit(index, len(positions))


def test_extrapolate_ignores_the_distance() -> None:
    for step in (5.0, 9.0):
        assert Extrapolate().weights([4.0, 2.0], step) == (1.5, -0.5)
        assert Extrapolate(1.2).weights([4.0, 2.0], step) == (2.2, -1.2)


@pytest.mark.parametrize(("ratio", "gamma"), [(0.2, 1.0), (1.25, 1.25), (7.0, 1.5)])
def test_the_probe_ratio_is_clipped(ratio: float, gamma: float) -> None:
    assert ProbeRatio().weights([4.0, 2.0], 5.0, {"ratio": ratio}) == (gamma, 1.0 - gamma)
    assert ProbeRatio(0.0, 9.0).weights([4.0, 2.0], 5.0, {"ratio": ratio}) == (ratio, 1.0 - ratio)
    with pytest.raises(ScheduleError, match="guard with a probe"):
        ProbeRatio().weights([4.0, 2.0], 5.0)


def test_rows_come_from_the_table() -> None:
    assert TABLE.slots == 3
    assert TABLE.weights([1.0, 0.0], 2.0) == (1.5, -0.5)
    assert TABLE.weights([2.0, 1.0, 0.0], 2.0) == (1.5, -0.5, 0.0)
    assert TABLE.weights([2.0, 1.0, 0.0], 3.0) == (2.0, -1.5, 0.5)
    assert TABLE.weights([2.0, 1.0], 3.0) == (1.0, 0.0)  # too few values: held
    assert TABLE.weights([3.0, 2.0, 1.0, 0.0], 3.0) == (2.0, -1.5, 0.5, 0.0)
    for step in (4.0, -1.0, 1.5):
        with pytest.raises(ScheduleError, match=rf"step {step:g}: the table has 4"):
            TABLE.weights([1.0, 0.0], step)
    with pytest.raises(ScheduleError, match="decide='host'"):
        TABLE.weights([torch.tensor(1.0), torch.tensor(0.0)], torch.tensor(2.0))
