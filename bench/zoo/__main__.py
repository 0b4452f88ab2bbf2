"""Build, run and export the corpus: ``python -m bench.zoo [name ...]``."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from . import corpus
from .check import problems, same
from .entry import Entry, stacks, tensors


@dataclass
class Row:
    """What one entry measured."""

    params: int = 0
    blocks: int = 0
    milliseconds: float = 0.0
    magnitude: float = 0.0
    captured: str = ""
    nodes: int = 0
    identical: str = ""
    problems: str = ""


def agreement(captured: nn.Module, model: nn.Module, entry: Entry) -> str:
    """Say whether a captured module equals its model, on the call it was captured with and on another."""
    for seed in (0, 1):
        args, kwargs = entry.inputs(seed)
        result, reference = captured(*args, **kwargs), model(*args, **kwargs)
        if not same(result, reference):
            gap = max(float((x - y).abs().max()) for x, y in zip(tensors(result), tensors(reference), strict=True))
            return f"no, {gap:.1e} with seed {seed}"
    return "yes"


def measure(entry: Entry) -> Row:
    """Build one entry, run it, perturb its blocks and export it."""
    row = Row()
    model = entry.build()
    args, kwargs = entry.inputs(0)
    row.params = sum(p.numel() for p in model.parameters())
    row.blocks = sum(len(items) for items in stacks(model).values())
    found = problems(entry, model, (args, kwargs))
    reference = model(*args, **kwargs)
    if not same(reference, entry.build()(*args, **kwargs)):
        found.append("another build differs")
    start = time.perf_counter()
    model(*args, **kwargs)
    row.milliseconds = 1000 * (time.perf_counter() - start)
    row.magnitude = max(float(t.float().abs().max()) for t in tensors(reference))
    try:
        program = torch.export.export(model, args, kwargs, strict=False).run_decompositions({})
        row.nodes = len(program.graph.nodes)
        row.captured = "yes"
        row.identical = agreement(program.module(), model, entry)
    except Exception as error:
        row.captured = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:110] if str(error) else ''}"
    row.problems = "; ".join(found)
    if bool(entry.known_limits) != (row.identical != "yes"):
        row.problems += f" known_limits says: {entry.known_limits!r}"
    return row


def main(names: list[str]) -> None:
    """Print the table of the named entries, or of all."""
    captured = identical = total = 0
    columns = ["name", "params", "blocks", "ms", "max|out|", "captured", "nodes", "bit-identical?", "problems"]
    table = Table(*columns, title=f"torch {torch.__version__}")
    console = Console()
    torch.set_num_threads(1)
    for name, entry in corpus().items():
        if names and name not in names:
            continue
        try:
            with torch.no_grad():
                row = measure(entry)
        except Exception as error:
            row = Row(problems=f"{type(error).__name__}: {error}")
        total, captured, identical = total + 1, captured + (row.captured == "yes"), identical + (row.identical == "yes")
        cells = (f"{row.params:,}", str(row.blocks), f"{row.milliseconds:.0f}", f"{row.magnitude:.2g}", row.captured)
        table.add_row(name, *cells, str(row.nodes), row.identical, row.problems)
        print(f"{name}: {row.captured or row.problems}", file=sys.stderr, flush=True)
    console.print(table)
    console.print(f"{total} entries, {captured} captured by export, {identical} of them bit-identical to eager")


if __name__ == "__main__":
    main(sys.argv[1:])
