"""Cached denoisers against the uncached compiled model: one workload, run in turn, as a table of figures."""

from __future__ import annotations

import itertools
import json
import math
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from rich import box
from rich.table import Table
from torch import Tensor, nn

from .compile import Decide, compile_with_cache
from .denoiser import CachedDenoiser
from .measure import (
    CompilerUse,
    Executed,
    Ratio,
    Timings,
    compiled_baseline,
    compiler_use,
    executed_flops,
    interleaved,
    psnr,
    relative_error,
)
from .models import Call
from .record import Decision
from .schedule import CacheSchedule
from .version import __version__

BASELINE = "uncached"
Progress = Callable[[str, int, int], None]  # stage, done, total (0: unknown)
Denoiser = Callable[..., Any]


class Workload(Protocol):
    """What one generation does with a denoiser."""

    unit: str  # what latency is given per: "image" or "step"
    steps: int  # steps of a generation

    @property
    def units(self) -> int:
        """How many of its units one generation makes."""

    @property
    def example(self) -> Call:
        """One call, for capture."""

    def generate(self, denoiser: Denoiser, turn: int, limit: int | None, tick: Callable[[], None]) -> Tensor | None:
        """One generation, the same for a turn whatever the denoiser; at most `limit` steps of it if given."""

    def fidelity(self, outputs: list[Tensor], reference: list[Tensor]) -> dict[str, float]:
        """Figures that compare the outputs of all turns with the uncached ones."""

    def shorter(self, steps: int) -> Workload | None:
        """The same in fewer steps, where that means something."""


_STEADY = 1.5  # ends of an interval that are farther apart say little


@dataclass(frozen=True)
class Row:
    """One line of the table. latency: seconds per unit. ideal: speed-up by executed FLOPs. compile_s: capture and
    compilation. recompiles: compilations after the first, short generation. cache_bytes: all contexts together. beside:
    of the uncached model in fewer steps, the schedule that costs as much."""

    name: str
    latency: float
    speedup: Ratio
    ideal: float
    fidelity: dict[str, float]
    cache_bytes: int = 0
    graph_breaks: int = 0
    recompiles: int = 0
    compile_s: float = 0.0
    why: str = ""
    beside: str = ""


