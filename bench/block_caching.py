"""Block Caching as in Table 1 of its paper: `python -m bench.block_caching [--models NAME ...] [--samples N]`.

Wimbauer et al., CVPR 2024: the model as it is, in fewer steps at the same cost, with cached blocks, and with cached
blocks whose outputs are scaled and shifted; two samplers, 20 and 50 steps. The threshold delta is the one that comes
nearest to the paper's speed-ups where the model's transformer blocks are large enough for them. Scale and shift are
fitted in closed form, and trained as published within a cap of iterations. FLOPs as executed.
--stage timing: latency of a generation of ten images, all rows of a configuration in turn in one run; leave the machine
alone meanwhile. Writes `bench/results/block_caching.json` and `block_caching.md`. An interrupted run goes on: rows of
the same samples, data type and weights are kept, and what was drawn of others lies in the folder --work.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench.method_runs import Record, Runs, read_json, write_json
from bench.method_settings import UNCACHED, Setting
from diffcache_fx import Blocks, CacheSchedule, Modules, RecordingDenoiser, schedules
from diffcache_fx.alignment import fit_scale_shift, train_scale_shift
from diffcache_fx.demo.demo import Demo
from diffcache_fx.fitting import block_plan
from diffcache_fx.measure import interleaved
from diffcache_fx.models import DEMOS, load_demo
from diffcache_fx.provenance import hash_of_weights
from diffcache_fx.selection import Selection

FOLDER = Path(__file__).parent
WORK, RESULTS = FOLDER / "work" / "block_caching", FOLDER / "results"
SAMPLERS = ("DDIM or Euler", "DPM-Solver++(2M)")
STEPS = (20, 50)
# The transformer blocks, as in the paper: there ResNet blocks were not worth caching.
BLOCKS: dict[str, Selection] = {"digits": Blocks(first=0, each=True), "digit-pairs": Modules(("*.attentions.*",))}
# Speed-ups, by model and steps: those of the paper; attention is 42 % of the second model, so that 1.73 is its limit.
WANTED = {"digits": {20: 1.65, 50: 1.83}, "digit-pairs": {20: 1.3, 50: 1.4}}
PAPER = {  # Table 1, LDM-512: FID of the four rows, speed-up of the last three
    ("DPM", 20): ((17.15, 18.67, 17.58, 15.95), (1.43, 1.68, 1.65)),
    ("DDIM", 20): ((17.43, 17.11, 16.52, 16.02), (1.43, 1.60, 1.58)),
    ("DPM", 50): ((17.44, 17.21, 17.23, 15.18), (1.67, 1.85, 1.82)),
    ("DDIM", 50): ((17.76, 17.42, 16.65, 15.15), (1.67, 1.82, 1.79)),
}
FITTED_ON, TRAINED_ON = 32, 8  # samples of a batch
SEED = 11  # that no scored image has
ROWS = ("base", "fewer steps", "cache", "cache, scale-shift in closed form", "cache, scale-shift trained")
console = Console(stderr=True)


@dataclass
class Configuration:
    """One model under one sampler in one number of steps."""

    model: str
    sampler: str
    steps: int
    options: argparse.Namespace

    @cached_property
    def demo(self) -> Demo:
        """In float32, to measure and to fit."""
        return load_demo(self.model)

    @cached_property
    def runs(self) -> Runs:
        sampler = "ddim" if self.sampler == SAMPLERS[0] else "dpm"
        work = self.options.work / f"{self.model}-{sampler}-{self.steps}"
        dtype = getattr(torch, self.options.dtype)
        made = Runs(work, self.options.samples, self.steps, self.options.batch, dtype, model=self.model)
        made.compared = self.base
        return made

    @property
    def base(self) -> Setting:
        return Setting(UNCACHED, f"{self.steps} steps", steps=self.steps, reference=True, sampler=self.sampler)

    def sampling(self, images: int) -> Callable[[Any, int], torch.Tensor]:
        def sample(denoiser: Any, seed: int) -> torch.Tensor:
            labels = torch.randint(self.demo.num_classes, (images,), generator=torch.Generator().manual_seed(seed))
            scheduler = self.runs.scheduler(self.base)
            return self.demo.draw(
                denoiser, labels, scheduler=scheduler, num_steps=self.steps, seed=SEED + seed, batch_size=images
            )

        return sample

    @cached_property
    def recording(self) -> Any:
        recorder = RecordingDenoiser(self.demo.model, [(BLOCKS[self.model], "residual")], backend="eager")
        self.sampling(FITTED_ON)(recorder, 0)
        return recorder.recording()

    def plan(self, wanted: float) -> tuple[float, tuple[tuple[int, ...], ...]]:
        """The threshold whose plan comes nearest to a speed-up, and the plan."""
        record, saved = self.recording, sum(region.flops for region in self.recording.regions)
        shares = [region.flops / saved for region in record.regions]

        def speedup(bits: tuple[tuple[int, ...], ...]) -> float:
            computed = sum(share * bit for row in bits for share, bit in zip(shares, row, strict=True))
            return record.full_flops * self.steps / (record.full_flops * self.steps - saved * (self.steps - computed))

        grid = [0.01 * n for n in range(2, 101)]
        delta = min(grid, key=lambda value: abs(speedup(block_plan(record, value)) - wanted))
        return delta, block_plan(record, delta)

    @cached_property
    def fits(self) -> dict[str, Any]:
        """delta, the three schedules, and what it took to fit them; made once and kept."""
        path = self.runs.work / "fits.json"
        made_for = {"wanted": WANTED[self.model][self.steps], "iterations": self.options.iterations, "seed": SEED}
        known = read_json(path)
        if known.get("made_for") != made_for:
            delta, bits = self.plan(made_for["wanted"])
            plain = schedules.block_cache(bits, regions=BLOCKS[self.model])
            console.print(f"{self.title}: delta {delta:.2f}; fitting", highlight=False)
            closed = fit_scale_shift(self.demo.model, self.sampling(FITTED_ON), plain)
            iterations = self.options.iterations
            trained = train_scale_shift(self.demo.model, self.sampling(TRAINED_ON), plain, iterations=iterations)
            found = zip(ROWS[2:], (plain, closed, trained), strict=True)
            made = {name: schedule.to_dict() for name, schedule in found}
            write_json(path, {"made_for": made_for, "delta": delta, "schedules": made})
            known = read_json(path)
        return known

    @property
    def title(self) -> str:
        return f"{self.model}, {self.sampler}, {self.steps} steps"

    def settings(self) -> dict[str, Setting]:
        """By row; fewer steps once the cache's speed-up is known."""
        made = {ROWS[0]: self.base}
        for name in ROWS[2:]:
            schedule = CacheSchedule.from_dict(self.fits["schedules"][name])
            made[name] = Setting("block_cache", name, given=schedule, sampler=self.sampler, decide="graph")
        return made

    def rows(self) -> list[Record]:
        """Draw and score all rows."""
        settings = self.settings()
        found = {name: self._row(name, setting) for name, setting in settings.items()}
        steps = round(self.steps / found["cache"]["ideal_speedup"])
        fewer = Setting(UNCACHED, f"{steps} steps", steps=steps, sampler=self.sampler)
        found[ROWS[1]] = self._row(ROWS[1], fewer)
        settings[ROWS[1]] = fewer
        if self.options.stage == "timing":
            for name, numbers in self.latencies(settings).items():
                found[name] |= numbers
        return [{**self.facts(), **found[name]} for name in ROWS]

    def _row(self, name: str, setting: Setting) -> Record:
        record = self.runs.quality(setting)
        if "quality" not in record:
            raise RuntimeError(f"{self.title}: {name}: {record['not_applicable']}")
        console.print(f"{self.title}: {name}: {cell(record)}", highlight=False)
        return {"row": name, "used": self.runs.calls(setting), **{k: record[k] for k in ("ideal_speedup", "quality")}}

    @property
    def made_for(self) -> Record:
        """What rows must have been made for to be kept."""
        found = {name: getattr(self.options, name) for name in ("samples", "iterations", "dtype")}
        return found | {"weights": hash_of_weights(self.demo.model)}

    def kept(self, known: dict[str, Record]) -> bool:
        """Whether rows by name need not be made again."""
        whole = all(known.get(name, {}).get("made_for") == self.made_for for name in ROWS)
        return whole and (self.options.stage == "quality" or all("speedup" in known[name] for name in ROWS))

    def facts(self) -> Record:
        bits = self.fits["schedules"]["cache"]["rules"][0]["guard"]["bits"]
        return {
            "model": self.model,
            "sampler": self.sampler,
            "steps": self.steps,
            "delta": round(self.fits["delta"], 2),
            "distinct_rows": len({tuple(row) for row in bits}),
            "made_for": self.made_for,
        }

    def latencies(self, settings: dict[str, Setting]) -> dict[str, Record]:
        """Generations of ten images, in turn: the median speed-up over the base, and its spread."""
        path, images, rounds = self.runs.work / "timing.json", 10, self.options.rounds
        known = read_json(path)
        if known.get("rounds") != rounds:
            torch._dynamo.reset()
            denoisers = {name: self.runs.denoiser(setting, images) for name, setting in settings.items()}

            def generation(name: str) -> Callable[[], Any]:
                return lambda: self.runs.draw(denoisers[name], settings[name], 0, images)

            found = interleaved({name: generation(name) for name in settings}, rounds=rounds, warmup=1)
            seconds = {name: [float(second) for second in values] for name, values in found.seconds.items()}
            known = {"rounds": rounds, "seconds": seconds, "threads": torch.get_num_threads()}
            write_json(path, known)
        taken = {name: torch.tensor(values) for name, values in known["seconds"].items()}
        base = taken[ROWS[0]]
        numbers = {}
        for name, values in taken.items():
            low, middle, high = (base / values).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
            numbers[name] = {"speedup": float(base.median() / values.median()), "ratios": [low, middle, high]}
        return numbers


