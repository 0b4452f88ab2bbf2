"""Why cached images come out nearer to real ones, or farther, than uncached ones: `python -m bench.distances`.

After `bench.fidelity`, from the images it keeps (draws what is missing). Tables for one model under one sampler.

Guidance: each method's error (its images less the uncached ones of the same noise), projected on what weaker guidance
does to the uncached images: how many percent of guidance it is worth, how much of the error that is (correlation), and
whether it goes with how much nearer to real images the method is, in Fréchet distance.

Weakened: our plan under slightly weaker guidance, against the published methods at the same budget: what it then keeps
of its PSNR, and which of them it is still shown to be farther than; and against each that is nearer to real images: how
much weaker its guidance has to be to come as near, and how much nearer to the uncached images it then still is.

Writes `bench/results/distances.json` and `distances.md`.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torchmetrics.functional.regression import spearman_corrcoef

from bench.fidelity import OWN, RESULTS, WORK, Study
from bench.fidelity_methods import OURS, contenders
from bench.fidelity_report import groups, verdict
from bench.method_runs import Record, read_json, write_json
from bench.method_settings import UNCACHED, Setting
from bench.quality import Estimate, difference
from diffcache_fx.models import DEMOS

SMALL = 0.95  # the share of guidance that is kept where its direction is measured
SHARES = (0.99, 0.97, 0.96, 0.95, 0.9, 0.85, 0.8)
CLOSE_DB = 25.0  # errors beyond are no longer small, and not along anything
console = Console(stderr=True)


@dataclass
class Errors:
    """Errors of images against the uncached ones, and what of them is weaker guidance. study: what was drawn."""

    study: Study

    def images(self, setting: Setting) -> Tensor:
        """Of all seeds, [N, C, H, W]; drawn where they are not kept."""
        return torch.cat([runs.images(setting).images[: runs.samples] for runs in self.study.runs])

    @cached_property
    def uncached(self) -> Tensor:
        return self.images(self.study.base)

    @cached_property
    def direction(self) -> Tensor:
        """What each percent less of guidance does to the uncached images, [N * C * H * W] float64."""
        label = f"guidance {SMALL:g}"
        weaker = Setting(UNCACHED, label, steps=self.study.steps, sampler=self.study.sampler, guidance=SMALL)
        return (self.images(weaker) - self.uncached).double().flatten() / (100 * (1 - SMALL))

    def of(self, images: Tensor) -> tuple[float, float]:
        """Percent of guidance that images have less, by least squares; and how that correlates with their error."""
        error = (images - self.uncached).double().flatten()
        product, size = float(error @ self.direction), float(self.direction @ self.direction)
        return product / size, product / (size * float(error @ error)) ** 0.5


def guidance_table(study: Study, rows: list[Record]) -> list[Record]:
    """A line for each method at each budget."""
    errors, known = Errors(study), {contender.method: contender for contender in contenders()}
    uncached = next(row for row in rows if row["kind"] == "reference")
    found = []
    for row in rows:
        if row["kind"] not in ("ours", "published") or "quality" not in row:
            continue
        contender, budget = known[row["method"]], row["budget"]
        tuned = study.tuner.tuned(contender, budget)
        percent, correlation = errors.of(errors.images(study.setting(contender, budget, tuned)))
        nearer = difference(*(Estimate.of(each["quality"]["frechet"]) for each in (uncached, row)))
        base = {"method": row["method"], "budget": budget, "psnr_db": row["quality"]["psnr_db"]["value"]}
        found.append(base | {"percent": percent, "correlation": correlation, "nearer": nearer.to_dict()})
        console.print(f"{row['method']}, {budget:g}x: {percent:+.1f} % of guidance, r {correlation:+.2f}")
    return found


def agreement(lines: list[Record]) -> Record:
    """Rank correlation, over methods whose errors are small, of guidance lost and of nearness gained."""
    close = [line for line in lines if line["psnr_db"] >= CLOSE_DB]
    percent = torch.tensor([line["percent"] for line in close])
    nearer = torch.tensor([line["nearer"]["value"] for line in close])
    return {"lines": len(close), "at_least_db": CLOSE_DB, "spearman": float(spearman_corrcoef(percent, nearer))}


def weakened_table(study: Study, rows: list[Record], shares: tuple[float, ...]) -> list[Record]:
    """Our plan at each budget under all of the guidance and under less of it."""
    ours, found = next(contender for contender in contenders() if contender.method == OURS), []
    for budget in sorted({row["budget"] for row in rows if row["kind"] == "ours" and "quality" in row}):
        tuned = study.tuner.tuned(ours, budget)
        others = [row for row in rows if not (row["kind"] == "ours" and row["budget"] == budget)]
        for share in (1.0, *shares):
            label = f"{budget:g}x" + (f", guidance {share:g}" if share != 1 else "")
            setting = study.setting(ours, budget, tuned, label=label, guidance=share)
            row = study.row(setting, budget=budget, kind="ours")
            against = verdict([*others, row], budget)
            assert against is not None
            quality = {name: row["quality"][name]["value"] for name in ("psnr_db", "frechet", "accuracy")}
            kept = {name: against[name] for name in ("best", "gain_db", "gain_by_seed_db", "worse", "surely_worse")}
            found.append({"budget": budget, "share": share, **quality, **kept})
    return found


def as_near(weakened: list[Record], rows: list[Record]) -> list[Record]:
    """Of each published method that is nearer to real images than our plan: the most guidance with which ours is as
    near, and its PSNR over that method's; without these where it is not with any that was tried."""
    found = []
    for row in rows:
        if row["kind"] != "published" or "quality" not in row:
            continue
        quality = {name: row["quality"][name]["value"] for name in ("psnr_db", "frechet")}
        tried = sorted((line for line in weakened if line["budget"] == row["budget"]), key=lambda line: -line["share"])
        if not tried or tried[0]["frechet"] <= quality["frechet"]:
            continue
        reached = next((line for line in tried if line["frechet"] <= quality["frechet"]), None)
        line = {"method": row["method"], "budget": row["budget"], **quality}
        if reached is not None:
            line |= {"share": reached["share"], "gain_db": reached["psnr_db"] - quality["psnr_db"]}
        found.append(line)
    return found


