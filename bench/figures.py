"""Measured figures with the target beside each."""

from __future__ import annotations

from dataclasses import dataclass

from rich.table import Table

from diffcache_fx.measure import Ratio


@dataclass(frozen=True)
class Figure:
    """One measured figure. target: as text, empty for what is only shown; well: whether it is met."""

    part: str
    name: str
    value: float
    unit: str = "x"
    interval: tuple[float, float] | None = None
    target: str = ""
    well: bool | None = None


def at_most(part: str, name: str, ratio: Ratio | float, limit: float, unit: str = "x") -> Figure:
    """A figure that must not exceed a limit."""
    value, interval = _parts(ratio)
    return Figure(part, name, value, unit, interval, f"<= {limit:g}", value <= limit)


def at_least(part: str, name: str, ratio: Ratio | float, limit: float, unit: str = "x") -> Figure:
    """A figure that must not fall below a limit."""
    value, interval = _parts(ratio)
    return Figure(part, name, value, unit, interval, f">= {limit:g}", value >= limit)


def shown(part: str, name: str, ratio: Ratio | float, unit: str = "x") -> Figure:
    """A figure without target."""
    value, interval = _parts(ratio)
    return Figure(part, name, value, unit, interval)


def _parts(ratio: Ratio | float) -> tuple[float, tuple[float, float] | None]:
    return (ratio.value, (ratio.low, ratio.high)) if isinstance(ratio, Ratio) else (ratio, None)


def scaled(ratio: Ratio, by: float) -> Ratio:
    """A ratio and its interval times a factor."""
    return Ratio(ratio.value * by, ratio.low * by, ratio.high * by)


def table(figures: list[Figure]) -> Table:
    """Figures with their targets."""
    shown_as = {True: "[green]met", False: "[red]missed", None: ""}
    made = Table("part", "figure", title="What a step costs")
    for heading in ("value", "95 %", "target", ""):
        made.add_column(heading, justify="right")
    for figure in figures:
        interval = f"{figure.interval[0]:.3f} to {figure.interval[1]:.3f}" if figure.interval else ""
        value = f"{figure.value:.3f}" if figure.unit == "x" else f"{figure.value:.4g} {figure.unit}"
        made.add_row(figure.part, figure.name, value, interval, figure.target, shown_as[figure.well])
    return made
