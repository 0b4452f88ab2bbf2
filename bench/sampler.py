"""Samplers at equal numbers of model calls: `python -m bench.sampler [--models NAME ...] [--samples N]`.

On a Gaussian mixture with exact scores: mean distance to a fine solution from the same noise. On the demo models:
Fréchet distance in classifier features against real digits, accuracy, and PSNR to the images of a fine solution (160
calls) from the same noise. Writes `bench/results/sampler.json` and `sampler.md`. An interrupted run goes on: rows of
the same samples, data type and weights are kept, and what was drawn of others lies in the folder --work.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench import mixture
from bench.method_runs import Record, Runs, read_json, write_json
from bench.method_settings import Setting
from bench.samplers import SAMPLERS, steps_for
from diffcache_fx.models import DEMOS
from diffcache_fx.provenance import hash_of_weights

FOLDER = Path(__file__).parent
WORK, RESULTS = FOLDER / "work" / "sampler", FOLDER / "results"
CALLS = [10, 20, 40, 80]
FINE = ("Lagrange(3, 2)", 160)
console = Console(stderr=True)


def setting_of(name: str, calls: int, own: Any, reference: bool = False) -> Setting:
    """The uncached model under a sampler that calls it at most so often."""
    steps = steps_for(SAMPLERS[name], own, calls)
    return Setting("uncached", f"{name}, {calls} calls", steps=steps, sampler=name, reference=reference)


def demo_rows(runs: Runs, calls: list[int], known: list[Record]) -> Iterator[list[Record]]:
    """Draw and score a demo under every sampler; the rows so far, after each. known: rows that need not be drawn."""
    own, rows = runs.demo.scheduler(), list(known)
    made = {(row["sampler"], row["calls"]) for row in known}
    runs.compared = setting_of(*FINE, own, reference=True)
    for count in calls:  # few calls first: what is interrupted is whole as far as it goes
        for name in SAMPLERS:
            if (name, count) in made:
                continue
            setting = setting_of(name, count, own)
            record = runs.quality(setting)
            rows.append({"sampler": name, "calls": count, "used": runs.calls(setting), "quality": record["quality"]})
            console.print(f"{runs.model}: {setting.label}: {_cell(rows[-1])}", highlight=False)
            yield rows


def _cell(row: Record) -> str:
    quality = row["quality"]
    distance = quality["frechet"]
    return (
        f"{distance['value']:.2f} [{distance['low']:.2f}, {distance['high']:.2f}], "
        f"{quality['psnr_db']['value']:.1f} dB, {100 * quality['accuracy']['value']:.1f} %"
    )


def markdown(data: Record) -> str:
    """The tables."""
    lines = ["# Samplers at equal numbers of model calls", "", " ".join((__doc__ or "").split("\n\n")[1].split()), ""]
    calls = data["calls"]
    head = ["sampler", *(f"{count} calls" for count in calls)]
    rule = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["## Gaussian mixture: mean distance to the solution", "", *rule]
    for name, found in data["mixture"].items():
        lines.append("| " + " | ".join([name, *(f"{found[str(count)]['error']:.2e}" for count in calls)]) + " |")
    for model, found in data["demos"].items():
        rows, told = found["rows"], "{samples} samples, {dtype}".format(**found["made_for"])
        title = f"## {model}: Fréchet distance [95 %], PSNR to the solution, read as asked; {told}"
        lines += ["", title, "", *rule]
        known = {(row["sampler"], row["calls"]): _cell(row) for row in rows}
        for name in SAMPLERS:
            lines.append("| " + " | ".join([name, *(known.get((name, count), "-") for count in calls)]) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(DEMOS), choices=list(DEMOS))
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--calls", type=int, nargs="+", default=CALLS)
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--out", type=Path, default=RESULTS / "sampler.json")
    options = parser.parse_args()
    data: Record = {"calls": options.calls, "mixture": mixture.errors(SAMPLERS, steps_for, options.calls)}
    data["demos"] = read_json(options.out).get("demos", {})
    for model in options.models:
        dtype = getattr(torch, options.dtype)
        runs = Runs(options.work / model, options.samples, 50, options.batch, dtype, model=model)
        made_for = {"samples": options.samples, "dtype": options.dtype, "seed": runs.seed}
        made_for["weights"] = hash_of_weights(runs.demo.model)
        known = data["demos"].get(model, {})
        kept = known["rows"] if known.get("made_for") == made_for else []
        for rows in demo_rows(runs, options.calls, kept):
            data["demos"][model] = {"made_for": made_for, "rows": rows}
            write_json(options.out, data)
    write_json(options.out, data)
    text = markdown(read_json(options.out))
    options.out.with_suffix(".md").write_text(text)
    Console(width=None if sys.stdout.isatty() else 200).print(text, markup=False, highlight=False)


if __name__ == "__main__":
    main()
