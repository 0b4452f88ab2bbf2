"""This library against its peers, same weights, inputs, steps and decisions: `python -m bench.peers`.

The demo model and a 28-block model, through the uncached model, the caching hooks of diffusers, cache-dit and this
library, each eager and under torch.compile, generation after generation in turn. Peers are optional: `pip install
'diffcache_fx[peers]'`. A peer that is missing or fails has a row that says why. Writes `bench/results/peers.json` and
`peers.md`. About an hour on two cores, and 18 GB of memory for the 28 blocks, since every contender is a process of its
own: --model, --steps, --rounds and --only make it smaller. What another run with the same versions, threads and rounds
wrote of the other model stays.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from diffcache_fx.measure import Timings, interleaved

from .peer_contenders import MODES, Contender, NotRun, Plan, Uncached
from .peer_table import NOTES, Row, described, label, left_out, loaded, markdown, plain, terminal, timed
from .peer_worker import CONTENDERS, serve
from .peer_workloads import NAMES, STEPS, subject

RESULTS = Path(__file__).parent / "results" / "peers.json"
# glibc gives large blocks back to the system whenever the top of its heap is free, which differs from process to
# process: an eager step then takes 15,000 page faults more, or none. Every contender keeps its memory.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 32),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
    "MALLOC_TOP_PAD_": str(1 << 28),
}
Key = tuple[str, str]  # a contender's name and a mode


class Remote:
    """A contender in its own process."""

    def __init__(self, kind: type[Contender], model: str, plan: Plan, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self.kind = kind
        self.connection, other = context.Pipe()
        log = str(folder / f"{model}-{kind.name}.log")
        self.process = context.Process(target=serve, args=(other, model, kind.name, plan, log), daemon=False)
        self.process.start()
        other.close()

    def ask(self, *message: Any, limit: float | None = None) -> Any:
        """A command's answer. Raises NotRun if it fails, ends the process, or takes longer than `limit` seconds."""
        try:
            self.connection.send(message)
            if not self.connection.poll(limit):
                self.stop(kill=True)
                raise NotRun(f"{message[0]} took longer than {limit:.0f} s")
            state, value = self.connection.recv()
        except (EOFError, OSError) as error:
            self.process.join(10)
            raise NotRun(f"its process ended with code {self.process.exitcode} during {message[0]}") from error
        if state != "done":
            raise NotRun(value)
        return value

    def stop(self, kill: bool = False) -> None:
        if kill:
            self.process.kill()
        elif self.process.is_alive():
            try:
                self.connection.send(("stop",))
            except OSError:
                self.process.kill()
        self.process.join(30)


class Bench:
    """One model: all contenders, prepared one after the other and then timed in turn."""

    def __init__(self, model: str, plan: Plan, names: list[str], rounds: int, limit: float, progress: Progress) -> None:
        self.model, self.plan, self.rounds, self.limit, self.progress = model, plan, rounds, limit, progress
        self.kinds = [CONTENDERS[name] for name in names]
        self.remotes: dict[str, Remote] = {}
        self.facts: dict[Key, dict[str, Any]] = {}
        self.lost: dict[Key, str] = {}

    def run(self, folder: Path) -> list[Row]:
        """All rows, in the order of the contenders. Raises RuntimeError if the uncached model itself does not run."""
        try:
            self._prepare(folder)
            return self._rows(self._generate())
        finally:
            for remote in self.remotes.values():
                remote.stop()

    def _prepare(self, folder: Path) -> None:
        task = self.progress.add_task(f"{self.model}: prepare", total=len(self.kinds) * len(MODES))
        for kind in self.kinds:
            remote = self.remotes[kind.name] = Remote(kind, self.model, self.plan, folder)
            for mode in MODES:
                self.progress.update(task, description=f"{self.model}: prepare {kind.name} {mode}")
                try:
                    self.facts[kind.name, mode] = remote.ask("prepare", mode, limit=self.limit)
                except NotRun as reason:
                    if kind is Uncached:
                        raise RuntimeError(f"the uncached {self.model} did not run: {reason}") from reason
                    self.lost |= {(kind.name, other): str(reason) for other in MODES[MODES.index(mode) :]}
                    break
                finally:
                    self.progress.advance(task)

    def _generate(self) -> Timings:
        task = self.progress.add_task(f"{self.model}: generate", total=len(self.facts) * self.rounds)
        turns = dict.fromkeys(self.facts, 0)

        def generation(key: Key) -> Callable[[], None]:
            def run() -> None:
                if key in self.lost:
                    return
                turns[key] += 1
                try:
                    compiled, broken = self.remotes[key[0]].ask("generate", key[1], turns[key], limit=self.limit)
                    self.facts[key]["recompiles"] = self.facts[key].get("recompiles", 0) + compiled
                    self.facts[key]["graph_breaks"] = self.facts[key].get("graph_breaks", 0) + broken
                except NotRun as reason:
                    self.lost[key] = str(reason)

            return run

        def note(name: str, turn: int) -> None:
            self.progress.update(task, advance=1, description=f"{self.model}: round {turn + 1}, {name}")

        functions = {label(*key): generation(key) for key in self.facts}
        # A round ahead: the first contenders prepared have lain idle for long, and their memory has gone cold.
        return interleaved(functions, rounds=self.rounds, warmup=1, progress=note)

    def _rows(self, timings: Timings) -> list[Row]:
        outputs: dict[Key, list[torch.Tensor]] = {}
        for name, mode in self.facts:
            try:
                made = self.remotes[name].ask("outputs", mode)
                outputs[name, mode] = [torch.from_numpy(array) for array in made]
            except NotRun as reason:
                self.lost.setdefault((name, mode), str(reason))
        for key in self.lost:
            timings.seconds.pop(label(*key), None)
        fidelity = subject(self.model, self.plan.steps).fidelity
        rows = []
        for method in dict.fromkeys(kind.method for kind in self.kinds):
            for mode in MODES:
                for kind in (kind for kind in self.kinds if kind.method == method):
                    key = (kind.name, mode)
                    if key in self.lost:
                        rows.append(left_out(kind, mode, self.lost[key]))
                        continue
                    eager, uncached = self.facts[kind.name, "eager"], self.facts["uncached", "eager"]
                    row = described(kind, mode, self.plan, self.facts[key], eager, uncached)
                    found = fidelity(outputs[key], outputs["uncached", mode])
                    rows.append(timed(row, timings, found, self.facts[key].get("first_s")))
        return rows


