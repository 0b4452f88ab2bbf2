"""What an exported engine is worth: `python -m bench.engines [--model M] [--rounds N] [--only RUNTIME...]`.

For the demo model and the 28 blocks of `bench.step`, whole generations through each runtime: the uncached export, and
cached ones in each form, beside torch.compile, in turn in one run. A speed-up is against the uncached export of the
same runtime; ideal is by executed FLOPs. Reuse step: its median seconds over those of an uncached step of the same
runtime, and in brackets over its share of the FLOPs (1.0: it costs what it computes). A cell that was not run says why.
Where a GPU is found, everything runs there, and TensorRT engines are built and run too. Writes
`bench/results/engines.json` and `engines.md`.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bench.engine_table import Cell, cell_of, markdown, plain, table
from bench.peer_workloads import NAMES, STEPS, Subject, subject
from diffcache_fx import CachedDenoiser, CacheSchedule, Linear, compile_with_cache, export, schedules
from diffcache_fx.errors import CacheError
from diffcache_fx.measure import compiled_baseline, executed_flops, interleaved

RESULTS = Path(__file__).parent / "results" / "engines.json"
RUNTIMES = ("torch.compile", "onnxruntime", "aot_inductor", "tensorrt")
UNCACHED = "uncached"
BACKEND = "inductor"  # of torch.compile
# By name: the schedule, and the forms it is exported in.
SCHEDULES: dict[str, tuple[CacheSchedule, tuple[str, ...]]] = {
    UNCACHED: (schedules.always(), ("pair",)),
    "interval 3, linear": (schedules.interval(3, forecast=Linear()), ("pair", "branch")),
    "first block, 0.1": (schedules.first_block_cache(0.1), ("split", "branch")),
}


class Bench:
    """All cells of one model."""

    def __init__(self, work: Subject, steps: int, device: str, folder: Path, runtimes: list[str]) -> None:
        self.work, self.steps, self.device, self.folder, self.runtimes = work, steps, device, folder, runtimes
        self.run: dict[str, Callable[..., Any]] = {}
        self.cells: dict[str, Cell] = {}

    def prepare(self, tick: Callable[[str], None]) -> None:
        """Compile, export and load everything that can run here."""
        for name, (schedule, forms) in SCHEDULES.items():
            for runtime in RUNTIMES:
                for form in forms if runtime != "torch.compile" else ("",):
                    cell = Cell(runtime, name, form)
                    self.cells[cell.key] = cell
                    tick(cell.key)
                    if runtime not in self.runtimes:
                        cell.reason = "not asked for"
                        continue
                    try:
                        self.run[cell.key] = self._made(cell, schedule)
                    except CacheError as error:
                        cell.reason = " ".join(str(error).split())

    def _made(self, cell: Cell, schedule: CacheSchedule) -> Callable[..., Any]:
        if cell.runtime == "torch.compile" and cell.schedule == UNCACHED:
            return compiled_baseline(self.work.model, BACKEND)
        if cell.runtime == "torch.compile":
            cached = self._cached(schedule, BACKEND, "host")
            cached.prepare()
            return cached
        if cell.runtime == "tensorrt" and self.device == "cpu":
            raise CacheError("an engine runs on a GPU, and there is none here")
        cached = self._cached(schedule, "eager", "graph" if cell.form == "branch" else "host")
        writers = {
            "onnxruntime": export.to_onnx,
            "aot_inductor": export.to_aot_inductor,
            "tensorrt": export.to_tensorrt,
        }
        start = time.perf_counter()
        folder = writers[cell.runtime](cached, self.folder / cell.key.replace(" ", "_"), cell.form)
        cell.export_s = time.perf_counter() - start
        cell.bytes = sum(path.stat().st_size for path in folder.iterdir())
        return export.load_bundle(folder, device=self.device)

    def _cached(self, schedule: CacheSchedule, backend: str, decide: Any) -> Any:
        return compile_with_cache(
            self.work.model,
            schedule,
            backend=backend,
            example_inputs=self.work.example,
            num_steps=self.steps,
            decide=decide,
        )

    def measure(self, rounds: int, tick: Callable[[str], None]) -> None:
        """Whole generations in turn; then what each was worth."""
        outputs: dict[str, list[torch.Tensor]] = {key: [] for key in self.run}
        turns = dict.fromkeys(self.run, 0)

        def generation(key: str) -> Callable[[], None]:
            def run() -> None:
                turns[key] += 1
                outputs[key].append(self.work.generate(self.run[key], turns[key]))
                reset = getattr(self.run[key], "reset", None)
                if reset is not None:
                    reset()

            return run

        functions = {key: generation(key) for key in self.run}
        found = interleaved(functions, rounds=rounds, warmup=1, progress=lambda name, _: tick(name))
        reference = outputs[f"torch.compile | {UNCACHED} | "]
        steps = {key: self._steps(key, rounds) for key in self.run}
        for key in self.run:
            cell = self.cells[key]
            base = f"{cell.runtime} | {UNCACHED} | {'' if cell.runtime == 'torch.compile' else 'pair'}"
            if base in steps and steps[key][True]:
                cell.reuse_cost = median(steps[key][True]) / median(steps[base][False])
                cell.reuse_flops = self._reuse_share(key)
            cell.latency_s = found.median(key)
            cell.speedup = found.ratio(base, key) if base in self.run else None
            cell.fidelity = self.work.fidelity(outputs[key], reference)
            cell.ideal = self._ideal(key)

    def _steps(self, key: str, rounds: int) -> dict[bool, list[float]]:
        """Seconds of single steps of a few more generations, apart from those timed as a whole; True: reused."""
        denoiser, found = self.run[key], {True: [], False: []}  # type: dict[bool, list[float]]
        for turn in range(min(rounds, 3)):
            clock = _Clock(denoiser, self.device)
            self.work.generate(clock, turn)
            stats = getattr(denoiser, "stats", None)
            reused = [bool(d.reused) for d in stats().decisions] if stats else [False] * len(clock.seconds)
            for kind, seconds in zip(reused, clock.seconds, strict=True):
                found[kind].append(seconds)
            if stats:
                denoiser.reset()  # type: ignore[attr-defined]
        return found

    def _reuse_share(self, key: str) -> float:
        """FLOPs of a reuse step, as a share of a full one."""
        denoiser: Any = self.run[key]
        if isinstance(denoiser, CachedDenoiser):
            found = denoiser.explain()
            return min(flops for _, flops in found.programs) / found.full_flops
        every = frozenset(region.name for region in denoiser.manifest.regions)
        return denoiser.flops(every) / denoiser.full_flops

    def _ideal(self, key: str) -> float:
        """By the decisions of the last generation."""
        denoiser: Any = self.run[key]
        if isinstance(denoiser, CachedDenoiser):
            found = executed_flops(denoiser)
            return found.full / found.spent
        if not isinstance(denoiser, export.BundleDenoiser):
            return 1.0
        done = [frozenset(decision.reused) for decision in denoiser.stats().decisions]
        return denoiser.full_flops * len(done) / sum(denoiser.flops(reused) for reused in done)


class _Clock:
    """A denoiser whose calls are timed one by one."""

    def __init__(self, denoiser: Any, device: str) -> None:
        self._denoiser, self._device = denoiser, device
        self.seconds: list[float] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        wait = torch.cuda.synchronize if self._device != "cpu" else lambda: None
        wait()
        start = time.perf_counter()
        result = self._denoiser(*args, **kwargs)
        wait()
        self.seconds.append(time.perf_counter() - start)
        return result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._denoiser, name)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=(*NAMES, "both"), default="both")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, help=f"of a generation (default: {STEPS})")
    parser.add_argument("--only", nargs="+", choices=RUNTIMES, default=list(RUNTIMES), help="runtimes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    runtimes = ["torch.compile", *(name for name in options.only if name != "torch.compile")]
    record: dict[str, Any] = {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": options.device,
        "threads": torch.get_num_threads(),
        "models": {},
    }
    before = json.loads(options.out.read_text()) if options.out.exists() else {}
    if {**before, "models": {}} == record:  # what another run measured of the other model, under the same conditions
        record = before
    console = Console(width=None if sys.stdout.isatty() else 200)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for name in NAMES if options.model == "both" else (options.model,):
        steps = options.steps or STEPS[name]
        cells = cells_of(name, steps, options.device, runtimes, options.rounds)
        title = f"{name}: {steps} steps on {options.device}, {options.rounds} generations each"
        console.print(table(title, cells))
        record["models"][name] = {"title": title, "steps": steps, "cells": [plain(cell) for cell in cells]}
        options.out.write_text(json.dumps(record, indent=1) + "\n")
        options.out.with_suffix(".md").write_text(sheet(record))


def sheet(record: dict[str, Any]) -> str:
    """The file's tables, of everything in the record."""
    parts = ["# Engines\n", " ".join((__doc__ or "").split("\n\n")[1].split()) + "\n"]
    for model in record["models"].values():
        parts.append(markdown(model["title"], [cell_of(cell) for cell in model["cells"]]))
    return "\n".join(parts)


def cells_of(name: str, steps: int, device: str, runtimes: list[str], rounds: int) -> list[Cell]:
    """Prepare and measure one model."""
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    count = sum(1 if r == "torch.compile" else len(forms) for _, forms in SCHEDULES.values() for r in RUNTIMES)
    work = subject(name, steps)
    work.model.to(device)
    with (
        tempfile.TemporaryDirectory(prefix="engines") as folder,
        Progress(*columns, console=Console(stderr=True)) as progress,
    ):

        def ticking(task: Any) -> Callable[[str], None]:
            return lambda key: progress.update(task, advance=1, description=f"{name}: {key}")

        bench = Bench(work, steps, device, Path(folder), runtimes)
        bench.prepare(ticking(progress.add_task(f"{name}: export", total=count)))
        bench.measure(rounds, ticking(progress.add_task(f"{name}: generate", total=rounds * len(bench.run))))
    return list(bench.cells.values())


if __name__ == "__main__":
    main()
