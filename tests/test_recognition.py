"""Which generation, guidance branch and step a call belongs to; in doubt the answer is "compute"."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from diffcache_fx import CacheWarning, Linear, compile_with_cache, schedules

from .tracked import MODEL, OTHER, PROMPT, TIMES, Denoiser, Track, denoiser, kinds, latents, time

pytestmark = pytest.mark.usefixtures("one_thread", "no_grad")


# --- one branch, nothing said ---


def test_timestep_returns_to_the_first() -> None:
    track = Track(denoiser())
    for seed, t in enumerate(TIMES + TIMES):
        track(latents(seed), time(t), PROMPT)
    assert track.kinds == "RuRuR" * 2
    assert track.cached.stats().steps == 5
    assert track.cached.stats().syncs == 0


def test_a_run_that_is_longer_than_said_begins_again_and_says_so() -> None:
    track = Track(denoiser(num_steps=3))
    for seed, t in enumerate(TIMES[:3] * 2):
        track(latents(seed), time(t), PROMPT)
    for seed, t in enumerate(TIMES[:3]):
        track(latents(seed), time(t), PROMPT)
    with pytest.warns(CacheWarning, match=r"a run of 3 steps .* is over, and its timesteps go on, at 300.*num_steps"):
        track(latents(3), time(TIMES[3]), PROMPT)
    assert track.kinds == "RuR" * 3 + "R"


def test_upward_timesteps() -> None:
    track = Track(denoiser())
    for seed, t in enumerate(TIMES[::-1] * 2):
        track(latents(seed), time(t), PROMPT)
    assert track.kinds == "RuRuR" * 2


def test_timesteps_as_python_numbers() -> None:
    class Numbered(Denoiser):
        def forward(self, sample: torch.Tensor, timestep: Any, cond: Any = None) -> torch.Tensor:  # type: ignore[override]
            return super().forward(sample, torch.as_tensor(timestep), cond)

    model = Numbered().eval()
    track = Track(denoiser(model=model), model)
    for seed, t in enumerate(TIMES + TIMES):
        track(latents(seed), int(t), PROMPT)
    assert track.kinds == "RuRuR" * 2
    assert track.cached.stats().compilations == 2


def test_a_reversal_recomputes_and_so_does_the_step_after_it() -> None:
    track = Track(denoiser(4))
    for seed, t in enumerate((900.0, 700.0, 800.0, 600.0, 400.0, 200.0)):
        track(latents(seed), time(t), PROMPT)
    assert track.kinds == "RuRRRu"
    reasons = [d.reason for d in track.cached.stats().decisions]
    assert reasons[2] == "the timestep went back"
    assert reasons[3] == "the timestep went back just before"


def test_a_reversal_forgets_the_history_of_forecasts() -> None:
    """A linear forecast after a reversal must not draw its line through the generation before."""
    schedule = schedules.interval(2, forecast=Linear(), warm_up=2)
    cached = compile_with_cache(MODEL, schedule, backend="eager")
    times = (900.0, 700.0, 800.0, 600.0, 400.0)
    for seed, t in enumerate(times[:2]):
        cached(latents(seed), time(t), PROMPT)
    cached(latents(2), time(times[2]), PROMPT)
    history = next(iter(cached._driver.recognizer.contexts["#0"].payload.histories.values()))
    assert history.positions == [2.0]


def test_an_early_end_then_lower_timesteps_with_other_conditioning() -> None:
    track = Track(denoiser(4))
    for seed, t in enumerate(TIMES[:3]):
        track(latents(seed), time(t), PROMPT)
    for seed, t in enumerate((450.0, 350.0, 250.0)):
        track(latents(10 + seed), time(t), OTHER)
    assert track.kinds == "RuuRuu"
    assert track.reason == ""


@pytest.mark.parametrize("context", [None, "cond"])
def test_an_end_after_one_step_then_lower_timesteps_with_other_conditioning(context: str | None) -> None:
    track = Track(denoiser(4))
    track(latents(0), time(900.0), PROMPT, context=context)
    for seed, t in enumerate((450.0, 350.0, 250.0)):
        track(latents(10 + seed), time(t), OTHER, context=context)
    assert track.kinds[:2] == "RR"
    history = next(iter(next(iter(track.cached._driver.recognizer.contexts.values())).payload.histories.values()))
    assert len(history.positions) == 1


def test_latents_modified_in_place_are_one_branch() -> None:
    track = Track(denoiser())
    x = latents(0)
    for _ in range(2):
        for t in TIMES:
            track(x, time(t), PROMPT)
            x.add_(0.1)
    assert track.kinds == "RuRuR" * 2
    assert {d.context for d in track.cached.stats().decisions} == {"#0"}


def test_latents_modified_in_place_with_two_branches() -> None:
    track = Track(denoiser())
    x = latents(0)
    for t in TIMES:
        track(x, time(t), PROMPT)
        track(x, time(t), OTHER)
        x.add_(0.1)
    assert track.kinds == "RRuuRRuuRR"


def test_conditioning_that_changes_at_every_step_still_never_mixes_generations() -> None:
    """Such a model can be cached in a context; without one it is computed."""
    track = Track(denoiser())
    for seed, t in enumerate(TIMES):
        track(latents(seed), time(t), latents(100 + seed))
    assert track.kinds == "RRRRR"
    assert track.reason == "" or "conditioning" in track.reason
    track = Track(denoiser())
    for seed, t in enumerate(TIMES):
        track(latents(seed), time(t), latents(100 + seed), context="cond")
    assert track.kinds[0] == "R"
    assert "u" in track.kinds


# --- two calls a step without contexts ---


def test_two_branches_by_the_same_latents() -> None:
    track = Track(denoiser())
    for _ in range(2):
        for seed, t in enumerate(TIMES):
            x = latents(seed)
            track(x, time(t), PROMPT)
            track(x, time(t), OTHER)
    assert track.kinds == "RRuuRRuuRR" * 2
    assert kinds(track.cached, "#0") == kinds(track.cached, "#1") == "RuRuR"
    assert track.cached.stats().steps == 10


@pytest.mark.parametrize("shared", ["object", "value"])
def test_two_branches_by_the_same_timestep(shared: str) -> None:
    track = Track(denoiser())
    for seed, t in enumerate(TIMES):
        moment = time(t)
        track(latents(seed), moment, PROMPT)
        track(latents(seed).clone(), moment if shared == "object" else moment.clone(), OTHER)
    assert track.kinds == "RRuuRRuuRR"


def test_branches_by_conditioning_rebuilt_at_every_step() -> None:
    track = Track(denoiser())
    for seed, t in enumerate(TIMES):
        x = latents(seed)
        track(x, time(t), PROMPT.clone())
        track(x, time(t), OTHER.clone())
    assert track.kinds == "RRuuRRuuRR"


def test_three_branches_in_another_order_at_each_step() -> None:
    track = Track(denoiser())
    prompts = [PROMPT, OTHER, torch.zeros(2, 8)]
    for seed, t in enumerate(TIMES):
        x = latents(seed)
        for i in range(3):
            track(x, time(t), prompts[(seed + i) % 3])
    assert track.kinds == "RRR" + "uuu" + "RRR" + "uuu" + "RRR"


def test_a_branch_with_an_argument_less() -> None:
    track = Track(denoiser())
    for seed, t in enumerate(TIMES):
        x = latents(seed)
        track(x, time(t), PROMPT)
        track(x, time(t))
    assert track.kinds == "RRuuRRuuRR"


def test_the_same_conditioning_twice_at_a_step_is_computed() -> None:
    track = Track(denoiser(3))
    calls = [(latents(seed + off), time(t), PROMPT) for seed, t in enumerate(TIMES) for off in (0, 50)]
    with pytest.warns(CacheWarning, match="same conditioning"):
        track.all(calls)
    assert track.kinds == "R" * 10
    assert "timestep" in track.reason


def test_unconditional_generations_interleaved_are_always_computed() -> None:
    track = Track(denoiser(3))
    calls = [(latents(seed + off), time(t)) for seed, t in enumerate(TIMES) for off in (0, 50)]
    with pytest.warns(CacheWarning, match="cache_context"):
        track.all(calls)
    assert track.kinds == "R" * 10


def test_interleaved_generations_with_other_prompts_and_timesteps_are_computed() -> None:
    track = Track(denoiser(3))
    for seed, t in enumerate(TIMES):
        track(latents(seed), time(t), PROMPT)
        track(latents(50 + seed), time(t - 50), OTHER)
    assert track.kinds == "R" * 10


def test_interleaved_generations_at_other_timesteps_are_computed_from_the_first_reversal_on() -> None:
    """That the second call is not the second step cannot be known; from the third on the timesteps tell."""
    track = Track(denoiser(6))
    for seed, t in enumerate(TIMES):
        track(latents(seed), time(t), PROMPT)
        track(latents(50 + seed), time(t - 350), PROMPT)
    assert track.kinds[2:] == "R" * 8


# --- refinement ---

HEUN = (900.0, 700.0, 700.0, 500.0, 500.0, 300.0, 300.0, 100.0)


def test_repeated_timesteps_are_computed() -> None:
    track = Track(denoiser())
    calls = [(latents(seed), time(t), PROMPT) for seed, t in enumerate(HEUN)]
    with pytest.warns(CacheWarning, match="refinement=True"):
        track.all(calls)
    assert track.kinds[2:] == "R" * 6


def test_repeated_timesteps_are_steps_where_the_sampler_refines() -> None:
    track = Track(denoiser(refinement=True))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed, t in enumerate(HEUN * 2):
            track(latents(seed), time(t), PROMPT)
    assert track.kinds == "RuRuRuRu" * 2
    assert track.cached.stats().steps == 8


def test_refinement_said_by_the_context() -> None:
    track = Track(denoiser())
    for seed, t in enumerate(HEUN):
        track(latents(seed), time(t), PROMPT, context="cond", refinement=True)
    assert track.kinds == "RuRuRuRu"


def test_a_sampler_that_comes_back_to_a_timestep_finds_what_was_kept_there() -> None:
    """Two rounds over the nodes at 800 and 700: the second takes up the first, node by node."""
    model, times = MODEL, (900.0, 800.0, 700.0, 800.0, 700.0)
    cached = denoiser(every=2, refinement=True)  # refreshed: 900, 700 in the first round, 700 in the second
    kept: dict[float, torch.Tensor] = {}
    for step, t in enumerate(times):
        x, shift = latents(step), torch.sin(time(t).reshape(-1, 1) * 0.01) + PROMPT
        entered = model.blocks[0](x, shift)
        if step % 2 == 0:
            left = entered
            for block in model.blocks[1:]:
                left = block(left, shift)
            kept[t] = left - entered
        else:
            kept[t] = kept.get(t, kept[times[step - 1]])  # a timestep that is new begins with the one before it
        assert torch.allclose(cached(x, time(t), PROMPT), model.head(entered + kept[t]), atol=1e-6)
    assert kinds(cached) == "RuRuR"
    assert torch.equal(kept[800.0], kept[900.0])
    assert cached.stats().cache_bytes == 2 * kept[900.0].nbytes  # of 900, which 800 took over, and of 700
