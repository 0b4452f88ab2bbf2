"""LagrangeScheduler in diffusers' own pipelines."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, HeunDiscreteScheduler

from diffcache_fx import LagrangeScheduler
from diffcache_fx.measure import relative_error
from tests.tiny_pipelines import CASES, Case

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("one_thread")]
BY_NAME = {case.name: case for case in CASES}


@pytest.fixture(scope="module", params=["DiTPipeline", "StableDiffusionPipeline", "FluxPipeline", "WanPipeline"])
def piped(request: pytest.FixtureRequest) -> tuple[Case, Any]:
    case = BY_NAME[request.param]
    return case, case.build()


def drawn(piped: tuple[Case, Any], scheduler: Any, steps: int) -> torch.Tensor:
    case, pipe = piped
    before, pipe.scheduler = pipe.scheduler, scheduler
    try:
        return case.run(pipe, 0, steps)
    finally:
        pipe.scheduler = before


def test_one_node_draws_what_the_first_order_sampler_does(piped: tuple[Case, Any]) -> None:
    _, pipe = piped
    config = pipe.scheduler.config
    flow = "shift" in config
    first = pipe.scheduler if flow else DDIMScheduler.from_config(config, clip_sample=False)
    ours = LagrangeScheduler.from_config(first.config, nodes=1)
    assert ours.is_flow == flow
    assert relative_error(drawn(piped, ours, 4), drawn(piped, first, 4)) < 1e-4


def test_more_nodes_draw_nearer_to_the_solution(piped: tuple[Case, Any]) -> None:
    """Against many steps, and at as many model calls as a first-order sampler."""
    config = piped[1].scheduler.config
    exact = drawn(piped, LagrangeScheduler.from_config(config, nodes=3, refinements=2), 40)
    high = LagrangeScheduler.from_config(config, nodes=2, refinements=1)
    coarse = LagrangeScheduler.from_config(config, nodes=1)
    errors = [relative_error(drawn(piped, s, n), exact) for s, n in ((high, 9), (coarse, 10))]
    assert len(high.timesteps) == len(coarse.timesteps) == 10
    assert torch.isfinite(exact).all()
    assert errors[0] < errors[1]


def test_heun_in_a_pipeline() -> None:
    case = BY_NAME["StableDiffusionPipeline"]
    piped = case, case.build()
    grid = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "timestep_spacing": "leading"}
    ours = LagrangeScheduler(2, 1, sweep="jacobi", reuse_last=False, final="euler", steps_offset=1, **grid)
    heun = HeunDiscreteScheduler(steps_offset=1, **grid)
    assert relative_error(drawn(piped, ours, 4), drawn(piped, heun, 4)) < 1e-4
