"""Cached denoisers against the uncached compiled model: one workload, run in turn."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .comparison import Comparison, Row
from .compile import Decide, compile_with_cache
from .denoiser import CachedDenoiser
from .measure import CompilerUse, Executed, compiled_baseline, compiler_use, executed_flops, interleaved
from .record import Decision
from .schedule import CacheSchedule
from .workload import Denoiser, Workload

BASELINE = "uncached"
Progress = Callable[[str, int, int], None]  # stage, done, total (0: unknown)


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
