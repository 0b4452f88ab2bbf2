"""The cells of `bench.engines`: what was measured of one engine, as a line of a table and as JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from rich.table import Table

from diffcache_fx.measure import Ratio

HEADINGS = ("runtime", "schedule", "form", "export, s", "MiB", "s per generation", "speed-up", "ideal", "reuse step")
HEADINGS += ("fidelity",)


@dataclass
class Cell:
    """One schedule in one form through one runtime. reason: why it was not run; empty if it was."""

    runtime: str
    schedule: str
    form: str
    reason: str = ""
    export_s: float | None = None
    bytes: int | None = None
    latency_s: float | None = None
    speedup: Ratio | None = None
    ideal: float | None = None
    reuse_cost: float | None = None
    reuse_flops: float | None = None
    fidelity: dict[str, float] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"{self.runtime} | {self.schedule} | {self.form}"


def table(title: str, cells: list[Cell]) -> Table:
    """For the terminal."""
    made = Table(title=title, title_justify="left")
    for heading in HEADINGS:
        made.add_column(heading)
    for cell in cells:
        made.add_row(*_texts(cell))
    return made


def _texts(cell: Cell) -> list[str]:
    head = [cell.runtime, cell.schedule, cell.form or "-"]
    if cell.reason:
        return [*head, "", "", f"not run: {cell.reason}", "", "", "", ""]
    fidelity = ", ".join(f"{name} {value:.4g}" for name, value in cell.fidelity.items()) or "-"
    return [
        *head,
        f"{cell.export_s:.1f}" if cell.export_s is not None else "-",
        f"{cell.bytes / (1 << 20):.1f}" if cell.bytes is not None else "-",
        f"{cell.latency_s:.3f}" if cell.latency_s is not None else "-",
        str(cell.speedup) if cell.speedup is not None else "-",
        f"{cell.ideal:.2f}" if cell.ideal is not None else "-",
        _reuse_text(cell),
        fidelity,
    ]


def _reuse_text(cell: Cell) -> str:
    if cell.reuse_cost is None or not cell.reuse_flops:
        return "-"
    return f"{100 * cell.reuse_cost:.1f} % ({cell.reuse_cost / cell.reuse_flops:.2f})"


def markdown(title: str, cells: list[Cell]) -> str:
    """For the file."""
    lines = [f"## {title}\n", "| " + " | ".join(HEADINGS) + " |", "|" + "---|" * len(HEADINGS)]
    return "\n".join([*lines, *("| " + " | ".join(_texts(cell)) + " |" for cell in cells)]) + "\n"


def cell_of(found: dict[str, Any]) -> Cell:
    """A cell as `plain` told it."""
    known = {name: value for name, value in found.items() if name != "run"}
    speedup = known.get("speedup")
    return Cell(**{"form": "", **known, "speedup": Ratio(**speedup) if speedup else None})


def plain(cell: Cell) -> dict[str, Any]:
    """For JSON."""
    found = {**vars(cell), "speedup": vars(cell.speedup) if cell.speedup else None}
    return {name: value for name, value in found.items() if value not in (None, "", {})} | {"run": not cell.reason}
