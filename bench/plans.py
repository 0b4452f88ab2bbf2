"""The calibrated plan against the published methods: `python -m bench.plans [--samples N]`.

The demo model is calibrated on a batch of its own, planned for several budgets, and scored like every method in
`bench.methods`: the same 1,000 noises, classes, steps and dtype, PSNR and SSIM to the same uncached images. Beside each
plan stand the methods of `bench/results/methods.json` that spend as many FLOPs or up to a tenth more, best first, and
fewer steps of the uncached model. Writes `bench/results/plans.json` and `plans.md`; goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from bench.method_runs import Record, Runs, read_json, write_json
from bench.method_settings import Setting, uncached
from diffcache_fx import Calibration, Rows, __version__

FOLDER = Path(__file__).parent
WORK, RESULTS = FOLDER / "work" / "plans", FOLDER / "results"
PUBLISHED = RESULTS / "methods.json"
REFRESHES = (34, 24, 17, 11, 7)
CALIBRATED_ON = 11  # a seed that no scored image has
IMAGES = 20
LONGEST = 20
SLACK = 0.9  # of a plan's speed-up: what is compared with it may be so much slower


def plans(runs: Runs) -> dict[int, dict[str, Any]]:
    """By number of refreshes: bits and rows. Measured once and kept."""
    path = runs.work / "plans-calibration.json"
    made_for = {"steps": runs.steps, "dtype": str(runs.dtype), "refreshes": list(REFRESHES), "backend": runs.backend}
    made_for |= {"images": IMAGES, "seed": CALIBRATED_ON, "longest": LONGEST, "version": __version__}
    known = read_json(path)
    if known.get("made_for") != made_for:
        demo, labels = runs.demo, torch.arange(IMAGES) % runs.demo.num_classes

        def sampler(denoiser: Any, seed: int) -> torch.Tensor:
            return demo.draw(denoiser, labels, num_steps=runs.steps, seed=seed, batch_size=IMAGES, dtype=runs.dtype)

        work = Calibration(demo.model, sampler, seed=CALIBRATED_ON, backend=runs.backend, longest=LONGEST)
        found = {count: work.best(count) for count in REFRESHES}
        known = {
            "made_for": made_for,
            "plans": {count: {"bits": plan.bits, "rows": plan.rows} for count, plan in found.items()},
        }
        write_json(path, known)
        known = read_json(path)
    return {int(count): plan for count, plan in known["plans"].items()}


def setting_of(count: int, plan: dict[str, Any]) -> Setting:
    rows = tuple(tuple(row) for row in plan["rows"])
    return Setting("calibrated", f"{count} refreshes", "mask", {"bits": plan["bits"], "forecast": Rows(rows)})


def opponents(record: Record, published: list[Record], count: int = 3) -> list[Record]:
    """The best published settings at least nearly as fast."""
    able = [
        row
        for row in published
        if not row["control"] and "quality" in row and row["ideal_speedup"] >= SLACK * record["ideal_speedup"]
    ]
    by_method: dict[str, Record] = {}
    for row in sorted(able, key=lambda row: -_psnr(row)):
        by_method.setdefault(row["method"], row)
    return list(by_method.values())[:count]


def fewer(record: Record, published: list[Record]) -> Record | None:
    """Of the uncached model in fewer steps, the best that is at least nearly as fast."""
    able = [
        row
        for row in published
        if row["key"].startswith("uncached-")
        and "psnr_db" in row.get("quality", {})
        and row["ideal_speedup"] >= SLACK * record["ideal_speedup"]
    ]
    return max(able, key=_psnr, default=None)


def _psnr(row: Record) -> float:
    return float(row["quality"].get("psnr_db", {}).get("value", float("-inf")))


HEAD = ("", "FLOPs", "PSNR, dB", "SSIM", "read as asked", "Fréchet distance")


def cells(title: str, row: Record) -> list[str]:
    quality = row["quality"]

    def shown(name: str, digits: int, factor: float = 1.0) -> str:
        found = quality[name]
        return " ".join(
            [
                f"{factor * found['value']:.{digits}f}",
                f"[{factor * found['low']:.{digits}f},",
                f"{factor * found['high']:.{digits}f}]",
            ]
        )

    return [
        title,
        f"{row['ideal_speedup']:.2f}x fewer",
        shown("psnr_db", 1),
        shown("ssim", 4),
        shown("accuracy", 1, 100.0) + " %",
        shown("frechet", 2),
    ]


def table_of(records: list[Record], published: list[Record]) -> list[list[str]]:
    found = []
    for record in records:
        found.append(cells(f"calibrated, {record['label']}", record))
        found += [cells(f"{row['method']}, {row['label']}", row) for row in opponents(record, published)]
        control = fewer(record, published)
        if control is not None:
            found.append(cells(f"uncached, {control['label']}", control))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--out", type=Path, default=RESULTS / "plans.json")
    options = parser.parse_args()
    published = json.loads(PUBLISHED.read_text())
    same = {"steps": 50, "batch": 100, "dtype": "bfloat16", "backend": "inductor"}
    if any(published[name] != value for name, value in same.items()) or published["samples"] != options.samples:
        print("methods.json was made under other conditions: its rows are left out", file=sys.stderr)
        published["rows"] = []
    WORK.mkdir(parents=True, exist_ok=True)
    runs = Runs(WORK, options.samples, 50, 100, torch.bfloat16)
    found = plans(runs)
    runs.quality(uncached(runs.steps, runs.steps))
    records = [runs.quality(setting_of(count, found[count])) for count in REFRESHES]
    options.out.write_text(
        json.dumps({"samples": options.samples, **same, "seed": 0, "rows": records, "plans": found}, indent=1) + "\n"
    )
    lines = table_of(records, published["rows"])
    text = ["# The calibrated plan", "", " ".join((__doc__ or "").split("\n\n")[1].split()), ""]
    text += ["| " + " | ".join(HEAD) + " |", "|" + "---|" * len(HEAD)]
    text += ["| " + " | ".join(line) + " |" for line in lines]
    options.out.with_suffix(".md").write_text("\n".join(text) + "\n")
    table = Table()
    for title in HEAD:
        table.add_column(title)
    for line in lines:
        table.add_row(*line)
    Console(width=None if sys.stdout.isatty() else 150).print(table)


if __name__ == "__main__":
    main()
