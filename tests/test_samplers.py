"""The samplers that `bench.sampler` compares: equal numbers of calls, and that each converges to the same solution."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from bench import mixture
from bench.samplers import SAMPLERS, steps_for

OWN = {
    "noise": DDIMScheduler(clip_sample=False, beta_schedule="linear"),
    "flow": FlowMatchEulerDiscreteScheduler(shift=1.0),
}


@pytest.mark.parametrize("kind", list(OWN))
@pytest.mark.parametrize("name", list(SAMPLERS))
def test_as_many_calls_as_allowed(name: str, kind: str) -> None:
    make, own = SAMPLERS[name], OWN[kind]
    steps = steps_for(make, own, 24)
    counts = []
    for count in (steps, steps + 1):
        made = make(own)
        made.set_timesteps(count)
        counts.append(len(made.timesteps))
    assert counts[0] <= 24 < counts[1]
    assert float(made.timesteps[0]) >= 998  # all begin where the noise is largest


def test_too_few_calls_for_a_step() -> None:
    with pytest.raises(ValueError, match="one step of LagrangeScheduler needs more than 2 calls"):
        steps_for(SAMPLERS["Lagrange(4, 3)"], OWN["noise"], 2)


def test_all_converge_to_one_solution(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixture, "FINE", 80)
    monkeypatch.setattr(mixture, "POINTS", 16)
    found = mixture.errors(SAMPLERS, steps_for, [12, 60])
    for name, by_calls in found.items():
        assert by_calls[60]["error"] < 0.6 * by_calls[12]["error"], name
        assert by_calls[60]["error"] < 0.3, name
    best = min(found[name][60]["error"] for name in SAMPLERS if name.startswith("Lagrange"))
    assert best < found["DDIM or Euler"][60]["error"] / 10


@pytest.mark.parametrize("name", list(SAMPLERS))
def test_flows_are_solved_too(name: str) -> None:
    """A flow whose velocity is known: from noise to one point, in a straight line."""
    own, goal = OWN["flow"], torch.full((4, 3), 0.7).double()
    scheduler = SAMPLERS[name](own)
    scheduler.set_timesteps(steps_for(SAMPLERS[name], own, 16))
    x: Any = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)).double()
    for moment in scheduler.timesteps:
        share = max(float(moment) / 1000, 1e-3)
        x = scheduler.step((x - goal) / share, moment, x).prev_sample
    assert (x - goal).abs().max() < 0.02