def versions() -> dict[str, str]:
    """What was compared."""
    found = {"python": platform.python_version()}
    for name in ("torch", "diffusers", "cache-dit", "diffcache_fx"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def kept(path: Path, record: dict[str, Any]) -> dict[str, Any]:
    """What a file holds of each model, if it was measured under the same conditions."""
    if not path.exists():
        return {}
    known: dict[str, Any] = json.loads(path.read_text())
    same = all(known.get(name) == value for name, value in record.items())
    return known["models"] if same else {}


def write(path: Path, record: dict[str, Any]) -> None:
    """The JSON, and beside it the tables of all models in it."""
    record["models"] = {name: record["models"][name] for name in NAMES if name in record["models"]}
    path.write_text(json.dumps(record, indent=1) + "\n")
    tables = [markdown(model["title"], [loaded(row) for row in model["rows"]]) for model in record["models"].values()]
    path.with_suffix(".md").write_text("\n".join(["# Peers\n", NOTES, *tables]))


def main() -> None:
    """Measure, print and write; exit 1 if a contender that ran decided otherwise than the plan."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=(*NAMES, "both"), default="both")
    parser.add_argument("--rounds", type=int, default=7, help="timed generations of each contender")
    parser.add_argument("--steps", type=int, help="of a generation (default: " + str(STEPS) + ")")
    parser.add_argument("--every", type=int, default=3, help="refresh every so many steps after the warm-up")
    parser.add_argument("--warm-up", type=int, default=3, help="steps at the start that always refresh")
    parser.add_argument("--only", help="names of contenders, comma-separated: " + ", ".join(CONTENDERS))
    parser.add_argument("--limit", type=float, default=1800, help="seconds one contender may take to compile")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON; the table goes beside it as .md")
    options = parser.parse_args()
    names = list(CONTENDERS) if options.only is None else ["uncached", *options.only.split(",")]
    unknown = [name for name in names if name not in CONTENDERS]
    if unknown:
        parser.error(f"no contender is called {', '.join(unknown)}; there are {', '.join(CONTENDERS)}")
    os.environ.update(ALLOCATOR)  # for the contenders' processes
    begin = time.time()
    record: dict[str, Any] = {
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "allocator": ALLOCATOR,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "rounds": options.rounds,
    }
    record["models"] = kept(options.out, record)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    console = Console(width=None if sys.stdout.isatty() else 220)
    equal = True
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for model in NAMES if options.model == "both" else (options.model,):
        plan = Plan(options.steps or STEPS[model], options.every, options.warm_up)
        with tempfile.TemporaryDirectory() as folder, Progress(*columns, console=Console(stderr=True)) as progress:
            rows = Bench(model, plan, names, options.rounds, options.limit, progress).run(Path(folder))
        title = f"{model}: {plan.steps} steps, {sum(plan.bits)} refreshes, {options.rounds} generations each"
        console.print(terminal(title, rows))
        equal &= all(row.decisions_equal for row in rows)
        plan_facts = {"steps": plan.steps, "every": plan.every, "warm_up": plan.warm_up, "bits": plan.bits}
        seconds = round(time.time() - begin, 1)
        found = {"title": title, "plan": plan_facts, "seconds": seconds, "rows": [plain(row) for row in rows]}
        begin = time.time()
        record["models"] = {**record["models"], model: found}
        write(options.out, record)
    sys.exit(not equal)


if __name__ == "__main__":
    main()
