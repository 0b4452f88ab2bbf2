"""A Gaussian mixture in eight dimensions, whose exact noise at every level is known: what a sampler is off by is its
own error and no network's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler
from torch import Tensor

from bench.samplers import Made
from diffcache_fx import LagrangeScheduler

WIDTH, PARTS, POINTS = 8, 5, 256
SPREAD = 0.4
FINE = 400  # steps of the solution that others are compared with


def centres() -> Tensor:
    """[5, 8] float64."""
    return 1.5 * torch.randn(PARTS, WIDTH, generator=torch.Generator().manual_seed(7)).double()


def noise_of(u: Tensor, s: Tensor) -> Tensor:
    """The expected noise at u = x0 + s * noise, [N, 8]; s is a number, float64."""
    variance = SPREAD**2 + s**2
    apart = u[:, None, :] - centres()
    share = torch.softmax(-apart.square().sum(-1) / (2 * variance), dim=1)
    return s * (share[..., None] * apart).sum(1) / variance


def exact(own: Any) -> Callable[[Tensor, Any], Tensor]:
    """The model: predicted noise of x at a timestep of a variance-preserving scheduler, fractional ones included."""
    signal = own.alphas_cumprod.double()
    ratios = ((1 - signal) / signal).sqrt().log().numpy()

    def model(x: Tensor, moment: Any) -> Tensor:
        s = torch.tensor(np.exp(np.interp(float(moment), np.arange(len(ratios)), ratios)))
        return noise_of(x.double() * (1 + s**2).sqrt(), s)

    return model


def sampled(scheduler: Any, model: Callable[[Tensor, Any], Tensor], steps: int) -> Tensor:
    """[256, 8] float64 from fixed noise."""
    scheduler.set_timesteps(steps)
    x = torch.randn(POINTS, WIDTH, generator=torch.Generator().manual_seed(0)).double()
    x = x * float(scheduler.init_noise_sigma)
    for moment in scheduler.timesteps:
        x = scheduler.step(model(scheduler.scale_model_input(x, moment), moment), moment, x).prev_sample
    return x


def errors(samplers: dict[str, Made], steps_of: Callable[[Made, Any, int], int], calls: list[int]) -> dict[str, Any]:
    """By sampler and number of calls, the mean distance of its samples to a fine solution from the same noise."""
    own = DDIMScheduler(clip_sample=False, timestep_spacing="trailing")
    model = exact(own)
    fine = sampled(LagrangeScheduler(4, 4, variable="angle", timestep_spacing="trailing"), model, FINE)
    found: dict[str, Any] = {}
    for name, make in samplers.items():
        found[name] = {}
        for count in calls:
            steps = steps_of(make, own, count)
            off = float((sampled(make(own), model, steps) - fine).norm(dim=1).mean())
            found[name][count] = {"steps": steps, "error": off}
    return found
