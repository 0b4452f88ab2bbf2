"""The results of `bench.fidelity`: at each budget the methods in order, ours against the best of the others, plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np

from bench.fidelity_methods import contenders
from bench.method_runs import Record
from bench.perceptual import MEASURES
from bench.quality import Estimate, difference, probability_of_none, shown_of_many

KINDS = ("ours", "published", "control")
MARGIN = 0.5  # dB that ours is to be better by
HEAD = (
    "",
    "FLOPs",
    "PSNR, dB",
    "by seed",
    "SSIM",
    "read as asked",
    "Fréchet distance",
    "by seed",
    "precision",
    "recall",
)


def groups(data: Record) -> dict[tuple[str, str], list[Record]]:
    """Rows by model and sampler."""
    found: dict[tuple[str, str], list[Record]] = {}
    for row in data["rows"]:
        found.setdefault((row["model"], row["sampler"]), []).append(row)
    return found


def verdict(rows: list[Record], budget: float) -> Record | None:
    """Ours at a budget against the best published method there, by PSNR: dB, by seed too; how much farther from real
    images it is than the uncached ones, that method's and the least of all published ones', with intervals; and all
    that it is shown to be farther than, one by one and with so many looked at. None where ours or all others are
    missing."""
    here = [row for row in rows if row["budget"] == budget and "quality" in row]
    ours = next((row for row in here if row["kind"] == "ours"), None)
    others = [row for row in here if row["kind"] == "published"]
    if ours is None or not others:
        return None
    best = max(others, key=_psnr)
    nearest = min(others, key=_frechet)
    uncached = next(row for row in rows if row["kind"] == "reference")
    gains = [a["psnr_db"] - b["psnr_db"] for a, b in zip(ours["seeds"], best["seeds"], strict=True)]
    farther = [_farther(ours, row) for row in (uncached, best, nearest)]
    every = {row["method"]: _farther(ours, row) for row in (uncached, *others)}
    surely = shown_of_many([probability_of_none(far) for far in every.values()])
    return {
        "budget": budget,
        "best": best["method"],
        "gain_db": _psnr(ours) - _psnr(best),
        "gain_by_seed_db": gains,
        "met": _psnr(ours) - _psnr(best) >= MARGIN,
        "frechet": _frechet(ours),
        "nearest": nearest["method"],
        "farther": farther,
        "worse": [method for method, far in every.items() if far.low > 0],
        "surely_worse": [m for (m, far), sure in zip(every.items(), surely, strict=True) if sure and far.value > 0],
        "flops": [ours["ideal_speedup"], best["ideal_speedup"]],
    }


def _farther(row: Record, other: Record) -> Estimate:
    return difference(*(Estimate.of(each["quality"]["frechet"]) for each in (row, other)))


def _psnr(row: Record) -> float:
    """Minus infinity for a control of another solver."""
    return float(row["quality"].get("psnr_db", {}).get("value", float("-inf")))


def _frechet(row: Record) -> float:
    return float(row["quality"]["frechet"]["value"])


def markdown(data: Record) -> str:
    """The tables."""
    lines = [
        "# Quality against compute",
        "",
        "Budgets are fewer executed FLOPs; each method's setting is the one nearest to the budget. PSNR and SSIM: to "
        "the uncached images of the same noise. Fréchet distance, precision, recall: in classifier features, to real "
        "digits. Brackets: 95 % bootstrap intervals; those of differences draw the same images of both. Farther: our "
        "Fréchet distance less that of the uncached images, of the best published method by PSNR, and of the published "
        "method with the least distance. All that ours is shown to be farther than are named: each as if it alone were "
        "looked at, and those that remain with all of them looked at (Holm's correction).",
        "",
    ]
    for (model, sampler), rows in groups(data).items():
        budgets = sorted({row["budget"] for row in rows if row["budget"] > 1})
        lines += [f"## {model}, {sampler}", ""]
        reference = next(row for row in rows if row["kind"] == "reference")
        told = "{samples} samples from {seeds} seeds, {steps} steps, {dtype}".format(**reference["made_for"])
        lines += [f"{told}. Uncached: Fréchet distance {_frechet(reference):.2f}.", ""]
        lines += [*_verdicts(rows, budgets), ""]
        for budget in budgets:
            more = [name for name in MEASURES if any(name in row.get("quality", {}) for row in rows)]
            head = [*HEAD, *more]
            lines += [f"### {budget:g}x", "", "| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
            every = [row for row in rows if row["budget"] == budget and "quality" in row]
            here = [row for row in every if row["kind"] != "off budget"]
            lines += ["| " + " | ".join(cells(row, more)) + " |" for row in sorted(here, key=_psnr, reverse=True)]
            off = [f"{r['method']} ({r['ideal_speedup']:.2f}x)" for r in every if r["kind"] == "off budget"]
            lines += ["", f"Off the budget on these samples, and left out above: {', '.join(off)}."] if off else []
            far = [row for row in rows if row["budget"] == budget and row["kind"] == "out of reach"]
            if far:
                told = [f"{row['method']} (nearest {row['nearest']:.2f}x)" for row in far]
                lines += ["", f"Out of reach: {', '.join(told)}."]
            lines.append("")
        missing = [each.method for each in contenders() if not any(row["method"] == each.method for row in rows)]
        lines += [f"Not run here: {', '.join(missing)}.", ""] if missing else []
        why = {row["method"]: row["why"] for row in rows if row["kind"] == "not applicable"}
        lines += [f"- {method} does not apply: {text}" for method, text in why.items()]
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


def _verdicts(rows: list[Record], budgets: list[float]) -> list[str]:
    head = ["budget", "best published", "ours over it, dB", "by seed", "0.5 dB", "distance"]
    head += [
        "farther than uncached",
        "than the best",
        "than the nearest",
        "shown to be farther than",
        "of all looked at",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for budget in budgets:
        found = verdict(rows, budget)
        if found is None:
            continue
        seeds = ", ".join(f"{gain:+.2f}" for gain in found["gain_by_seed_db"])
        told = [f"{far.value:+.2f} [{far.low:+.2f}, {far.high:+.2f}]" for far in found["farther"]]
        cells = [f"{budget:g}x", found["best"], f"{found['gain_db']:+.2f}", seeds, "met" if found["met"] else "MISSED"]
        cells += [f"{found['frechet']:.2f}", *told[:2], f"{told[2]} ({found['nearest']})"]
        cells += [", ".join(found[name]) or "none" for name in ("worse", "surely_worse")]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def cells(row: Record, more: Sequence[str] = ()) -> list[str]:
    """One line of a table. more: measures with weights of their own."""
    quality = row["quality"]

    def shown(name: str, digits: int, factor: float = 1.0) -> str:
        if name not in quality:
            return "-"
        value, low, high = (factor * quality[name][part] for part in ("value", "low", "high"))
        return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"

    def by_seed(name: str) -> str:
        return ", ".join(f"{seed[name]:.2f}" for seed in row["seeds"] if name in seed) or "-"

    title = row["method"] + (f", {row['label']}" if row["kind"] == "control" and "steps" in row["label"] else "")
    title = f"**{title}**" if row["kind"] == "ours" else title
    return [
        title,
        f"{row['ideal_speedup']:.2f}x fewer",
        shown("psnr_db", 2),
        by_seed("psnr_db"),
        shown("ssim", 4),
        shown("accuracy", 1, 100.0) + " %",
        shown("frechet", 2),
        by_seed("frechet"),
        shown("precision", 3),
        shown("recall", 3),
        *(shown(name, 3) for name in more),
    ]


def pictures(data: Record, folder: Path) -> list[Path]:
    """One plot of each model and sampler: PSNR and Fréchet distance against executed FLOPs. Returns the files."""
    mpl.use("Agg")
    from matplotlib import pyplot

    made = []
    for (model, sampler), rows in groups(data).items():
        figure, axes = pyplot.subplots(1, 2, figsize=(13, 5.5), layout="constrained")
        drawn: dict[str, list[Record]] = {}
        for row in rows:
            if "quality" in row and row["kind"] != "reference":
                drawn.setdefault(row["method"], []).append(row)
        colours = mpl.colormaps["tab20"](np.linspace(0, 1, max(len(drawn), 1)))
        for (method, points), colour in zip(drawn.items(), colours, strict=True):
            points.sort(key=lambda row: row["ideal_speedup"])
            kind = points[0]["kind"]
            style: dict[str, Any] = {"color": colour, "lw": 1.0, "marker": ".", "label": method}
            style |= {"color": "black", "lw": 2.5, "zorder": 5} if kind == "ours" else {}
            style |= {"linestyle": "--", "color": "grey"} if kind == "control" else {}
            x = [row["ideal_speedup"] for row in points]
            if all("psnr_db" in row["quality"] for row in points):
                axes[0].plot(x, [_psnr(row) for row in points], **style)
            axes[1].plot(x, [_frechet(row) for row in points], **style)
        axes[0].set_ylabel("PSNR to the uncached images, dB")
        axes[1].set_ylabel("Fréchet distance in classifier features")
        axes[1].set_yscale("log")
        for axis in axes:
            axis.set_xlabel("uncached FLOPs over executed FLOPs")
            axis.grid(alpha=0.3)
        axes[1].legend(fontsize=6, ncols=2)
        figure.suptitle(f"{model}, {sampler}")
        name = f"fidelity-{model}-{''.join(c for c in sampler.lower() if c.isalnum())}.png"
        figure.savefig(folder / name, dpi=110)
        pyplot.close(figure)
        made.append(folder / name)
    return made
