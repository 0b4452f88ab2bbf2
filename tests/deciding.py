"""A small net under each guard: what generations of it are told, and what is asked of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch

from diffcache_fx import (
    CachedDenoiser,
    CacheSchedule,
    compile_with_cache,
    schedules,
)

from .test_passes_signals import Net

STEPS = 20
NET = Net().eval()
MODES = ("host", "graph", "lagged")
KINDS: dict[str, Callable[[float], CacheSchedule]] = {
    "first_block_cache": lambda threshold: schedules.first_block_cache(threshold),
    "db_cache": lambda threshold: schedules.db_cache(1, 1, threshold, warm_up=2),
    "tea_cache": lambda threshold: schedules.tea_cache(threshold),
    "easy_cache": lambda threshold: schedules.easy_cache(threshold, warm_up=2),
    "di_cache": lambda threshold: schedules.di_cache(threshold),
    "speca": lambda threshold: schedules.speca(threshold, decay=0.5, floor=0.0, least=0),
}


def strict(module: Any, examples: Sequence[torch.Tensor]) -> Callable[..., Any]:
    """A backend that, like Inductor, takes only inputs that lie in memory as the examples do."""
    layouts = [(tuple(example.shape), example.stride(), example.dtype) for example in examples]

    def run(*args: torch.Tensor) -> Any:
        assert [(tuple(arg.shape), arg.stride(), arg.dtype) for arg in args] == layouts
        return module(*args)

    return run


def start(seed: int) -> torch.Tensor:
    return torch.randn(2, 8, generator=torch.Generator().manual_seed(seed))


Outputs = list[torch.Tensor]


def advance(model: Any, x: torch.Tensor, step: int, steps: int, outputs: Outputs) -> torch.Tensor:
    """One step of a sampler: call the model, move a little."""
    with torch.no_grad():
        outputs.append(model(x, torch.tensor(1.0 - step / steps)).clone())
        return x - 0.15 * torch.tanh(outputs[-1])


def generate(model: Any, seed: int = 0, steps: int = STEPS, context: str | None = None, **hints: Any) -> Outputs:
    x, outputs = start(seed), Outputs()
    for step in range(steps):
        if context is None:
            x = advance(model, x, step, steps, outputs)
        else:
            with model.cache_context(context, **hints):
                x = advance(model, x, step, steps, outputs)
    return outputs


def interleaved(model: Any, seeds: Sequence[int], names: Sequence[str], steps: int = STEPS) -> list[Outputs]:
    """Two guidance branches, each on a path of its own."""
    paths = [start(seed) for seed in seeds]
    outputs: list[Outputs] = [[] for _ in seeds]
    for step in range(steps):
        for i, name in enumerate(names):
            with model.cache_context(name):
                paths[i] = advance(model, paths[i], step, steps, outputs[i])
    return outputs


def denoiser(schedule: CacheSchedule, decide: Any = "host", **options: Any) -> CachedDenoiser:
    options = {"backend": strict, "num_steps": STEPS, **options}
    return compile_with_cache(NET, schedule, decide=decide, **options)


@cache
def threshold(kind: str) -> float:
    """One at which some steps reuse: somewhat above the middle of the signals."""
    cached = denoiser(KINDS[kind](1e9 if kind == "speca" else 0.0))
    generate(cached)
    signals = sorted(d.signal for d in cached.stats().decisions if d.signal)
    assert signals
    return 1.5 * signals[len(signals) // 2]


@cache
def run(kind: str, decide: str, seed: int = 0) -> tuple[Outputs, Any, str]:
    """One generation: its outputs, its statistics and its bits."""
    cached = denoiser(KINDS[kind](threshold(kind)), decide)
    outputs = generate(cached, seed)
    return outputs, cached.stats(), bits(cached)


def bits(cached: CachedDenoiser, context: str | None = None) -> str:
    """R refreshed, u reused."""
    chosen = [d for d in cached.stats().decisions if context in (None, d.context)]
    return "".join("u" if decision.reused else "R" for decision in chosen)


def plain(seed: int = 0, steps: int = STEPS) -> Outputs:
    return generate(NET, seed, steps)


def go_on(model: Any, x: torch.Tensor, first: int, last: int) -> torch.Tensor:
    outputs = Outputs()
    for step in range(first, last):
        x = advance(model, x, step, STEPS, outputs)
    return x
