"""A guard's decision written into the graph: numbers carried as state, limits, and the row of the forecast."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from diffcache_fx.adaptive import AdaptiveGuard
from diffcache_fx.arithmetic import Number, at_least
from diffcache_fx.errors import RegionError
from diffcache_fx.forecasts import Forecast
from diffcache_fx.limits import Limits, decide, numbers_of, settled
from diffcache_fx.program import Input, InputKind, Output, OutputKind

from .emit import placeholder
from .inline import inline
from .signals import memory_name

POSITIONS = "positions"


@dataclass(frozen=True)
class Control:
    """How one rule decides inside the graph. slots: refreshed values its forecast looks at."""

    rule: int
    guard: AdaptiveGuard
    limits: Limits
    forecast: Forecast
    slots: int = 1


def number_name(rule: int, name: str) -> str:
    """How a carried number is addressed; `#` keeps it apart from kept quantities."""
    return f"{rule}/#{name}"


@dataclass
class Decided:
    """What the decision added to a graph. predicate: bool scalar, True = refresh. row: forecast weights [slots], or
    None where one value is held. inputs, outputs, values: to be appended to the program's."""

    predicate: fx.Node
    row: fx.Node | None
    memory: dict[str, fx.Node]
    inputs: list[Input] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)
    values: list[fx.Node] = field(default_factory=list)

    def give(self, kind: OutputKind, target: str, node: fx.Node) -> None:
        self.outputs.append(Output(kind, target))
        self.values.append(node)


def decide_in_graph(graph: fx.Graph, control: Control, signals: dict[str, fx.Node], device: torch.device) -> Decided:
    """Add the decision at the graph's insertion point; signals: what the guard measures before it, by name."""
    if not control.forecast.in_graph:
        raise RegionError(f"the forecast {control.forecast.kind!r} is given by step: use decide='host'")
    inputs: list[Input] = []

    def take(kind: InputKind, name: str, target: str, shape: tuple[int, ...], dtype: torch.dtype) -> fx.Node:
        node = placeholder(graph, name, shape, dtype, device)
        inputs.append(Input(kind, node.name, target))
        return node

    rule = control.rule
    numbers = {
        name: take(InputKind.MEMORY, f"number_{rule}_{name}", number_name(rule, name), (), torch.float32)
        for name in numbers_of(control.guard)
    }
    force = take(InputKind.FORCE, f"force_{rule}", str(rule), (), torch.float32)
    moment = take(InputKind.MOMENT, f"moment_{rule}", str(rule), (2,), torch.float32)

    def verdict(values: dict[str, torch.Tensor], carried: dict[str, torch.Tensor], given: list[torch.Tensor]) -> object:
        lead, moment = given
        place = [moment[0], moment[1]]
        found = decide(control.guard, control.limits, values, carried, lead > 0.5, place, lead < -0.5)
        limit = found.limit if isinstance(found.limit, torch.Tensor) else carried["run"] * 0.0 + found.limit
        return found.refresh, found.signal * 1.0, limit, found.memory

    refresh, signal, limit, memory = inline(graph, verdict, signals, numbers, [force, moment])
    decided = Decided(refresh, None, memory, inputs)
    decided.give(OutputKind.DECISION, str(rule), refresh)
    decided.give(OutputKind.SIGNAL, memory_name(rule, "#signal"), signal)
    decided.give(OutputKind.SIGNAL, memory_name(rule, "#limit"), limit)
    if control.slots > 1:
        name = number_name(rule, POSITIONS)
        positions = take(InputKind.MEMORY, f"positions_{rule}", name, (control.slots,), torch.float32)

        def weigh(given: list[torch.Tensor], values: dict[str, torch.Tensor]) -> object:
            places, when, filled, refreshed = given
            row = forecast_row(control.forecast, places, when[0], filled, values)
            later = torch.cat([when[0:1], places[:-1]])
            return row, torch.where(refreshed, later, places)

        filled = numbers["refreshes"]
        decided.row, moved = inline(graph, weigh, [positions, moment, filled, refresh], signals)
        decided.give(OutputKind.MEMORY, name, moved)
    return decided


def settle_in_graph(graph: fx.Graph, control: Control, decided: Decided, signals: dict[str, fx.Node]) -> None:
    """Add the carried numbers for the next step. signals: what the guard measures after the step, by name."""

    def after(values: dict[str, torch.Tensor], memory: dict[str, torch.Tensor], given: list[torch.Tensor]) -> object:
        return {name: value * 1.0 for name, value in settled(control.guard, values, memory, given[0]).items()}

    memory = inline(graph, after, signals, decided.memory, [decided.predicate])
    for name, node in memory.items():
        decided.give(OutputKind.MEMORY, number_name(control.rule, name), node)


def forecast_row(
    forecast: Forecast,
    positions: torch.Tensor,
    step: torch.Tensor,
    filled: torch.Tensor,
    measured: Mapping[str, Number],
) -> torch.Tensor:
    """The weights [slots] over a history of which `filled` values (newest first) are there."""
    slots = positions.shape[0]
    zero = step * 0.0
    row: torch.Tensor | None = None
    for count in range(1, slots + 1):
        weights = forecast.weights([positions[i] for i in range(count)], step, measured)
        padded = torch.stack([zero + weight for weight in (*weights, *[0.0] * (slots - count))])
        row = padded if row is None else torch.where(at_least(filled, float(count)), padded, row)  # type: ignore[arg-type]
    assert row is not None
    return row
