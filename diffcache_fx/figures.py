"""Pictures of what was measured: change maps, plans, signals, quality against speed. Each is a matplotlib figure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .errors import CacheError
from .record import Decision
from .recording import Recording

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LONGEST_NAME = 40
_NAMED = 30  # rows of a map with a name each


def new_figure(width: float, height: float) -> tuple[Figure, Any]:
    """An empty figure and its axes. Raises CacheError where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CacheError("a report needs matplotlib: pip install 'diffcache_fx[plot]'") from error
    made = Figure(figsize=(width, height), layout="constrained")
    return made, made.subplots()


def change_map(recording: Recording) -> Figure:
    """Relative L1 change of each region from step to step: a row for each region, a column for each step, on a
    logarithmic scale."""
    names = [region.name for region in recording.regions]
    changes = torch.stack([region.relative() for region in recording.regions]).numpy()
    changes = np.where(np.isfinite(changes), changes, np.nan)
    figure, axis = new_figure(9, _height(len(names)))
    from matplotlib.colors import LogNorm

    known = changes[np.isfinite(changes) & (changes > 0)]
    low, high = (float(known.min()), float(known.max())) if known.size else (1e-3, 1.0)
    image = axis.imshow(changes, aspect="auto", interpolation="nearest", norm=LogNorm(low, max(high, low * 1.01)))
    figure.colorbar(image, ax=axis, label="relative L1 change")
    _label(axis, names)
    return figure


def plan_grid(decisions: Sequence[Decision]) -> Figure:
    """What was computed (dark) and what was reused (light), by region and step; a band for each guidance branch."""
    contexts = list(dict.fromkeys(decision.context for decision in decisions))
    names = list(dict.fromkeys(name for decision in decisions for name in (*decision.refreshed, *decision.reused)))
    steps = max((decision.step for decision in decisions), default=0) + 1
    grid = np.full((len(contexts) * len(names), steps), np.nan)
    for decision in decisions:
        first = contexts.index(decision.context) * len(names)
        for name in decision.refreshed:
            grid[first + names.index(name), decision.step] = 1.0
        for name in decision.reused:
            grid[first + names.index(name), decision.step] = 0.0
    labels = [f"{context}: {name}" if len(contexts) > 1 else name for context in contexts for name in names]
    figure, axis = new_figure(9, _height(len(labels)))
    axis.imshow(grid, aspect="auto", interpolation="nearest", cmap="Blues", vmin=-0.3, vmax=1.2)
    _label(axis, labels)
    return figure


def signals(decisions: Sequence[Decision]) -> Figure | None:
    """Signal against threshold over the steps, with the steps that were computed marked; None for static schedules."""
    contexts = list(dict.fromkeys(d.context for d in decisions if d.signal is not None))
    if not contexts:
        return None
    figure, axis = new_figure(9, 3.4)
    for index, context in enumerate(contexts):
        own = [d for d in decisions if d.context == context and d.signal is not None]
        color = f"C{index}"
        axis.plot([d.step for d in own], [d.signal for d in own], color=color, marker=".", label=f"signal, {context}")
        computed = [d for d in own if d.refreshed]
        axis.plot([d.step for d in computed], [d.signal for d in computed], "o", color=color, fillstyle="none")
        axis.plot([d.step for d in own], [d.threshold for d in own], color=color, linestyle="--", linewidth=0.9)
    axis.set(xlabel="step (circles: computed; dashed: threshold)", ylabel="signal")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8)
    return figure


def lines(curves: Mapping[str, Sequence[float]], xlabel: str, ylabel: str, log: bool = False) -> Figure:
    """Curves over the steps."""
    figure, axis = new_figure(9, 3.4)
    for name, values in curves.items():
        axis.plot(range(len(values)), values, marker=".", label=name)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    if log:
        axis.set_yscale("log")
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8)
    return figure


def quality_against_speed(
    curves: Mapping[str, Sequence[tuple[float, float]]], xlabel: str = "speed-up", ylabel: str = "PSNR, dB"
) -> Figure:
    """Points (speed-up, quality); those of one name are joined. Points that are not finite are left out."""
    figure, axis = new_figure(9, 4.2)
    for name, points in curves.items():
        finite = sorted((x, y) for x, y in points if math.isfinite(x) and math.isfinite(y))
        if finite:
            axis.plot([x for x, _ in finite], [y for _, y in finite], marker="o", label=name)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8)
    return figure


def _height(rows: int) -> float:
    return 1.2 + 0.22 * min(max(rows, 4), 60)


def _label(axis: Any, names: Sequence[str]) -> None:
    axis.set_xlabel("step")
    if len(names) <= _NAMED:
        axis.set_yticks(range(len(names)), [_short(name) for name in names], fontsize=7)
    else:
        axis.set_ylabel(f"{len(names)} regions, in order")


def _short(name: str) -> str:
    """Of a run of modules (`blocks.0..blocks.11`) what both ends share is said once: `blocks.0..11`; and no more than
    fits beside an axis."""
    first, between, last = name.partition("..")
    shared = first.rpartition(".")[0] + "."
    if between and len(shared) > 1 and last.startswith(shared):
        name = first + between + last.removeprefix(shared)
    return name if len(name) <= _LONGEST_NAME else "…" + name[1 - _LONGEST_NAME :]
