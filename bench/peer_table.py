"""Rows, table and JSON of `bench.peers`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from rich import box
from rich.table import Table

from diffcache_fx.measure import Ratio, Timings

from .figures import scaled
from .peer_contenders import Contender, Plan
from .peer_ours import OURS, OursFactory

Facts = Mapping[str, Any]
NOTES = """One run, all contenders in turn, each in a process of its own; every contender refreshes at the same steps.
The allocator of all of them is told to keep freed memory: otherwise page faults, not caching, decide in eager mode.

- over ours: latency of a generation over that of this library's static schedule that caches the same values, same mode
  (above 1: ours is faster), with the 95 % bootstrap interval
- speed-up: over the uncached model in the same mode; ideal: what the executed FLOPs alone would give
- compile: seconds from nothing, empty caches, to the end of the first generation, less a later one
- breaks, compilations: graph breaks and calls of the compiler up to the first generation; recompiles: after it; !:
  Dynamo reached its recompile limit, and the rest runs eagerly
- reads: values computed from weights or latents that the host reads in a generation; on a GPU it waits for each
- cache: bytes of all tensors the contender holds from step to step
- fidelity: to the uncached generations in the same mode, from the same noise
- glue: statements of code to put the cache on this model
- ≠: its decisions were not those of the plan
"""


@dataclass(frozen=True)
class Row:
    """One contender in one mode. why: "not run: ..." where there are no figures. seconds: per generation; share: of the
    ideal speed-up reached; to_ours: latency over that of `ours`; reads: per generation, of values computed on the
    device, and every_read of any; held: cache bytes; limit_hit: Dynamo reached its recompile limit."""

    name: str
    library: str
    method: str
    mode: str
    why: str = ""
    how: str = ""
    unequal: str = ""
    adapter_lines: int = 0
    refreshes: int = 0
    decisions_equal: bool = True
    seconds: float = 0.0
    samples_s: list[float] = field(default_factory=list)
    speedup: Ratio | None = None
    ideal: float = 1.0
    share: Ratio | None = None
    ours: str = ""
    to_ours: Ratio | None = None
    compile_s: float | None = None
    compilations: int = 0
    graph_breaks: int = 0
    break_reasons: list[str] = field(default_factory=list)
    recompiles: int = 0
    limit_hit: bool = False
    reads: int = 0
    every_read: int = 0
    held: int = 0
    fidelity: dict[str, float] = field(default_factory=dict)


def label(name: str, mode: str) -> str:
    """What a contender in a mode is called among the timings."""
    return f"{name} {mode}"


def counterpart(method: str) -> str:
    """This library's static schedule that caches the same values as others of this method; empty if there is none."""
    same = (made.name for made in OURS if made.method == method and not issubclass(made, OursFactory))
    return next(same, "")


def left_out(kind: type[Contender], mode: str, reason: str) -> Row:
    """The row of a contender that took no part."""
    return Row(kind.name, kind.library, kind.method, mode, why=f"not run: {reason}", how=kind.how, unequal=kind.unequal)


def described(kind: type[Contender], mode: str, plan: Plan, facts: Facts, eager: Facts, uncached: Facts) -> Row:
    """What was found out ahead of the timed rounds. eager, uncached: the facts of this contender and of the uncached
    model in eager, where FLOPs and reads are counted."""
    bits = facts["bits"]
    cached = kind.name != "uncached"
    return Row(
        name=kind.name,
        library=kind.library,
        method=kind.method,
        mode=mode,
        how=kind.how,
        unequal=kind.unequal,
        adapter_lines=facts["adapter_lines"],
        refreshes=sum(bits),
        decisions_equal=not cached or tuple(bits) == plan.bits,
        ideal=uncached["flops"] / max(eager["flops"], 1),
        compilations=facts.get("compilations", 0),
        graph_breaks=facts.get("graph_breaks", 0),
        break_reasons=facts.get("break_reasons", []),
        recompiles=facts.get("recompiles", 0),
        limit_hit=facts.get("limit_hit", False),
        reads=eager["reads"] - uncached["reads"],
        every_read=eager["every_read"] - uncached["every_read"],
        held=facts["held"] if cached else 0,
    )


