"""Forecasts as data: through JSON and the command line, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from diffcache_fx.adaptive import ProbeChange
from diffcache_fx.arguments import parse_schedule
from diffcache_fx.errors import ScheduleError
from diffcache_fx.forecasts import (
    Barycentric,
    Binomial,
    Damped,
    Extrapolate,
    FoCa,
    Forecast,
    Hermite,
    Lagrange,
    Newton,
    ProbeRatio,
    Rows,
    Taylor,
)
from diffcache_fx.guards import Interval
from diffcache_fx.schedule import CacheSchedule, Rule
from diffcache_fx.selection import Blocks, Modules, Sublayers

from .test_forecasts import EQUATIONS, TABLE, label


@pytest.mark.parametrize("forecast", [*EQUATIONS, TABLE], ids=label)
def test_schedules_carry_forecasts_through_json(forecast: Forecast) -> None:
    guard = ProbeChange() if forecast.wants else Interval()
    schedule = CacheSchedule(rules=(Rule(guard=guard, forecast=forecast),))
    again = CacheSchedule.from_json(schedule.to_json())
    assert again == schedule
    assert again.rules[0].forecast == forecast
    assert hash(again) == hash(schedule)
    assert again.slots == forecast.slots


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: Taylor(0), "order must be a whole number from 1 to 4"),
        (lambda: Taylor(5), "order"),
        (lambda: Taylor(True), "order"),
        (lambda: Taylor(1.0), "order"),  # type: ignore[arg-type]
        (lambda: Newton(5), "order"),
        (lambda: Damped(1, 0.0), "factor must be above 0"),
        (lambda: Damped(0), "order"),
        (lambda: Hermite(1, 1.5), "sigma must be at most 1"),
        (lambda: Hermite(1, 0), "sigma"),
        (lambda: Hermite(9), "order"),
        (lambda: Lagrange(0), "nodes"),
        (lambda: Barycentric(9), "history"),
        (lambda: Binomial(6), "order"),
        (lambda: FoCa(0), "horizon"),
        (lambda: FoCa(math.inf), "horizon must be a finite number"),
        (lambda: Extrapolate(math.nan), "weight"),
        (lambda: Extrapolate("0.5"), "weight"),  # type: ignore[arg-type]
        (lambda: ProbeRatio(2.0, 1.0), "low must not be above high"),
        (lambda: ProbeRatio(high=math.inf), "high"),
        (Rows, "one row of weights for each step"),
        (lambda: Rows(((1.0,), ())), "each row"),
        (lambda: Rows((1.0,)), "each row"),  # type: ignore[arg-type]
        (lambda: Rows(((1.0, math.nan),)), "a weight must be a finite number"),
        (lambda: Rows(3), "one row of weights for each step"),  # type: ignore[arg-type]
    ],
)
def test_what_makes_no_forecast_is_refused(make: Callable[[], Forecast], word: str) -> None:
    with pytest.raises(ScheduleError, match=word):
        make()


def test_lists_make_a_table() -> None:
    assert Rows([[1], [2, -1]]) == Rows(((1.0,), (2.0, -1.0)))  # type: ignore[arg-type]
    assert hash(Rows([[1]])) == hash(Rows(((1.0,),)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "forecast"),
    [
        ("taylor", Taylor()),
        ("taylor()", Taylor()),
        ("taylor(order=2)", Taylor(2)),
        ("hermite( order=1 , sigma=0.3 )", Hermite(1, 0.3)),
        ("rows(table=[[1],[1.5,-0.5]])", Rows(((1.0,), (1.5, -0.5)))),
        ("foca(horizon=5)", FoCa(5)),
    ],
)
def test_the_command_line_takes_fields(text: str, forecast: Forecast) -> None:
    found = parse_schedule(f"interval:every=3,forecast={text},warm_up=2")
    assert found.rules[0].forecast == forecast
    assert found.warm_up == 2


def test_the_command_line_takes_regions_with_fields() -> None:
    found = parse_schedule("interval:regions=blocks(first=2,each=True),every=4,forecast=taylor(order=2)")
    assert found.rules[0].regions == Blocks(first=2, each=True)
    assert found.rules[0].forecast == Taylor(2)
    assert parse_schedule("interval:regions=sublayers(kinds=mlp)").rules[0].regions == Sublayers(("mlp",))
    assert parse_schedule("interval:regions=modules(patterns='*.ff')").rules[0].regions == Modules(("*.ff",))


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("tailor(order=2)", "forecast has no kind 'tailor'; did you mean 'taylor'"),
        ("taylor(ordr=2)", "the forecast taylor has no option 'ordr'; did you mean 'order'"),
        ("taylor(2)", "'2' is no option of the forecast taylor: write it as option=value"),
        ("taylor(order=2,order=3)", "'order' of the forecast taylor is given twice"),
        ("taylor(order=9)", "order must be a whole number from 1 to 4, not 9"),
        ("taylor(order=two)", "not 'two'"),
        ("taylor(order=2", "lacks its closing bracket"),
        ("rows", r"forecast=rows needs details .*rows\(field=value\)"),
    ],
)
def test_the_command_line_says_what_is_wrong(text: str, word: str) -> None:
    with pytest.raises(ScheduleError, match=word):
        parse_schedule(f"interval:forecast={text}")


def test_selections_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ScheduleError, match="the selection blocks has no option 'frist'; did you mean 'first'"):
        parse_schedule("interval:regions=blocks(frist=2)")
    with pytest.raises(ScheduleError, match="does not fit"):
        parse_schedule("interval:regions=listed(groups=3)")
