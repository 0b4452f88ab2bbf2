"""What contexts and step counts say of a call goes before what is recognised; and what reading a timestep costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diffcache_fx import CallError
from diffcache_fx.recognition import Arguments, Hints, Recognizer

from .tracked import OTHER, PROMPT, TIMES, Track, denoiser, latents, time

pytestmark = pytest.mark.usefixtures("one_thread", "no_grad")


# --- contexts and step counts ---


def test_contexts_with_step_index() -> None:
    track = Track(denoiser(3))
    for _ in range(2):
        for step, t in enumerate(TIMES):
            track(latents(step), time(t), PROMPT, context="cond", step_index=step)
            track(latents(step), time(t), OTHER, context="uncond", step_index=step)
    assert track.kinds == "RRuuuuRRuu" * 2
    assert [d.step for d in track.cached.stats().decisions] == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    assert track.cached.stats().steps == 10


def test_a_step_index_that_falls_starts_a_generation() -> None:
    track = Track(denoiser(4))
    for step, t in ((0, 900.0), (1, 700.0), (2, 500.0), (1, 600.0), (2, 400.0)):
        track(latents(step), time(t), PROMPT, context="cond", step_index=step)
    assert track.kinds == "RuuRu"


def test_a_context_recognises_generations_by_the_timestep_too() -> None:
    track = Track(denoiser())
    for seed, t in enumerate(TIMES[:3] + TIMES):
        track(latents(seed), time(t), PROMPT, context="cond")
    assert track.kinds == "RuR" + "RuRuR"


def test_other_conditioning_in_a_context_is_another_generation() -> None:
    track = Track(denoiser(6))
    for seed, t in enumerate(TIMES[:3]):
        track(latents(seed), time(t), PROMPT, context="cond")
    for seed, t in enumerate((450.0, 350.0)):
        track(latents(seed), time(t), OTHER, context="cond")
    assert track.kinds == "RuuRu"


def test_step_count() -> None:
    track = Track(denoiser(3, num_steps=4))
    for seed in range(8):
        track(latents(seed), time(900.0 - 100 * seed), PROMPT)
    assert track.kinds == "RuuRRuuR"


def test_step_count_from_the_context() -> None:
    track = Track(denoiser(3))
    for seed in range(8):
        track(latents(seed), time(900.0 - 100 * seed), PROMPT, context="cond", num_inference_steps=4)
    assert track.kinds == "RuuRRuuR"


def test_step_count_and_an_early_end() -> None:
    track = Track(denoiser(4, num_steps=5))
    for seed, t in enumerate(TIMES[:2] + TIMES):
        track(latents(seed), time(t), PROMPT)
    assert track.kinds == "Ru" + "RuuuR"


@pytest.mark.parametrize("how", ["reset", "_reset_stateful_cache"])
def test_reset(how: str) -> None:
    track = Track(denoiser(5))
    for seed, t in enumerate((900.0, 800.0)):
        track(latents(seed), time(t), PROMPT)
    assert track.cached.stats().steps == 2
    getattr(track.cached, how)()
    assert track.cached.stats().steps == 2  # readable until the next call
    for seed, t in enumerate((700.0, 600.0)):
        track(latents(seed), time(t), PROMPT)
    assert track.kinds == "RuRu"
    assert track.cached.stats().steps == 2


def test_a_context_needs_a_proper_name() -> None:
    cached = denoiser()
    for name in ("", "#0", 3):
        with pytest.raises(CallError, match="name"), cached.cache_context(name):  # type: ignore[arg-type]
            pass


def test_unknown_hints_are_ignored_and_contexts_nest() -> None:
    track = Track(denoiser())
    with track.cached.cache_context("outer", sigma=0.5, anything=1):
        for seed, t in enumerate(TIMES):
            track(latents(seed), time(t), PROMPT, context="inner", sigma=1.0)
            track(latents(seed), time(t), OTHER)
    assert track.kinds == "RRuuRRuuRR"
    assert {d.context for d in track.cached.stats().decisions} == {"inner", "outer"}


def test_a_context_is_left_when_a_call_fails() -> None:
    cached = denoiser()
    with pytest.raises(ZeroDivisionError), cached.cache_context("cond"):
        raise ZeroDivisionError
    cached(latents(0), time(900.0), PROMPT)
    assert cached.stats().decisions[0].context == "#0"


# --- reading the timestep on an accelerator ---


class OnDevice:
    """Stands for a timestep on an accelerator: reading it is counted."""

    device = torch.device("cuda")

    def __init__(self, value: float) -> None:
        self.value, self.reads = value, 0

    def numel(self) -> int:
        return 1

    def detach(self) -> OnDevice:
        return self

    def amax(self) -> float:
        self.reads += 1
        return self.value


@pytest.mark.parametrize(
    ("num_steps", "hint", "reads"),
    [
        (None, None, 1),
        (5, None, 0),
        (None, {"step_index": 0}, 0),
        (None, {"num_steps": 5}, 0),
        (None, {"timestep": 900.0}, 0),
    ],
)
def test_device_reads(num_steps: int | None, hint: dict[str, Any] | None, reads: int) -> None:
    recognizer = Recognizer(num_steps=num_steps)
    hints = Hints("cond", **hint) if hint is not None else None
    moment = OnDevice(900.0)
    place = recognizer.locate(Arguments(latents(0), moment, (PROMPT,)), ("key",), hints)  # type: ignore[arg-type]
    assert place.new_generation
    assert moment.reads == recognizer.syncs == reads


def test_a_gap_in_the_step_index_is_computed() -> None:
    """Guidance in some steps only: what a branch kept from long ago is not what the plan meant to reuse."""
    cached = denoiser(2)
    for step in (0, 1, 7):
        with torch.no_grad(), cached.cache_context("uncond", step_index=step):
            cached(latents(step), torch.full((2,), 900.0 - 100 * step))
    assert [bool(decision.reused) for decision in cached.stats().decisions] == [False, True, False]
    assert cached.stats().decisions[-1].reason == "steps were left out"