def markdown(data: Record) -> str:
    lines = ["# Why Fréchet distances of cached images differ", ""]
    for name, entry in data.items():
        lines += [f"## {name}", "", *_guidance_lines(entry["guidance"], entry["agreement"]), ""]
        lines += [*_weakened_lines(entry["weakened"]), "", *_near_lines(entry["as_near"]), ""]
    return "\n".join(lines).rstrip() + "\n"


def _guidance_lines(found: list[Record], agreed: Record) -> list[str]:
    lines = [
        "Weaker guidance: percent of the guidance scale above 1 that a method's error amounts to, by projection on "
        "what less of it does to the uncached images; how that correlates with the error; how much nearer to real "
        "digits than the uncached images the method's are. Rank correlation of the first and the last over the "
        f"{agreed['lines']} lines of at least {agreed['at_least_db']:g} dB: {agreed['spearman']:+.2f}.",
        "",
        "| method | budget | PSNR, dB | weaker guidance | correlation | nearer to real digits |",
        "|---|---|---|---|---|---|",
    ]
    for line in sorted(found, key=lambda line: (line["budget"], -line["percent"])):
        near = line["nearer"]
        told = f"{near['value']:+.3f} [{near['low']:+.3f}, {near['high']:+.3f}]"
        head = f"| {line['method']} | {line['budget']:g}x | {line['psnr_db']:.1f} | {line['percent']:+.1f} % |"
        lines.append(f"{head} {line['correlation']:+.2f} | {told} |")
    return lines


def _weakened_lines(found: list[Record]) -> list[str]:
    lines = [
        "Our plan with less guidance, against the published methods at the same budget; farther: those that it is "
        "shown to be farther from real digits than, each as if it alone were looked at.",
        "",
        "| budget | guidance kept | PSNR, dB | over the best published | by seed | Fréchet distance | farther |",
        "|---|---|---|---|---|---|---|",
    ]
    for line in found:
        seeds = ", ".join(f"{gain:+.2f}" for gain in line["gain_by_seed_db"])
        head = f"| {line['budget']:g}x | {100 * line['share']:g} % | {line['psnr_db']:.2f} |"
        told = f"{head} {line['gain_db']:+.2f} dB ({line['best']}) | {seeds} | {line['frechet']:.2f} |"
        lines.append(f"{told} {', '.join(line['worse']) or 'none'} |")
    return lines


def _near_lines(found: list[Record]) -> list[str]:
    lines = [
        "Each published method that is nearer to real digits than our plan: with how much of the guidance ours is as "
        "near, and how much nearer to the uncached images it is then.",
        "",
        "| budget | method | PSNR, dB | Fréchet distance | guidance kept by ours | over its PSNR |",
        "|---|---|---|---|---|---|",
    ]
    for line in sorted(found, key=lambda line: (line["budget"], -line["psnr_db"])):
        ours = f"{100 * line['share']:g} % | {line['gain_db']:+.2f} dB" if "share" in line else "not reached | -"
        head = f"| {line['budget']:g}x | {line['method']} | {line['psnr_db']:.2f} | {line['frechet']:.2f} |"
        lines.append(f"{head} {ours} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="digits", choices=list(DEMOS))
    parser.add_argument("--sampler", default=OWN)
    parser.add_argument("--shares", type=float, nargs="*", default=SHARES, help="of guidance, for our plan")
    parser.add_argument("--batch", type=int, default=125, help="as in bench.fidelity")
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--fidelity", type=Path, default=RESULTS / "fidelity.json")
    parser.add_argument("--out", type=Path, default=RESULTS / "distances.json")
    options: Any = parser.parse_args()
    rows = groups(read_json(options.fidelity)).get((options.model, options.sampler))
    if rows is None:
        parser.error(f"{options.fidelity} has no rows of {options.model} under {options.sampler}: run bench.fidelity")
    made_for = rows[0]["made_for"]  # the same samples, so that images are those the rows were scored on
    for name in ("samples", "seeds", "steps", "dtype"):
        setattr(options, name, made_for[name])
    options.measures = {}
    study = Study(options.model, options.sampler, options)
    lines = guidance_table(study, rows)
    entry: Record = {"guidance": lines, "agreement": agreement(lines)}
    entry["weakened"] = weakened_table(study, rows, tuple(options.shares))
    entry["as_near"] = as_near(entry["weakened"], rows)
    data = read_json(options.out) | {f"{options.model}, {options.sampler}": entry}
    write_json(options.out, data)
    options.out.with_suffix(".md").write_text(markdown(data))
    Console(width=170).print(markdown(data), markup=False, highlight=False)


if __name__ == "__main__":
    main()