def timed(row: Row, timings: Timings, fidelity: dict[str, float], first_s: float | None) -> Row:
    """A row with its figures. first_s: seconds until the first, compiling generation was done."""
    own, base = label(row.name, row.mode), label("uncached", row.mode)
    ours = counterpart(row.method)
    seconds = timings.median(own)
    speedup = timings.ratio(base, own)
    known = label(ours, row.mode) in timings.seconds
    return replace(
        row,
        seconds=seconds,
        samples_s=[float(value) for value in timings.seconds[own]],
        speedup=speedup,
        share=scaled(speedup, 1 / row.ideal),
        ours=ours if known else "",
        to_ours=timings.ratio(own, label(ours, row.mode)) if known else None,
        compile_s=None if first_s is None else max(first_s - seconds, 0.0),
        fidelity=fidelity,
    )


HEADINGS = (
    "method",
    "contender",
    "mode",
    "s per generation",
    "over ours [95 %]",
    "speed-up",
    "share of ideal",
    "refreshes",
    "compile, s",
    "breaks",
    "compilations",
    "recompiles",
    "reads",
    "cache, MiB",
    "fidelity",
    "glue",
)


def cells(row: Row) -> list[str]:
    """One line of the table, HEADINGS in order; short for a row without figures."""
    head = [row.method, row.name, row.mode]
    if row.why:
        return [*head, row.why]
    compiled = row.mode == "compiled"
    ratio = row.to_ours
    names = {"psnr_db": "dB", "error": "relative"}
    fidelity = [f"{row.fidelity[key]:.3g} {unit}" for key, unit in names.items() if key in row.fidelity]
    return [
        *head,
        f"{row.seconds:.3f}",
        "-"
        if ratio is None
        else "1"
        if row.name == row.ours
        else f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]",
        f"{row.speedup.value:.2f}" if row.speedup else "-",
        f"{100 * row.share.value:.0f} %" if row.share else "-",
        f"{row.refreshes}{'' if row.decisions_equal else ' ≠'}",
        f"{row.compile_s:.1f}" if row.compile_s is not None else "-",
        str(row.graph_breaks) if compiled else "-",
        f"{row.compilations}{' !' if row.limit_hit else ''}" if compiled else "-",
        str(row.recompiles) if compiled else "-",
        str(row.reads),
        f"{row.held / 2**20:.2f}",
        fidelity[0] if fidelity else "-",
        str(row.adapter_lines),
    ]


def terminal(title: str, rows: list[Row]) -> Table:
    """For a terminal: figures above, and why the rest did not run as its caption."""
    lost = [f"{row.name} ({row.mode}) {row.why}" for row in rows if row.why]
    table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), caption="\n".join(lost) or None)
    for index, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if index < 3 else "right", overflow="fold")
    for row in rows:
        if not row.why:
            table.add_row(*cells(row))
    return table


def markdown(title: str, rows: list[Row]) -> str:
    """The same as Markdown; rows without figures stay in place."""
    lines = [f"## {title}\n", "| " + " | ".join(HEADINGS) + " |"]
    lines.append("|" + "|".join(["---"] * 3 + ["---:"] * (len(HEADINGS) - 3)) + "|")
    for row in rows:
        line = cells(row)
        lines.append("| " + " | ".join(line + [""] * (len(HEADINGS) - len(line))) + " |")
    notes = {
        f"- {row.name}: {row.how}" + (f". Not equal: {row.unequal}" if row.unequal else "") for row in rows if row.how
    }
    return "\n".join([*lines, "", "How the decisions were made equal:", "", *sorted(notes)]) + "\n"


def plain(row: Row) -> dict[str, Any]:
    """A row as JSON data."""
    return asdict(row)


def loaded(data: Mapping[str, Any]) -> Row:
    """A row from what `plain` made of it."""
    ratios = {name: Ratio(**data[name]) for name in ("speedup", "share", "to_ours") if data[name] is not None}
    return Row(**{**data, **ratios})
