"""A small denoiser whose every call is watched: whether it reused, and whether the output was the model's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from diffcache_fx import CachedDenoiser, Trunk, compile_with_cache, schedules


class Block(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.inner = nn.Linear(dim, dim)

    def forward(self, x: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.inner(x) + shift)


class Denoiser(nn.Module):
    """Four residual blocks on vectors, with a timestep and conditioning."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(4))
        self.head = nn.Linear(dim, dim)

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, cond: torch.Tensor | None = None, extra: Any = None
    ) -> torch.Tensor:
        shift = torch.sin(timestep.reshape(-1, 1) * 0.01)
        if cond is not None:
            shift = shift + cond
        for block in self.blocks:
            sample = block(sample, shift)
        return self.head(sample)


MODEL = Denoiser().eval()
TIMES = (900.0, 700.0, 500.0, 300.0, 100.0)
PROMPT, OTHER = torch.full((2, 8), 0.5), torch.full((2, 8), -0.5)


def denoiser(every: int = 2, model: nn.Module = MODEL, **options: Any) -> CachedDenoiser:
    schedule = schedules.interval(every, regions=Trunk(first=1))
    return compile_with_cache(model, schedule, backend="eager", **options)


def latents(seed: int) -> torch.Tensor:
    return torch.randn(2, 8, generator=torch.Generator().manual_seed(seed))


def time(value: float) -> torch.Tensor:
    return torch.tensor(value)


def kinds(cached: CachedDenoiser, context: str | None = None) -> str:
    """The decisions so far, a letter each: R refreshed, u reused."""
    chosen = [d for d in cached.stats().decisions if context in (None, d.context)]
    return "".join("u" if d.reused else "R" for d in chosen)


class Track:
    """Calls a cached denoiser and notes, call by call, whether it reused and whether the output was the model's own."""

    def __init__(self, cached: CachedDenoiser, model: nn.Module = MODEL) -> None:
        self.cached, self.model, self.kinds, self.count = cached, model, "", 0

    def __call__(self, *args: Any, context: str | None = None, **hints: Any) -> None:
        if context is None:
            got = self.cached(*args)
        else:
            with self.cached.cache_context(context, **hints):
                got = self.cached(*args)
        own = self.model(*args)
        last = self.cached.stats().decisions[-1]
        assert torch.equal(got, own) == (not last.reused)
        self.kinds += "u" if last.reused else "R"
        self.count += 1

    def all(self, calls: list[tuple[Any, ...]]) -> None:
        for args in calls:
            self(*args)

    @property
    def reason(self) -> str:
        return self.cached.stats().decisions[-1].reason
