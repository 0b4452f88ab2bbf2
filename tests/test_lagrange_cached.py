"""LagrangeScheduler around a cached denoiser: refinement rounds come back to timesteps they have seen."""

from __future__ import annotations

import pytest
import torch

from diffcache_fx import CachedDenoiser, LagrangeScheduler, compile_with_cache, schedules
from diffcache_fx.demo.demo import Demo
from diffcache_fx.demo.digits import load_digits
from diffcache_fx.measure import psnr

STEPS, LABELS = 6, [3, 7]


@pytest.fixture(scope="module")
def demo() -> Demo:
    return load_digits()


def scheduler(demo: Demo) -> LagrangeScheduler:
    return LagrangeScheduler.from_config(demo.scheduler().config, nodes=3, refinements=2)


def denoiser(demo: Demo, threshold: float, refinement: bool = True) -> CachedDenoiser:
    return compile_with_cache(
        demo.model, schedules.first_block_cache(threshold), backend="eager", refinement=refinement
    )


def drawn(demo: Demo, model: object) -> torch.Tensor:
    return demo.draw(model, LABELS, scheduler=scheduler(demo), num_steps=STEPS)  # type: ignore[arg-type]


def test_refinement_rounds_reuse_first(demo: Demo) -> None:
    """The second round moves a node's sample a little, at the same timestep; the next node is a step away."""
    calls = scheduler(demo)
    calls.set_timesteps(STEPS)
    rounds = calls.rounds
    cached = denoiser(demo, 0.02)
    images = drawn(demo, cached)
    reused = [bool(decision.reused) for decision in cached.stats().decisions]
    assert len(reused) == len(rounds)
    share = {
        turn: sum(r for r, at in zip(reused, rounds, strict=True) if at == turn) / rounds.count(turn) for turn in (1, 2)
    }
    assert share[2] > 0.8
    assert share[1] == 0
    assert psnr(images, drawn(demo, demo.model)) > 43


def test_never_reusing_is_the_uncached_model(demo: Demo) -> None:
    assert torch.equal(drawn(demo, denoiser(demo, 0.0)), drawn(demo, demo.model))
