"""Which denoisers can be captured and cut: `python -m bench.coverage [NAMES...] [--fresh]`.

Every entry of the corpus with tiny random weights, and the published sizes on fake tensors. Writes
`bench/results/coverage.json` (finished rows are kept unless named or --fresh) and `coverage.md`.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffcache_fx.passes.flops import program_flops
from diffcache_fx.passes.specialize import Specialize
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils._pytree import tree_leaves

from bench.rows import Row, brief, rows_of, work
from bench.zoo import Entry, corpus, published
from diffcache_fx import CachedDenoiser, RegionError, compile_with_cache, schedules
from diffcache_fx.capture import capture
from diffcache_fx.compile import front_end, run_passes
from diffcache_fx.invariants import NAMES, check, run_program, same

RESULTS = Path(__file__).parent / "results"
_MODULE = "bench.coverage"
_LIMIT = 240  # seconds for one entry
_BATCH = 8  # entries in one process
_MANY = 0.60  # share of FLOPs from which a region counts


def _tensors(output: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def measure(entry: Entry) -> Row:
    """Capture one entry, compare it with the model on two inputs, find its region, check the invariants."""
    start = time.perf_counter()
    named = entry.name.split("-")[0] if entry.family != "plain" else entry.name
    row: Row = {"name": entry.name, "model": named, "family": entry.family}
    model = entry.build()
    args, kwargs = entry.inputs(0)
    try:
        try:
            cached = compile_with_cache(
                model, schedules.interval(2, storage="value"), backend="eager", example_inputs=(args, kwargs)
            )
        except RegionError as error:
            row["region_failure"] = brief(error)
            program, _ = capture(model, args, kwargs)
            row |= {"captured_by": program.captured_by, "nodes": len(program.graph.nodes)}
            outputs, _ = run_program(program, model, args, kwargs)
            row["identical"] = same(outputs, _tensors(model(*args, **kwargs)))
            return row
        program = cached._captured().program
        row |= {"captured_by": program.captured_by, "nodes": len(program.graph.nodes)}
        row["identical"] = all(_agrees(cached, model, entry, seed) for seed in (0, 1))
        row["invariants"] = check(program, model, *entry.inputs(0))
        program = run_passes(program, front_end(schedules.interval(2)))
        full, reuse = (program_flops(Specialize(names)(program)) for names in (frozenset(), _every(program)))
        row["share"] = 1 - reuse / max(full, 1)
        row["region"] = ", ".join(region.name for region in program.regions)
        row["blocks"] = sum(len(region.blocks) for region in program.regions)
        row["cut_bytes"] = sum(region.nbytes for region in program.regions)
        row["stored"] = ", ".join("residual" if v.base else "value" for r in program.regions for v in r.cut)
        latent = args[entry.latent] if isinstance(entry.latent, int) else kwargs[entry.latent]
        row["latent_bytes"] = sum(leaf.nbytes for leaf in _tensors(latent))
    finally:
        row["seconds"] = round(time.perf_counter() - start, 1)
    return row


def _every(program: Any) -> frozenset[str]:
    return frozenset(region.name for region in program.regions)


def _agrees(cached: CachedDenoiser, model: nn.Module, entry: Entry, seed: int) -> bool:
    """Whether the first call of a generation, which computes everything, equals the model's."""
    (args, kwargs), (args_again, kwargs_again) = entry.inputs(seed), entry.inputs(seed)
    cached.reset()
    return same(_tensors(cached(*args, **kwargs)), _tensors(model(*args_again, **kwargs_again)))


