"""Measuring: interleaved timing with intervals, image fidelity, executed FLOPs, and what the compiler was asked to do.

A speed-up is a ratio of medians of samples taken in turn in one run: the machine's drift then falls on all alike.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from .denoiser import CachedDenoiser
from .export.torch_compile import find_backend
from .passes.flops import program_flops
from .passes.specialize import Specialize
from .plan import Reused
from .step_set import StepSet

Samples = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Ratio:
    """A ratio of two medians with its bootstrap interval (95 % unless asked otherwise); no unit."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


@dataclass(frozen=True)
class Timings:
    """Seconds of each function by round, [rounds] float64; sample i of all functions was taken in the same round."""

    seconds: dict[str, Samples]
    baseline: str

    def median(self, name: str) -> float:
        """Median seconds of one function."""
        return float(np.median(self.seconds[name]))

    def ratio(self, above: str, below: str, *, confidence: float = 0.95, draws: int = 2000, seed: int = 0) -> Ratio:
        """median(above) / median(below); the interval resamples whole rounds, so that common drift cancels."""
        top, bottom = self.seconds[above], self.seconds[below]
        picks = np.random.default_rng(seed).integers(0, len(top), size=(draws, len(top)))
        ratios = np.median(top[picks], axis=1) / np.median(bottom[picks], axis=1)
        tail = 100 * (1 - confidence) / 2
        low, high = np.percentile(ratios, [tail, 100 - tail])
        return Ratio(float(np.median(top) / np.median(bottom)), float(low), float(high))

    def speedup(self, name: str) -> Ratio:
        """How many times faster than the baseline one function is."""
        return self.ratio(self.baseline, name)

    def to_dict(self) -> dict[str, Any]:
        """Medians, speed-ups and raw samples as plain data."""
        return {
            name: {
                "median_s": self.median(name),
                "speedup": vars(self.speedup(name)),
                "samples_s": [float(value) for value in values],
            }
            for name, values in self.seconds.items()
        }


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 15,
    warmup: int = 2,
    calls: int = 1,
    baseline: str | None = None,
    seed: int = 0,
    progress: Callable[[str, int], object] | None = None,
) -> Timings:
    """Time functions in turn: every round runs each of them once, in an order shuffled anew from a fixed seed.

    rounds: samples of each. warmup: rounds that are run and not counted. calls: calls timed together as one sample (its
    seconds are per call), for functions of a few microseconds. baseline: whose median the others are compared with, the
    first by default. progress: called with the name and the round (from 0) before each timed sample.
    Work on a GPU is waited for. Raises ValueError if there is nothing to time.
    """
    names = list(functions)
    if not names or rounds < 1 or calls < 1 or warmup < 0:
        raise ValueError("interleaved needs at least one function, one round, one call and no negative warmup")
    if baseline is not None and baseline not in functions:
        raise ValueError(f"the baseline {baseline!r} is none of the functions {names}")
    shuffle = random.Random(seed)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-warmup, rounds):
        order = names.copy()
        shuffle.shuffle(order)
        for name in order:
            if progress is not None and turn >= 0:
                progress(name, turn)
            seconds = _time(functions[name], calls)
            if turn >= 0:
                samples[name].append(seconds)
    return Timings({name: np.array(values) for name, values in samples.items()}, baseline or names[0])


def _time(function: Callable[[], object], calls: int) -> float:
    """Seconds of one call, the mean over `calls`; the garbage collector waits meanwhile."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        synchronize()
        return (time.perf_counter() - start) / calls
    finally:
        if collecting:
            gc.enable()


def synchronize() -> None:
    """Wait for what was started on a GPU."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def psnr(images: Tensor, reference: Tensor, data_range: float = 2.0) -> float:
    """Mean over the images of their peak signal-to-noise ratios, dB; infinite if all are equal.

    images, reference: [N, ...] of equal shape; data_range: 2 for values in [-1, 1]. Images that are equal to the last
    bit count as one part in 2**16 of the range (96 dB) where others are not.
    """
    if images.shape != reference.shape:
        raise ValueError(f"images {tuple(images.shape)} and reference {tuple(reference.shape)} differ in shape")
    errors = (images.double() - reference.double()).flatten(1).square().mean(1)
    if not bool((errors > 0).any()):
        return math.inf
    floor = (data_range / 2**16) ** 2
    return float((10 * torch.log10(data_range**2 / errors.clamp_min(floor))).mean())


