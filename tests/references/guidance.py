"""Caching across the two branches of classifier-free guidance, which are called one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .hooks import Arguments, Keywords, Reference, sample, timestep, with_sample


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """The centred spectrum of [N, C, H, W] in two: inside a disc of radius min(H, W) // 5 round 0, and outside."""
    height, width = x.shape[-2:]
    spectrum = torch.fft.fftshift(torch.fft.fft2(x.float()), dim=(-2, -1))
    rows = torch.arange(height)[:, None] - height // 2
    columns = torch.arange(width)[None] - width // 2
    inside = rows**2 + columns**2 <= (min(height, width) // 5) ** 2
    return spectrum * inside, spectrum * ~inside


def between(window: tuple[float, float], t: float) -> bool:
    return window[0] < t < window[1]


class FasterCache(Reference):
    """The unconditional output from the conditional one, and attention from its last two values (arXiv 2410.19355).

    Called with context="cond", then context="uncond", at every step. The unconditional branch is refreshed if
    ``step % interval == 0`` or the timestep lies outside `window`, both ends excluded: then D = the spectrum of uncond
    minus that of cond is stored, in two bands. Else uncond = cond + a1 low(D) + a2 high(D), a1 = alpha inside
    `low_window` and 1 outside it, a2 likewise. `compounding`: the weights stay in D, so that they multiply up from one
    reuse to the next; without it each reuse weighs the stored D.

    Attention of the conditional branch is computed at steps with ``step % attention_interval == 0``, outside
    `attention_window`, and where the unconditional branch is refreshed; else it is F1 + weight (F1 - F2), F1 and F2 its
    last two computed values, equal after the first. The unconditional branch always computes its attention.
    """

    def __init__(
        self,
        model: nn.Module,
        attention: Sequence[str] = (),
        interval: int = 5,
        window: tuple[float, float] = (-1, 641),
        attention_interval: int = 2,
        attention_window: tuple[float, float] = (-1, 681),
        low_window: tuple[float, float] = (99, 901),
        high_window: tuple[float, float] = (-1, 301),
        alpha: float = 1.1,
        weight: float = 0.5,
        compounding: bool = True,
        **limits: Any,
    ) -> None:
        self.interval, self.window, self.weight = interval, window, weight
        self.attention_interval, self.attention_window = attention_interval, attention_window
        self.low_window, self.high_window, self.alpha, self.compounding = low_window, high_window, alpha, compounding
        super().__init__(model, **limits)
        for path in attention:
            self.wrap(path, lambda original, *a, path=path, **k: self.attend(path, original, *a, **k))

    def reset(self) -> None:
        super().reset()
        self.decisions = {"uncond": [], "attention": []}
        self.attended: dict[str, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def __call__(self, *args: Any, context: str, **kwargs: Any) -> Any:
        self.context = context
        output = self.cond(args, kwargs) if context == "cond" else self.uncond(args, kwargs)
        self.step += context == "uncond"
        return output

    def cond(self, args: Arguments, kwargs: Keywords) -> Any:
        t = timestep(args, kwargs)
        fresh = self.must_refresh(self.decisions["uncond"])
        fresh = fresh or self.step % self.interval == 0 or not between(self.window, t)
        due = self.step % self.attention_interval == 0 or not between(self.attention_window, t)
        self.decisions["uncond"].append(fresh)
        self.decisions["attention"].append(fresh or due)
        self.conditional = self.model(*args, **kwargs)
        return self.conditional

    def uncond(self, args: Arguments, kwargs: Keywords) -> Any:
        low, high = split(sample(self.conditional))
        if self.decisions["uncond"][-1]:
            output = self.model(*args, **kwargs)
            other_low, other_high = split(sample(output))
            self.bands = other_low - low, other_high - high
            return output
        t = timestep(args, kwargs)
        a1 = self.alpha if between(self.low_window, t) else 1.0
        a2 = self.alpha if between(self.high_window, t) else 1.0
        bands = self.bands[0] * a1, self.bands[1] * a2
        if self.compounding:
            self.bands = bands
        spectrum = torch.fft.ifftshift(bands[0] + low + bands[1] + high, dim=(-2, -1))
        value = torch.fft.ifft2(spectrum).real.to(sample(self.conditional).dtype)
        return with_sample(self.conditional, value)

    def attend(self, path: str, original: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        if self.context == "uncond":
            return original(*args, **kwargs)
        if self.decisions["attention"][-1]:
            value = original(*args, **kwargs)
            self.attended[path] = value, self.attended.get(path, (value,))[0]
            return value
        newest, older = self.attended[path]
        return newest + (newest - older) * self.weight