def cell(row: Record) -> str:
    """A row's figures in words."""
    quality = row["quality"]
    distance = quality["frechet"]
    text = f"{distance['value']:.2f} [{distance['low']:.2f}, {distance['high']:.2f}], {row['ideal_speedup']:.2f}x"
    text += f" ({row['speedup']:.2f}x)" if "speedup" in row else ""
    psnr = f", {quality['psnr_db']['value']:.1f} dB" if "psnr_db" in quality else ""
    return f"{text}{psnr}, {100 * quality['accuracy']['value']:.1f} %"


def markdown(data: Record) -> str:
    """The tables, and where they differ from the paper's."""
    head = (
        "Fréchet distance in classifier features [95 %], speed-up by executed FLOPs (measured), PSNR to the base, read"
    )
    lines = ["# Block Caching, as Table 1 of its paper", "", f"{head} as asked.", ""]
    lines += ["| | " + " | ".join(ROWS) + " |", "|" + "---|" * (len(ROWS) + 1)]
    for (model, sampler, steps), rows in grouped(data["rows"]).items():
        facts = next(iter(rows.values()))
        title = f"{model}, {sampler}, {steps} steps, delta {facts['delta']}, {facts['distinct_rows']} distinct rows"
        title += ", {samples} samples in {dtype}".format(**facts["made_for"])
        cells = [f"{rows[name]['used']} steps: " * (name == ROWS[1]) + cell(rows[name]) for name in ROWS]
        lines.append("| " + " | ".join([title, *cells]) + " |")
    lines += [
        "",
        "The paper's (FID, speed-up), LDM-512:",
        "",
        "| | " + " | ".join([*ROWS[:3], "cache, scale-shift"]) + " |",
    ]
    lines.append("|" + "---|" * 5)
    for (sampler, steps), (distances, speeds) in PAPER.items():
        cells = [f"{d:.2f}" + (f", {s:.2f}x" if s else "") for d, s in zip(distances, (0.0, *speeds), strict=True)]
        lines.append("| " + " | ".join([f"{sampler} {steps}", *cells]) + " |")
    return "\n".join([*lines, "", *gaps(data["rows"])]) + "\n"