def measure_published(name: str) -> Row:
    """Capture and explain a full-size model that lies nowhere in memory; seconds of each stage, peak memory in GiB."""
    import resource

    from torch._subclasses.fake_tensor import FakeTensorMode

    row: Row = {"name": name, "published": True}
    with FakeTensorMode(), torch.no_grad():
        entry = published()[name]
        model, (args, kwargs) = entry.build(), entry.inputs()
        start, spent = time.perf_counter(), time.process_time()
        program, _ = capture(model, args, kwargs)
        row |= {"capture_seconds": time.perf_counter() - start, "capture_cpu": time.process_time() - spent}
        row["nodes"] = len(program.graph.nodes)
        start = time.perf_counter()
        run_passes(program, front_end(schedules.interval(2)))
        row["regions_seconds"] = time.perf_counter() - start
        start = time.perf_counter()
        cached = compile_with_cache(model, schedules.interval(2), backend="eager", example_inputs=(args, kwargs))
        row["compile_seconds"] = time.perf_counter() - start
        start = time.perf_counter()
        explanation = cached.explain()
        row["explain_seconds"] = time.perf_counter() - start
    row["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    row["full_flops"] = explanation.full_flops
    row["share"] = 1 - explanation.programs[-1][1] / explanation.full_flops
    row["region"] = ", ".join(region.name for region in explanation.regions)
    row["cut_bytes"] = explanation.cache_bytes
    row["peak_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}


def _measured(name: str) -> Row:
    entries = corpus()
    return measure(entries[name]) if name in entries else measure_published(name)


def _batch(name: str) -> int:
    return 1 if name in published() else _BATCH


def measure_in_process(name: str) -> Row:
    """The row of one entry, measured in a process of its own."""
    return next(rows_of(_MODULE, [name], _batch))


def _cells(row: Row) -> list[str]:
    faults = [name for name, fault in row.get("invariants", {}).items() if fault]
    return [
        row["name"],
        row.get("captured_by", "no"),
        str(row.get("nodes", "")),
        {True: "yes", False: "no"}.get(row.get("identical"), ""),
        f"{row.get('region', '')} ({row['blocks']})" if "blocks" in row else "",
        f"{row['cut_bytes']:,}" if "cut_bytes" in row else "",
        f"{100 * row['share']:.1f}" if "share" in row else "",
        ("all" if not faults else "not " + ", ".join(faults)) if "invariants" in row else "",
        row.get("failure", row.get("region_failure", "")),
    ]


_COLUMNS = ["model", "captured by", "nodes", "bit-identical", "region (blocks)", "cut bytes", "% FLOPs saved"]
_COLUMNS += [f"invariants 1-{len(NAMES)}", "why not"]
_SIZES = ["model", "parameters", "nodes", "capture s", "regions s", "compile s", "explain s", "peak GiB"]
_SIZES += ["% FLOPs saved", "cut MiB", "why not"]


def _size_cells(row: Row) -> list[str]:
    keys = ("capture_seconds", "regions_seconds", "compile_seconds", "explain_seconds", "peak_gib")
    if "share" not in row:
        return [row["name"], *[""] * 9, row.get("failure", "")]
    numbers = [f"{row[key]:.1f}" for key in keys]
    head = [row["name"], f"{row['parameters'] / 1e9:.2f} B", f"{row['nodes']:,}"]
    return [*head, *numbers, f"{100 * row['share']:.1f}", f"{row['cut_bytes'] / 2**20:.0f}", ""]


def totals(rows: Sequence[Row]) -> dict[str, int]:
    """How many entries and classes were captured bit-identically, and how many have a region of 60 % of the FLOPs."""
    good = [row for row in rows if row.get("identical")]
    large = [row for row in good if row.get("share", 0) >= _MANY]
    sound = [row for row in large if not any(row["invariants"].values())]
    classes = {row.get("model", row["name"].split("-")[0]) for row in rows if row.get("family") != "plain"}
    return {
        "entries": len(rows),
        "classes": len(classes),
        "captured and identical": len({row["model"] for row in good} & classes),
        "with a region of 60 %": len({row["model"] for row in large} & classes),
        "of these with all invariants": len({row["model"] for row in sound} & classes),
    }


def _report(rows: dict[str, Row]) -> str:
    parts, console = [], Console(width=200)
    tiny = [row for row in rows.values() if not row.get("published") and row["name"] not in published()]
    full = [row for row in rows.values() if row["name"] in published()]
    for title, columns, lines in (
        ("Coverage", _COLUMNS, [_cells(row) for row in tiny]),
        ("Published sizes, on fake tensors", _SIZES, [_size_cells(row) for row in full]),
    ):
        table = Table(*columns, title=title)
        for line in lines:
            table.add_row(*line)
        console.print(table)
        body = ["| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in (columns, *lines)]
        parts += [f"## {title}", "", body[0], "|" + "---|" * len(columns), *body[1:], ""]
    summary = ", ".join(f"{value} {key}" for key, value in totals(tiny).items())
    console.print(summary)
    return "\n".join(["# Coverage", "", summary + f" (torch {torch.__version__}).", "", *parts])


def main() -> None:
    """Measure what is named, or everything that has no row yet, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="entries of the corpus or published models")
    parser.add_argument("--fresh", action="store_true", help="drop the rows measured before")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options.names, _measured, _LIMIT)
        return
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / "coverage.json"
    known: dict[str, Row] = json.loads(path.read_text()) if path.exists() and not options.fresh else {}
    order = [*corpus(), *published()]
    for row in rows_of(_MODULE, options.names or [name for name in order if name not in known], _batch):
        known[row["name"]] = row
        known = {name: known[name] for name in order if name in known}
        path.write_text(json.dumps(known, indent=1) + "\n")
        print(f"{row['name']}: {row.get('failure') or row.get('region_failure') or 'ok'}", file=sys.stderr, flush=True)
    (RESULTS / "coverage.md").write_text(_report(known))


if __name__ == "__main__":
    main()
