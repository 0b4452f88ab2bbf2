"""The demo model's images, drawn by any denoiser in a plain loop; what it decided, and by how much."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from diffcache_fx import CacheSchedule, schedules
from diffcache_fx.correction import ScaleShift
from diffcache_fx.demo.digits import load_digits
from diffcache_fx.presets.predictive import taylor_seer
from diffcache_fx.presets.static import mask

STEPS = 20


def corrected(schedule: CacheSchedule) -> CacheSchedule:
    """A schedule of one rule on the demo's trunk, each reused value a little scaled and shifted, as a fit would."""
    noise = torch.randn(STEPS, 2, 128, generator=torch.Generator().manual_seed(0))
    table = torch.tensor([1.0, 0.0])[:, None] + 0.02 * noise
    (rule,) = schedule.rules
    return replace(schedule, rules=(replace(rule, correction=ScaleShift.of([table])),))


SCHEDULES: dict[str, CacheSchedule] = {
    "static": corrected(schedules.interval(3)),
    "first-block": schedules.first_block_cache(0.1),
    "taylor": taylor_seer(3, order=1),
}


def sampler() -> dict[str, torch.Tensor]:
    """DDIM as numbers: x' = a x + b output, for 20 steps; the noise; the classes asked for, and none."""
    demo = load_digits()
    scheduler = demo.scheduler()
    scheduler.set_timesteps(STEPS)
    rows = []
    for step in scheduler.timesteps:
        ends = [
            scheduler.step(torch.tensor([[[[out]]]]), step, torch.tensor([[[[x]]]])).prev_sample.item()
            for x, out in ((1e-3, 0.0), (0.0, 1e-3))  # small, where nothing is clipped
        ]
        rows.append([1e3 * end for end in ends])
    return {
        "latents": torch.randn(10, *demo.image_shape, generator=torch.Generator().manual_seed(0)),
        "class_labels": torch.cat((torch.arange(10), torch.full((10,), demo.null_class))),
        "timesteps": scheduler.timesteps.to(torch.int64),
        "coefficients": torch.tensor(rows),
        "guidance": torch.tensor([float(demo.guidance_scale)]),
    }


def drawn(denoiser: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The images [10, 1, H, W]."""
    latents = inputs["latents"]
    for step, moment in enumerate(inputs["timesteps"]):
        both = torch.cat((latents, latents))
        with torch.no_grad():
            output = denoiser(both, timestep=moment.expand(20), class_labels=inputs["class_labels"]).sample
        positive, negative = output.chunk(2)
        a, b = inputs["coefficients"][step]
        latents = a * latents + b * (negative + inputs["guidance"] * (positive - negative))
    return latents.clamp(-1, 1)


def refreshes(denoiser: Any) -> list[bool]:
    """By step, whether it was computed: in the graph's form a guard's verdict tells, elsewhere what was reused."""
    decided = denoiser.stats().decisions
    return [all(v.refresh for v in d.verdicts) if d.verdicts else not d.reused for d in decided]


def letters(denoiser: Any) -> str:
    """F for a refresh, R for a reuse."""
    return "".join("F" if computed else "R" for computed in refreshes(denoiser))


def margins(denoiser: Any) -> list[str]:
    """By step, how far the signal lies from its threshold, as a share of that."""
    verdicts = [v for d in denoiser.stats().decisions for v in d.verdicts if v.signal is not None]
    return [f"{(v.signal - v.limit) / v.limit:+.3f}" for v in verdicts]


def decided_alike(one: Any, other: Any) -> None:
    """Both took the same decisions, no signal within rounding of its threshold, and reused something."""
    assert letters(one) == letters(other)
    assert "R" in letters(one)
    assert all(abs(float(margin)) > 1e-3 for margin in margins(one))


def forced(schedule: CacheSchedule, decided: Any) -> CacheSchedule:
    """A plan that holds the decisions a guard took."""
    (rule,) = schedule.rules
    bits = [int(computed) for computed in refreshes(decided)]
    return mask(bits, regions=rule.regions, forecast=rule.forecast, storage=rule.storage)
