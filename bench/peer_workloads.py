"""The two models of `bench.peers` and what one generation with each of them is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bench.zoo.published import block_28
from diffcache_fx.demo.digits import load_digits
from diffcache_fx.demo.run import Digits
from diffcache_fx.measure import relative_error

Call = tuple[tuple[Any, ...], dict[str, Any]]
NAMES = ("digits", "blocks28")
STEPS = {"digits": 50, "blocks28": 20}
_GUIDANCE = 4.5


@dataclass(eq=False)
class Subject:
    """A model, and generations with it: `generate(denoiser, turn)` depends on the denoiser and the turn alone.

    fidelity: figures of some outputs against those of the same turns, uncached.
    """

    name: str
    model: nn.Module
    example: Call
    generate: Callable[[Callable[..., Any], int], Tensor]
    fidelity: Callable[[list[Tensor], list[Tensor]], dict[str, float]]


def subject(name: str, steps: int) -> Subject:
    """One of NAMES. Raises KeyError for another name."""
    return {"digits": _digits, "blocks28": _blocks28}[name](steps)


def _digits(steps: int) -> Subject:
    """The trained demo: ten digits with guidance, both halves in one call; images [10, 1, 32, 32] in [-1, 1]."""
    demo = load_digits()
    work = Digits(demo, steps)

    def generate(denoiser: Callable[..., Any], turn: int) -> Tensor:
        made = work.generate(denoiser, turn, None, lambda: None)
        assert made is not None
        return made

    return Subject("digits", demo.model, work.example, generate, work.fidelity)


def _blocks28(steps: int) -> Subject:
    """The 28-block model of `bench.step`, random weights, as the velocity of a flow: Euler steps from noise, with
    guidance, both halves in one call; latents [1, 4, 32, 32]."""
    entry = block_28()
    (hidden,), fixed = entry.inputs(0)
    times = torch.linspace(1.0, 0.0, steps + 1)

    def arguments(latents: Tensor, step: int) -> Call:
        moment = (999 * times[step]).round().to(torch.int64).expand(2)
        return (torch.cat((latents, latents)),), {**fixed, "timestep": moment}

    @torch.no_grad()
    def generate(denoiser: Callable[..., Any], turn: int) -> Tensor:
        latents = torch.randn((1, *hidden.shape[1:]), generator=torch.Generator().manual_seed(turn))
        for step in range(steps):
            args, kwargs = arguments(latents, step)
            positive, negative = denoiser(*args, **kwargs).sample[:, : latents.shape[1]].chunk(2)
            velocity = negative + _GUIDANCE * (positive - negative)
            latents = latents + (times[step + 1] - times[step]) * velocity
        return latents

    def fidelity(outputs: list[Tensor], reference: list[Tensor]) -> dict[str, float]:
        return {} if outputs is reference else {"error": relative_error(torch.cat(outputs), torch.cat(reference))}

    return Subject("blocks28", entry.build().requires_grad_(False), arguments(hidden[:1], 0), generate, fidelity)
