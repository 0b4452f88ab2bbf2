"""What holding a value does to the sampler's latents: measured without the sampler being known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from diffcache_fx.calibration import Calibration
from diffcache_fx.effects import effects, linear_maps
from diffcache_fx.errors import NotFiniteError
from diffcache_fx.probing import holding

from .toy import Denoiser

pytestmark = pytest.mark.usefixtures("one_thread")

MODEL, WIDTH, STEPS, IMAGES = Denoiser(96).eval(), 96, 10, 3


def guided(denoiser: Any, seed: int, seen: list[torch.Tensor] | None = None, apart: bool = False) -> torch.Tensor:
    """Two-step Adams-Bashforth along a guided direction, both branches in one batch, or in a call each."""
    sample = torch.randn(IMAGES, WIDTH, generator=torch.Generator().manual_seed(seed))
    before: torch.Tensor | None = None
    for step in range(STEPS):
        if seen is not None:
            seen.append(sample.clone())
        time = torch.tensor(1000.0 * (1 - step / STEPS))
        if apart:
            with denoiser.cache_context("cond"):
                cond = denoiser(sample, time)
            with denoiser.cache_context("uncond"):
                uncond = denoiser(0.9 * sample, time)
        else:
            cond, uncond = denoiser(torch.cat((sample, 0.9 * sample)), time).chunk(2)
        slope = uncond + 3.0 * (cond - uncond)
        sample = sample - (slope if before is None else 1.5 * slope - 0.5 * before) / STEPS
        before = slope
    denoiser.reset()
    return sample


@pytest.mark.parametrize("apart", [False, True])
def test_the_effect_on_the_next_latents(apart: bool) -> None:
    """As large as what is seen where a run holds the value, with guidance branches combined as the sampler does."""

    def sampler(denoiser: Any, seed: int) -> torch.Tensor:
        return guided(denoiser, seed, apart=apart)

    calibration = Calibration(MODEL, sampler, backend="eager", probes=2)
    table = effects(calibration, 0)
    assert table is not None
    for step in (2, 5, 8):
        latents: list[list[torch.Tensor]] = []
        for held in (set(), {step}):
            calibration.trial.follow(holding(held, STEPS))
            latents.append([])
            with torch.no_grad():
                guided(calibration.trial, 0, latents[-1], apart)
        off = float((latents[1][step + 1] - latents[0][step + 1]).norm())
        both = 1 + 0.9**2  # the latents of both branches, one of them scaled
        assert float(np.linalg.norm(table[step, step - 1])) == pytest.approx(off * np.sqrt(both), rel=0.1)


def test_maps_of_a_solver_with_memory_are_exact() -> None:
    source = torch.Generator().manual_seed(0)
    rows, elements = 6, 64
    mix = torch.randn(rows, rows, generator=source)
    added = [torch.randn(rows, elements, generator=source) for _ in range(8)]
    off = [torch.zeros(rows, elements)]
    for step in range(7):
        past = 0.4 * mix @ added[step - 1] if step else 0.0
        off.append(0.97 * off[-1] + (step + 1) * mix @ added[step] + past)
    maps = linear_maps(off, added)
    assert maps is not None
    for step, found in enumerate(maps):
        torch.testing.assert_close(found.float(), (step + 1) * mix, rtol=1e-3, atol=1e-3)


def test_what_does_not_follow_linearly_has_no_maps() -> None:
    source = torch.Generator().manual_seed(0)
    added = [torch.randn(4, 64, generator=source) for _ in range(4)]
    assert linear_maps([torch.randn(4, 64, generator=source) for _ in range(4)], added) is None
    assert linear_maps([torch.randn(4, 48, generator=source) for _ in range(4)], added) is None  # of another size
    assert linear_maps([entry[:, :8] for entry in added], [entry[:, :8] for entry in added]) is None  # too few


def test_a_rest_that_is_too_large_is_not_run_over_and_over(monkeypatch: pytest.MonkeyPatch) -> None:
    calibration = Calibration(MODEL, guided, backend="eager", probes=2)
    assert effects(calibration, 0) is not None
    monkeypatch.setattr("diffcache_fx.effects.MOST_COST", 0.01)
    assert effects(calibration, 0) is None
    assert Calibration(MODEL, guided, backend="eager", probes=2).plan(5).error > 0  # from the values alone


def test_the_sampler_is_heard_in_bfloat16() -> None:
    """Where a little noise would drown in rounding."""
    model = Denoiser(96).eval().to(torch.bfloat16)

    def sampler(denoiser: Any, seed: int) -> torch.Tensor:
        return guided(lambda_of(denoiser), seed)

    def lambda_of(denoiser: Any) -> Any:
        def call(sample: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
            return denoiser(sample.to(torch.bfloat16), time.to(torch.bfloat16)).float()

        call.reset = denoiser.reset  # type: ignore[attr-defined]
        return call

    found = Calibration(model, sampler, backend="eager", probes=2).maps()
    assert found is not None
    cond = found.each[4][0, :IMAGES], found.each[4][0, IMAGES:]
    assert float(cond[0][0] / cond[1][0]) == pytest.approx(3.0 / -2.0, rel=0.1)


def test_a_forecast_that_runs_away_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    calibration = Calibration(MODEL, guided, backend="eager", probes=2, refine=4)
    plan = calibration.plan(4)
    tried = calibration.tried

    def runs_away(other: Any, seed: int) -> torch.Tensor:
        if other == plan:
            raise NotFiniteError("not finite")
        return tried(other, seed)

    monkeypatch.setattr(calibration, "tried", runs_away)
    assert calibration.level(plan, 1) == float("inf")
    assert calibration.best(4, 1) != plan