def relative_error(value: Tensor, reference: Tensor) -> float:
    """Root mean square of the difference over that of the reference; no unit."""
    scale = reference.double().square().mean().sqrt().clamp_min(1e-300)
    return float((value.double() - reference.double()).square().mean().sqrt() / scale)


def counted_flops(function: Callable[[], object]) -> int:
    """FLOPs of the operators that really ran in one call, 2 for each multiply-add; for code that runs operator by
    operator (a compiled program hides them: see `executed_flops`)."""
    with FlopCounterMode(display=False) as counter:
        function()
    return int(counter.get_total_flops())


@dataclass(frozen=True)
class Executed:
    """FLOPs of a generation: `spent` by the programs that ran, `full` by the uncached model in as many calls."""

    spent: int
    full: int

    @property
    def ideal_speedup(self) -> float:
        """What the executed FLOPs alone would give."""
        return self.full / max(self.spent, 1)


def executed_flops(cached: CachedDenoiser) -> Executed:
    """FLOPs of the last generation, from the decisions taken at its calls and the programs these selected."""
    captured = cached._captured()
    assert captured is not None
    cost: dict[Reused, int] = {}
    decisions = cached.stats().decisions
    for decision in decisions:
        key = frozenset(decision.reused)
        if key not in cost:
            cost[key] = program_flops(Specialize(key)(captured.program))
    spent = sum(cost[frozenset(decision.reused)] for decision in decisions if not decision.rebuilt)
    return Executed(spent, captured.full_flops * len(decisions))


@dataclass
class CompilerUse:
    """What the compiler was asked to do in a stretch of code: filled in when the stretch ends.

    compilations: calls of the compiler. graph_breaks: places where Dynamo fell back to Python.
    """

    compilations: int = 0
    graph_breaks: int = 0
    reasons: list[str] = field(default_factory=list)


@contextmanager
def compiler_use() -> Iterator[CompilerUse]:
    """Count compilations and graph breaks of the code inside, whoever starts them."""
    from torch._dynamo.utils import counters

    def state() -> tuple[int, dict[str, int]]:
        return int(counters["aot_autograd"]["total"]), dict(counters["graph_break"])

    use = CompilerUse()
    compiled, breaks = state()
    try:
        yield use
    finally:
        now, broken = state()
        use.compilations = now - compiled
        use.reasons = [reason for reason, count in broken.items() if count > breaks.get(reason, 0)]
        use.graph_breaks = sum(broken.values()) - sum(breaks.values())


def recorded_programs(
    cached: CachedDenoiser, generation: Callable[[], object], num_steps: int | None
) -> dict[Reused, Callable[[], Sequence[Tensor]]]:
    """Each compiled program that `generation` ran, bound to the tensors of its last call there: by reused regions.

    They run without the driver, so that a program can be timed apart from it. num_steps: as the generation uses it.
    """
    captured = cached._captured()
    assert captured is not None
    steps: StepSet = captured.steps(num_steps)
    original = dict(steps.lowered)
    seen: dict[Reused, tuple[Any, ...]] = {}

    def recorder(key: Reused, run: Callable[..., Any]) -> Callable[..., Any]:
        def record(*args: Any) -> Any:
            seen[key] = args
            return run(*args)

        return record

    try:
        for key, lowered in original.items():
            if isinstance(key, str):
                continue
            steps.lowered[key] = replace(lowered, run=recorder(key, lowered.run))
        generation()
    finally:
        steps.lowered.update(original)

    def bound(key: Reused) -> Callable[[], Sequence[Tensor]]:
        def run() -> Sequence[Tensor]:
            with torch.no_grad():
                return original[key].run(*seen[key])

        return run

    return {key: bound(key) for key in seen}


def compiled_baseline(
    module: nn.Module, backend: str | Callable[..., Any], options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """What a cached denoiser is compared with: the module under torch.compile with this backend (eager: as is) and its
    options, where they are Inductor's."""
    if backend == "eager":
        return module
    find_backend(backend)
    given = {name: value for name, value in (options or {}).items() if name != "outlining"}
    return torch.compile(module, backend=backend, options=given or None)
