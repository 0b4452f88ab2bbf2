"""Quality against compute, every method at equal budgets: `python -m bench.fidelity [--models NAME ...]`.

On the demo models, each method is tuned to the budgets that it can reach (1.5x to 5x fewer executed FLOPs) and draws
the same samples as the uncached model in all steps, from three seeds. Controls: the model's own sampler,
DPM-Solver++(2M) and UniPC, uncached, in as many steps as the budget pays for, and the trunk held at even intervals.
Measures: PSNR and SSIM to the uncached images of the same noise; accuracy; Fréchet distance, precision and recall in
classifier features against real digits. Writes `bench/results/fidelity.json`, `fidelity.md` and a plot of each model.
It goes on where it was interrupted: rows of the same samples, steps, data type and weights are kept (not those of the
methods after --redo), and what was drawn of others lies in the folder --work. 10,000 samples: `--samples 10000`, for
larger machines. In float32: rounding to bfloat16 alone is as far from the uncached images as a plan at 2x.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench import perceptual
from bench.fidelity_methods import OURS, REACHED, Contender, Tuned, Tuner, chosen
from bench.fidelity_report import markdown, pictures
from bench.method_runs import Record, Runs, plain, read_json, write_json
from bench.method_settings import NOT_APPLICABLE, UNCACHED, Setting
from bench.quality import FEATURE_DRAWS, Estimate, FrechetDistance, Neighbourhoods, score
from bench.samplers import SAMPLERS, steps_for
from diffcache_fx import CacheError, CalibrationError
from diffcache_fx.compile import Options
from diffcache_fx.exchange import ExchangeableDenoiser, structure
from diffcache_fx.models import DEMOS, load_demo

FOLDER = Path(__file__).parent
WORK, RESULTS = FOLDER / "work" / "fidelity", FOLDER / "results"
BUDGETS = (1.5, 2.0, 3.0, 4.0, 5.0)
OWN, FAST = "DDIM or Euler", "DPM-Solver++(2M)"
LAGRANGE = "Lagrange(3, 1)"
USED = {"digits": (OWN, FAST, LAGRANGE), "digit-pairs": (OWN, LAGRANGE)}
CONTROLS = (OWN, FAST, "UniPC")
console = Console(stderr=True)


@dataclass
class Seeded(Runs):
    """One seed of one model under one sampler. steps: calls of the model; sampler_steps: of the sampler, which may call
    the model more than once at each. pool: compiled denoisers, which all seeds share."""

    sampler: str = OWN
    sampler_steps: int = 0
    pool: dict[Any, ExchangeableDenoiser] = field(default_factory=dict)

    def sampling(self) -> Any:
        return SAMPLERS[self.sampler](self.demo.scheduler())

    @property
    def _first_label(self) -> int:
        return self.seed * self.samples % self.demo.num_classes

    def labels(self, first: int, count: int) -> torch.Tensor:
        """In turn, from seed to seed: together they are of all classes, as real images are."""
        return super().labels(self._first_label + first, count)

    def config(self, setting: Setting) -> Record:
        labels = {"first_label": self._first_label} if self._first_label else {}
        return super().config(setting) | labels

    def denoiser(self, setting: Setting, images: int) -> Any:
        """Compiled once for all schedules of one structure."""
        if setting.given is None:
            return super().denoiser(setting, images)
        key = structure(setting.given), setting.given.slots, setting.decide, images
        known = self.pool.get(key)
        if known is None:
            options = Options(self.backend, self.steps, decide=setting.decide)  # type: ignore[arg-type]
            known = ExchangeableDenoiser(self.demo.model, setting.given, options, self.example(images))
            self.pool.clear()  # one at a time: settings of one method follow each other
            self.pool[key] = known
        known.exchange(setting.given)
        known.prepare()
        return known


@dataclass
class Study:
    """One model under one sampler."""

    model: str
    sampler: str
    options: argparse.Namespace

    @cached_property
    def steps(self) -> int:
        """Of the sampler: the most with which it calls the model at most as often as asked for."""
        return steps_for(SAMPLERS[self.sampler], load_demo(self.model).scheduler(), self.options.steps)

    @cached_property
    def calls(self) -> int:
        """Of the model, in a generation."""
        made = SAMPLERS[self.sampler](load_demo(self.model).scheduler())
        made.set_timesteps(self.steps)
        return len(made.timesteps)

    @cached_property
    def runs(self) -> list[Seeded]:
        """One for each seed, together at least as many samples as asked for."""
        work = self.options.work / f"{self.model}-{''.join(c for c in self.sampler.lower() if c.isalnum())}"
        each, pool = -(-self.options.samples // self.options.seeds), {}
        batches = -(-each // self.options.batch)
        batch = -(-each // batches)
        found = []
        for seed in range(self.options.seeds):
            made = Seeded(
                work / f"seed{seed}",
                each,
                self.calls,
                batch,
                getattr(torch, self.options.dtype),
                self.options.backend,
                self.model,
                self.base,
                seed,
                self.sampler,
                self.steps,
                pool,
            )
            made.demo = found[0].demo if found else made.demo
            found.append(made)
        return found

    @cached_property
    def made_for(self) -> Record:
        """What rows must have been made for to be kept."""
        facts = {name: getattr(self.options, name) for name in ("samples", "seeds", "steps", "dtype")}
        facts |= {"metrics": sorted(self.options.measures)} if self.options.measures else {}
        return facts | {"weights": self.tuner.made_for["weights"], "draws": FEATURE_DRAWS}

    @property
    def base(self) -> Setting:
        return Setting(UNCACHED, f"{self.steps} steps", steps=self.steps, reference=True, sampler=self.sampler)

    @cached_property
    def tuner(self) -> Tuner:
        return Tuner(self.runs[0])

    @cached_property
    def neighbourhoods(self) -> Neighbourhoods:
        return Neighbourhoods(self.runs[0].demo.reference_features)

    @cached_property
    def distance(self) -> FrechetDistance:
        return FrechetDistance(self.runs[0].demo.reference_features)

    def row(self, setting: Setting, **facts: Any) -> Record:
        """A setting drawn from all seeds and scored: together, and each seed by itself."""
        path = self.runs[0].work.parent / f"{setting.key}.json"
        known, weights = read_json(path), self.tuner.made_for["weights"]
        made_for = plain({"samples": self.options.samples, "weights": weights, "draws": FEATURE_DRAWS})
        made_for |= {"metrics": sorted(self.options.measures)} if self.options.measures else {}
        made_for["runs"] = [plain(runs.config(setting)) for runs in self.runs]
        if known.get("made_for") != made_for:
            known = {"made_for": made_for, **self._scored(setting)}
            write_json(path, known)
        found = {name: known[name] for name in ("ideal_speedup", "quality", "seeds")}
        row = {"model": self.model, "sampler": self.sampler, "method": setting.method, "label": setting.label}
        row |= {**facts, **found}
        self.tell(row)
        return row

    def _scored(self, setting: Setting) -> Record:
        demo, images, references, labels, seeds, flops = self.runs[0].demo, [], [], [], [], []
        for runs in self.runs:
            drawn = runs.images(setting)
            own = drawn.images[: runs.samples]
            images.append(own)
            labels.append(runs.labels(0, runs.samples))
            references.append(own if setting.reference else runs.reference)
            flops.append([sum(batch[kind] for batch in drawn.batches) for kind in (0, 1)])
            reference = None if setting.reference else references[-1]
            found = score(own, labels[-1], demo.read, self.distance, reference)
            seeds.append({name: estimate.value for name, estimate in found.items()})
        reference = None if setting.reference else torch.cat(references)
        joined = torch.cat(images), torch.cat(labels)
        found = score(*joined, demo.read, self.distance, reference, self.neighbourhoods)
        width = len(str(demo.num_classes - 1))
        prompts = [f"the handwritten number {int(label):0{width}d}" for label in joined[1]]
        for name, measure in self.options.measures.items():
            estimate = measure(joined[0], reference, prompts)
            found |= {name: estimate} if estimate is not None else {}
        spent, full = (sum(entry[kind] for entry in flops) for kind in (0, 1))
        return {
            "ideal_speedup": full / spent,
            "quality": {k: v.to_dict(draws=True) for k, v in found.items()},
            "seeds": seeds,
        }

    def control(self, sampler: str, budget: float) -> Record:
        """Fewer uncached steps, with some sampler."""
        own, made = self.runs[0].demo.scheduler(), SAMPLERS[sampler]
        steps = steps_for(made, own, round(self.calls / budget))
        setting = Setting(f"{UNCACHED}, {sampler}", f"{steps} steps", steps=steps, sampler=sampler)
        row = self.row(setting, budget=budget, kind="control")
        if sampler != self.sampler:  # the reference is of another solver, and tells nothing of these
            for found in (row["quality"], *row["seeds"]):
                for name in ("psnr_db", "ssim"):
                    found.pop(name)
        return row

    def setting(self, contender: Contender, budget: float, tuned: Tuned, **more: Any) -> Setting:
        """A method at a budget. more: other fields of the setting."""
        common = {"label": f"{budget:g}x", "steps": self.steps, "sampler": self.sampler} | more
        return Setting(contender.method, given=tuned.schedule, decide=contender.decide, **common)

    def contender(self, contender: Contender, budget: float) -> Record:
        """A method at a budget, or why not."""
        base = {"model": self.model, "sampler": self.sampler, "method": contender.method, "budget": budget}
        try:
            tuned = self.tuner.tuned(contender, budget)
            off = abs(math.log(tuned.speedup / budget))
            if off > REACHED:
                return base | {"kind": "out of reach", "nearest": tuned.speedup}
            setting = self.setting(contender, budget, tuned)
            kind: str = "ours" if contender.method == OURS else "published" if contender.published else "control"
            row = self.row(setting, budget=budget, kind=kind, knob=tuned.knob)
            # What decides as it runs may decide otherwise on the samples that are scored.
            kept = abs(math.log(row["ideal_speedup"] / budget)) <= REACHED
            return row if kept else row | {"kind": "off budget"}
        except (*NOT_APPLICABLE, CalibrationError) as error:
            return base | {"kind": "not applicable", "why": " ".join(str(error).split())}

    def tell(self, row: Record) -> None:
        quality = {name: Estimate.of(found) for name, found in row["quality"].items()}
        psnr = f"{quality['psnr_db'].value:.2f} dB, " if "psnr_db" in quality else ""
        text = f"{psnr}{quality['frechet'].value:.2f}, {100 * quality['accuracy'].value:.1f} %"
        console.print(
            f"{self.model}, {self.sampler}: {row['method']}, {row['label']}: {row['ideal_speedup']:.2f}x: {text}",
            highlight=False,
            soft_wrap=True,
        )


def study(made: Study, rows: Table) -> None:
    """All methods and controls of one model under one sampler, method by method."""
    options = made.options
    rows.begin(made)
    rows.add(UNCACHED, 1.0, lambda: made.row(made.base, budget=1.0, kind="reference"))
    for contender in chosen(options.methods):
        for budget in options.budgets:
            rows.add(contender.method, budget, partial(made.contender, contender, budget))
    for budget in options.budgets:
        for sampler in dict.fromkeys((made.sampler, *CONTROLS)):
            rows.add(f"{UNCACHED}, {sampler}", budget, partial(made.control, sampler, budget))


@dataclass
class Table:
    """The rows of the result file; `redo`: methods whose rows are not kept."""

    path: Path
    redo: Sequence[str] = ()
    rows: dict[tuple[Any, ...], Record] = field(default_factory=dict)
    study: Study | None = None

    def begin(self, study: Study) -> None:
        """Drop what was made of this model and sampler with other options."""
        self.study, known = study, read_json(self.path).get("rows", [])
        study.tuner.forget(self.redo)
        kept = [row for row in known if (row["model"], row["sampler"]) != (study.model, study.sampler)]
        same = [row for row in known if row not in kept and row["made_for"] == study.made_for]
        same = [row for row in same if row["method"] not in self.redo]
        self.rows = {self._key(row): row for row in (*kept, *same)}

    def add(self, method: str, budget: float, make: Callable[[], Record]) -> None:
        """Make a row that is not there, and write the file."""
        assert self.study is not None
        if (self.study.model, self.study.sampler, method, budget) not in self.rows:
            row = make() | {"made_for": self.study.made_for}
            self.rows[self._key(row)] = row
            write_json(self.path, {"rows": list(self.rows.values())})

    @staticmethod
    def _key(row: Record) -> tuple[Any, ...]:
        return row["model"], row["sampler"], row["method"], row["budget"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(DEMOS), choices=list(DEMOS))
    parser.add_argument(
        "--samplers", nargs="*", default=[], choices=list(SAMPLERS), help="those of each model, if none"
    )
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS)
    parser.add_argument("--methods", nargs="*", default=[], help="these and ours only")
    parser.add_argument("--redo", nargs="*", default=[], metavar="METHOD", help="draw these again")
    parser.add_argument("--samples", type=int, default=1000, help="of all seeds together")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=50, help="calls of the model, at most")
    parser.add_argument("--batch", type=int, default=125, help="at most so many images are drawn together")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--metrics", nargs="*", default=[], choices=list(perceptual.MEASURES), help="with own weights")
    parser.add_argument("--backend", default="inductor")
    parser.add_argument("--work", type=Path, default=WORK)
    parser.add_argument("--out", type=Path, default=RESULTS / "fidelity.json")
    options = parser.parse_args()
    try:
        options.measures = perceptual.load(options.metrics)
    except CacheError as error:
        parser.error(str(error))
    for model in options.models:
        for sampler in options.samplers or USED[model]:
            study(Study(model, sampler, options), Table(options.out, options.redo))
    data = read_json(options.out)
    options.out.with_suffix(".md").write_text(markdown(data))
    pictures(data, options.out.parent)
    Console(width=None if sys.stdout.isatty() else 170).print(markdown(data), markup=False, highlight=False)


if __name__ == "__main__":
    main()