def grouped(rows: list[Record]) -> dict[tuple[str, str, int], dict[str, Record]]:
    """Rows by configuration and name."""
    found: dict[tuple[str, str, int], dict[str, Record]] = {}
    for row in rows:
        found.setdefault((row["model"], row["sampler"], row["steps"]), {})[row["row"]] = row
    return found


def gaps(rows: list[Record]) -> list[str]:
    """What the paper's table says and this one does not, or the other way round."""
    lines = []
    for (model, sampler, steps), found in grouped(rows).items():
        paper = PAPER["DDIM" if sampler == SAMPLERS[0] else "DPM", steps][0]
        values = [found[name]["quality"]["frechet"]["value"] for name in (*ROWS[:3], ROWS[4])]
        for first, second in ((2, 1), (3, 2), (3, 0)):
            there, here = paper[first] < paper[second], values[first] < values[second]
            if there != here:
                names = [(*ROWS[:3], "cache, scale-shift trained")[i] for i in (first, second)]
                word = "below" if there else "not below"
                lines.append(
                    f"- {model}, {sampler}, {steps} steps: in the paper {names[0]} is {word} {names[1]} "
                    f"({paper[first]} to {paper[second]}), here it is {values[first]:.2f} to {values[second]:.2f}."
                )
    return ["Where a row does not come out as in the paper:", "", *(lines or ["nowhere."])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(DEMOS), choices=list(DEMOS))
    parser.add_argument("--stage", choices=("quality", "timing"), default="quality", help="timing: both")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--iterations", type=int, default=300, help="updates that train scale and shift, of batch 8")
    parser.add_argument("--steps", type=int, nargs="+", default=STEPS, choices=STEPS)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--out", type=Path, default=RESULTS / "block_caching.json")
    options = parser.parse_args()
    rows = grouped(read_json(options.out).get("rows", []))
    for steps in options.steps:  # the cheap half first
        for model in options.models:
            for sampler in SAMPLERS:
                made, known = Configuration(model, sampler, steps, options), rows.get((model, sampler, steps), {})
                if not made.kept(known):
                    rows[model, sampler, steps] = {row["row"]: row for row in made.rows()}
                    write_json(options.out, {"rows": [row for found in rows.values() for row in found.values()]})
    text = markdown(read_json(options.out))
    options.out.with_suffix(".md").write_text(text)
    Console(width=None if sys.stdout.isatty() else 200).print(text, markup=False, highlight=False)


if __name__ == "__main__":
    main()