@dataclass
class Comparison:
    """The table, the outputs by name and turn, the decisions of each schedule's last generation, and the raw
    samples."""

    model: str
    unit: str
    backend: str
    steps: int
    rows: list[Row]
    timings: Timings
    outputs: dict[str, list[Tensor]] = field(repr=False)
    decisions: dict[str, tuple[Decision, ...]] = field(default_factory=dict, repr=False)
    seconds: float = 0.0

    def columns(self) -> list[str]:
        """Headings, units included."""
        kinds = [key for key in ("psnr_db", "error", "accuracy") if any(key in row.fidelity for row in self.rows)]
        titles = {"psnr_db": "PSNR, dB", "error": "relative error", "accuracy": "accuracy"}
        return [
            "schedule",
            f"ms per {self.unit}",
            "speed-up [95 %]",
            "ideal",
            *(titles[kind] for kind in kinds),
            "cache",
            "graph breaks",
            "recompiles",
            "compile, s",
        ]

    def cells(self, row: Row) -> list[str]:
        kinds = [key for key in ("psnr_db", "error", "accuracy") if any(key in other.fidelity for other in self.rows)]
        first, plain = row.name == self.timings.baseline, row.beside or row.name == self.timings.baseline
        ratio = row.speedup
        return [
            row.name,
            f"{1000 * row.latency:.1f}",
            "1" if first else self.told(ratio),
            f"{row.ideal:.2f}",
            *(_figure(kind, row.fidelity.get(kind)) for kind in kinds),
            "-" if plain else f"{row.cache_bytes / 2**20:.2f} MiB",
            str(row.graph_breaks),
            str(row.recompiles),
            f"{row.compile_s:.1f}",
        ]

    @property
    def rounds(self) -> int:
        return len(self.timings.seconds[self.timings.baseline])

    def told(self, ratio: Ratio) -> str:
        """A speed-up with its interval, which one round does not tell."""
        return f"{ratio.value:.2f}" + (f" [{ratio.low:.2f}, {ratio.high:.2f}]" if self.rounds > 1 else "")

    @property
    def unsteady(self) -> str:
        """A sentence where rounds differ too much to go by; else empty."""
        wide = [row.name for row in self.rows if row.speedup.high > _STEADY * row.speedup.low]
        if not wide:
            return ""
        return (
            f"The rounds of {wide[0]!r} differ by half and more: something else kept this machine busy. Go by the "
            "ideal speed-up, or measure again."
        )

    def table(self) -> Table:
        """For a terminal."""
        title = f"{self.model}, {self.backend}: {self.rounds} generations of {self.steps} steps each, in turn"
        table = Table(title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for index, heading in enumerate(self.columns()):
            table.add_column(heading, justify="right" if index else "left", overflow="fold")
        for row in self.rows:
            table.add_row(*self.cells(row))
        return table

    def markdown(self) -> str:
        """The same as a Markdown table."""
        head = self.columns()
        lines = ["| " + " | ".join(head) + " |", "|" + "|".join(["---"] + ["---:"] * (len(head) - 1)) + "|"]
        lines += ["| " + " | ".join(self.cells(row)) + " |" for row in self.rows]
        return "\n".join(lines) + "\n"

    def to_dict(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "backend": self.backend,
            "steps": self.steps,
            "unit": self.unit,
            "seconds": round(self.seconds, 1),
            "versions": {"diffcache_fx": __version__, "torch": torch.__version__, "python": platform.python_version()},
            "threads": torch.get_num_threads(),
            "rows": [asdict(row) for row in self.rows],
            "samples_s": {name: values.tolist() for name, values in self.timings.seconds.items()},
        }

    def json(self) -> str:
        """Everything but the outputs; an infinite figure becomes null."""
        return json.dumps(_finite(self.to_dict()), indent=2) + "\n"


def _figure(kind: str, value: float | None) -> str:
    if value is None:
        return "-"
    if kind == "accuracy":
        return f"{100 * value:.1f} %"
    if kind == "error":
        return f"{value:.2g}"
    return "inf" if math.isinf(value) else f"{value:.1f}"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass
class _Contender:
    """One denoiser under test and what was noted about it."""

    name: str
    denoiser: Denoiser
    workload: Workload
    outputs: list[Tensor] = field(default_factory=list)
    use: CompilerUse = field(default_factory=CompilerUse)
    recompiles: int = 0
    compile_s: float = 0.0
    executed: Executed | None = None
    decisions: tuple[Decision, ...] = ()
    cache_bytes: int = 0
    why: str = ""
    beside: str = ""

    @property
    def ideal(self) -> float:
        return self.executed.ideal_speedup if self.executed else 1.0


def compare(
    name: str,
    module: nn.Module,
    schedules: Mapping[str, CacheSchedule],
    workload: Workload,
    *,
    rounds: int = 5,
    backend: str = "inductor",
    decide: Decide = "host",
    controls: bool = True,
    progress: Progress | None = None,
) -> Comparison:
    """Measure the uncached model under torch.compile and, for each schedule, the cached one: `rounds` generations each;
    with controls, where the workload can be had in fewer steps, also the uncached model in as many as cost the same.

    All of them run generation after generation in turn, the order shuffled each round; nothing else is compared with a
    figure of another run. progress: told of each stage.
    """
    told = progress or (lambda stage, done, total: None)
    begin = time.perf_counter()
    contenders = [_prepare(BASELINE, module, None, workload, backend, told)]
    for title, schedule in schedules.items():
        contenders.append(_prepare(title, module, schedule, workload, backend, told, decide))
        control = _control(contenders[-1], contenders, told) if controls else None
        if control is not None:
            contenders.append(control)
    total, done = rounds * sum(c.workload.steps for c in contenders), 0

    def tick() -> None:
        nonlocal done
        done += 1
        told("sample", done, total)

    def generation(contender: _Contender) -> Callable[[], None]:
        def run() -> None:
            turn = len(contender.outputs)
            with compiler_use() as use:
                output = contender.workload.generate(contender.denoiser, turn, None, tick)
            contender.outputs.append(output if output is not None else torch.empty(0))
            contender.recompiles += use.compilations
            contender.use.graph_breaks += use.graph_breaks

        return run

    told("sample", 0, total)
    timings = interleaved({c.name: generation(c) for c in contenders}, rounds=rounds, warmup=0, baseline=BASELINE)
    for contender in contenders:  # of the last generation, and outside of what was timed
        if isinstance(contender.denoiser, CachedDenoiser):
            contender.executed = executed_flops(contender.denoiser)
            contender.cache_bytes = contender.denoiser.stats().cache_bytes
            contender.decisions = contender.denoiser.stats().decisions
            contender.why = contender.denoiser.summary()
    reference = contenders[0].outputs
    rows = [
        Row(
            name=c.name,
            latency=timings.median(c.name) / workload.units,
            speedup=timings.speedup(c.name),
            ideal=workload.steps / c.workload.steps if c.beside else c.ideal,
            fidelity=workload.fidelity(c.outputs, reference),
            cache_bytes=c.cache_bytes,
            graph_breaks=c.use.graph_breaks,
            recompiles=c.recompiles,
            compile_s=c.compile_s,
            why=c.why,
            beside=c.beside,
        )
        for c in contenders
    ]
    outputs = {c.name: c.outputs for c in contenders}
    decisions = {c.name: c.decisions for c in contenders if c.decisions}
    spent = time.perf_counter() - begin
    return Comparison(name, workload.unit, backend, workload.steps, rows, timings, outputs, decisions, spent)


def _prepare(
    title: str,
    module: nn.Module,
    schedule: CacheSchedule | None,
    workload: Workload,
    backend: str,
    told: Progress,
    decide: Decide = "host",
) -> _Contender:
    """Capture, compile and warm up one contender, so that what is timed later compiles nothing."""
    start = time.perf_counter()
    denoiser: Denoiser
    with compiler_use() as use:
        if schedule is None:
            denoiser = compiled_baseline(module, backend)
        else:
            told(f"capture {title}", 0, 1)
            cached: CachedDenoiser = compile_with_cache(
                module,
                schedule,
                backend=backend,
                example_inputs=workload.example,
                num_steps=workload.steps,
                decide=decide,
            )
            told(f"capture {title}", 1, 1)
            told(f"compile {title}", 0, 0)
            cached.prepare()
            denoiser = cached
        told(f"compile {title}", 0, 0)
        workload.generate(denoiser, 0, min(4, workload.steps), lambda: None)
        told(f"compile {title}", 1, 1)
    return _Contender(title, denoiser, workload, use=use, compile_s=time.perf_counter() - start)


def _control(cached: _Contender, others: list[_Contender], told: Progress) -> _Contender | None:
    """The uncached model in as many steps as cost what a generation of this cached one does; None where the workload
    has no such thing, or it is there already."""
    whole = cached.workload
    if not isinstance(cached.denoiser, CachedDenoiser) or whole.shorter(whole.steps) is None:
        return None
    told(f"cost of {cached.name}", 0, whole.steps)
    done = itertools.count(1)
    whole.generate(cached.denoiser, 0, None, lambda: told(f"cost of {cached.name}", next(done), whole.steps))
    steps = max(round(whole.steps / executed_flops(cached.denoiser).ideal_speedup), 1)
    shorter, name = whole.shorter(steps), f"{BASELINE}, {steps} steps"
    if shorter is None or steps >= whole.steps or any(other.name == name for other in others):
        return None
    return _Contender(name, others[0].denoiser, shorter, beside=cached.name)


@dataclass
class Calls:
    """Bare calls of a denoiser, one for each step: a workload for any model. Latency is per step."""

    inputs: Callable[[int], Call]
    varies: bool
    steps: int
    unit: str = "step"

    @property
    def units(self) -> int:
        return self.steps

    @property
    def example(self) -> Call:
        return self.inputs(0)

    @torch.no_grad()
    def generate(self, denoiser: Denoiser, turn: int, limit: int | None, tick: Callable[[], None]) -> Tensor | None:
        """The outputs of all steps, flat, where the inputs vary from step to step."""
        kept = []
        for step in range(min(self.steps, limit or self.steps)):
            args, kwargs = self.inputs(step)
            if isinstance(denoiser, CachedDenoiser):
                with denoiser.cache_context("cond", step_index=step, num_inference_steps=self.steps):
                    output = denoiser(*args, **kwargs)
            else:
                output = denoiser(*args, **kwargs)
            if self.varies:
                leaves = torch.utils._pytree.tree_leaves(output)
                kept += [leaf.flatten().float().cpu() for leaf in leaves if isinstance(leaf, Tensor)]
            tick()
        if isinstance(denoiser, CachedDenoiser):
            denoiser.reset()
        return torch.cat(kept) if kept else None

    def shorter(self, steps: int) -> None:
        """The inputs belong to the steps."""

    def fidelity(self, outputs: list[Tensor], reference: list[Tensor]) -> dict[str, float]:
        return {"error": relative_error(torch.cat(outputs), torch.cat(reference))} if self.varies else {}


def image_fidelity(outputs: list[Tensor], reference: list[Tensor]) -> dict[str, float]:
    """PSNR, dB, of images [N, C, H, W] in [-1, 1]; none for the reference itself."""
    return {} if outputs is reference else {"psnr_db": psnr(torch.cat(outputs), torch.cat(reference))}
