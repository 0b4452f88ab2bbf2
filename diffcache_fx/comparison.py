"""What a comparison found: a line for each denoiser, as a table, Markdown or JSON."""

from __future__ import annotations

import json
import math
import platform
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor

from .measure import Ratio, Timings
from .record import Decision
from .version import __version__

_STEADY = 1.5  # ends of an interval that are farther apart say little


@dataclass(frozen=True)
class Row:
    """One line of the table. latency: seconds per unit. ideal: speed-up by executed FLOPs. compile_s: capture and
    compilation. recompiles: compilations after the first, short generation. cache_bytes: all contexts together. beside:
    of the uncached model in fewer steps, the schedule that costs as much."""

    name: str
    latency: float
    speedup: Ratio
    ideal: float
    fidelity: dict[str, float]
    cache_bytes: int = 0
    graph_breaks: int = 0
    recompiles: int = 0
    compile_s: float = 0.0
    why: str = ""
    beside: str = ""


@dataclass
class Comparison:
    """The table, the outputs by name and turn, the decisions of each schedule's last generation, and the raw
    samples."""

    model: str
    unit: str
    backend: str
    steps: int
    rows: list[Row]
    timings: Timings
    outputs: dict[str, list[Tensor]] = field(repr=False)
    decisions: dict[str, tuple[Decision, ...]] = field(default_factory=dict, repr=False)
    seconds: float = 0.0

    def columns(self) -> list[str]:
        """Headings, units included."""
        kinds = [key for key in ("psnr_db", "error", "accuracy") if any(key in row.fidelity for row in self.rows)]
        titles = {"psnr_db": "PSNR, dB", "error": "relative error", "accuracy": "accuracy"}
        return [
            "schedule",
            f"ms per {self.unit}",
            "speed-up [95 %]",
            "ideal",
            *(titles[kind] for kind in kinds),
            "cache",
            "graph breaks",
            "recompiles",
            "compile, s",
        ]

    def cells(self, row: Row) -> list[str]:
        kinds = [key for key in ("psnr_db", "error", "accuracy") if any(key in other.fidelity for other in self.rows)]
        first, plain = row.name == self.timings.baseline, row.beside or row.name == self.timings.baseline
        ratio = row.speedup
        return [
            row.name,
            f"{1000 * row.latency:.1f}",
            "1" if first else self.told(ratio),
            f"{row.ideal:.2f}",
            *(_figure(kind, row.fidelity.get(kind)) for kind in kinds),
            "-" if plain else f"{row.cache_bytes / 2**20:.2f} MiB",
            str(row.graph_breaks),
            str(row.recompiles),
            f"{row.compile_s:.1f}",
        ]

    @property
    def rounds(self) -> int:
        return len(self.timings.seconds[self.timings.baseline])

    def told(self, ratio: Ratio) -> str:
        """A speed-up with its interval, which one round does not tell."""
        return f"{ratio.value:.2f}" + (f" [{ratio.low:.2f}, {ratio.high:.2f}]" if self.rounds > 1 else "")

    @property
    def unsteady(self) -> str:
        """A sentence where rounds differ too much to go by; else empty."""
        wide = [row.name for row in self.rows if row.speedup.high > _STEADY * row.speedup.low]
        if not wide:
            return ""
        named = repr(wide[0]) + (f" and {len(wide) - 1} more" if len(wide) > 1 else "")
        return (
            f"The rounds of {named} differ by half and more: something else kept this machine busy. Go by the ideal "
            "speed-up, or measure again."
        )

    def table(self) -> Table:
        """For a terminal."""
        title = f"{self.model}, {self.backend}: {self.rounds} generations of {self.steps} steps each, in turn"
        table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for index, heading in enumerate(self.columns()):
            table.add_column(heading, justify="right" if index else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*self.cells(row))
        return table

    def markdown(self) -> str:
        """The same as a Markdown table."""
        head = self.columns()
        lines = ["| " + " | ".join(head) + " |", "|" + "|".join(["---"] + ["---:"] * (len(head) - 1)) + "|"]
        lines += ["| " + " | ".join(self.cells(row)) + " |" for row in self.rows]
        return "\n".join(lines) + "\n"

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "backend": self.backend,
            "steps": self.steps,
            "unit": self.unit,
            "seconds": round(self.seconds, 1),
            "versions": {"diffcache_fx": __version__, "torch": torch.__version__, "python": platform.python_version()},
            "threads": torch.get_num_threads(),
            "rows": [asdict(row) for row in self.rows],
            "samples_s": {name: values.tolist() for name, values in self.timings.seconds.items()},
        }

    def json(self) -> str:
        """Everything but the outputs; an infinite figure becomes null."""
        return json.dumps(_finite(self.to_dict()), indent=2) + "\n"


def _figure(kind: str, value: float | None) -> str:
    if value is None:
        return "-"
    if kind == "accuracy":
        return f"{100 * value:.1f} %"
    if kind == "error":
        return f"{value:.2g}"
    return "inf" if math.isinf(value) else f"{value:.1f}"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
