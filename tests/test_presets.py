"""Presets as data, and the limits that schedules set: caps on memory, windows of timesteps."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch

from diffcache_fx import (
    CachedDenoiser,
    CacheSchedule,
    Interval,
    Rule,
    ScheduleError,
    Taylor,
    Trunk,
    compile_with_cache,
    schedules,
)

from .conftest import equal, sample
from .deciding import (
    bits,
    denoiser,
    generate,
    plain,
    start,
)

pytestmark = pytest.mark.usefixtures("one_thread")

PRESETS = {
    "mask": {"bits": [1, 0]},
    "smooth_cache": {"mlp": [1, 0]},
    "block_cache": {"bits": [[1, 1], [0, 1]]},
    "l2p": {"rows": [[1.0], [1.5, -0.5]]},
    "tea_cache": {"coefficients": "flux"},
    "first_block_cache": {"forecast": Taylor(2)},
    "di_cache": {"minus_input": True},
    "faster_cache": {"second": True},
    "t_gate": {"halves": True},
}


@pytest.mark.parametrize("name", schedules.list())
def test_every_preset_survives_json(name: str) -> None:
    schedule = schedules.get(name, **PRESETS.get(name, {}))
    again = CacheSchedule.from_json(schedule.to_json())
    assert again == schedule
    assert hash(again) == hash(schedule)
    assert [type(rule.guard) for rule in again.rules] == [type(rule.guard) for rule in schedule.rules]
    data = schedule.to_dict()
    if name in ("first_block_cache", "tea_cache", "db_cache"):
        assert data["rules"][0]["guard"]["of"]["kind"] in ("blocks_output", "modulated_input")
        data["rules"][0]["guard"]["of"]["kind"] = "block_output"
        with pytest.raises(ScheduleError, match="unknown quantity 'block_output'"):
            CacheSchedule.from_dict(data)


def capped(most: int | None) -> CachedDenoiser:
    schedule = dataclasses.replace(schedules.first_block_cache(0.5, forecast=Taylor(2)), memory_cap=most)
    cached = denoiser(schedule, example_inputs=((start(0), torch.tensor(1.0)), {}))
    generate(cached)
    return cached


def test_a_memory_cap_shortens_the_history(caplog: pytest.LogCaptureFixture) -> None:
    one = 2 * 8 * 4
    assert capped(None).explain().cache_bytes == 4 * one  # three refreshes, and what the guard keeps
    with caplog.at_level(logging.WARNING):
        cached = capped(3 * one)
    assert cached.explain().cache_bytes == 3 * one
    assert "2 of 3 past refreshes" in caplog.text
    assert "u" in bits(cached)
    assert capped(2 * one).explain().cache_bytes == 2 * one
    with pytest.raises(ScheduleError) as error:
        capped(2 * one - 1)
    for word in (f"at least {2 * one} bytes", f"memory_cap is {2 * one - 1}", "raise the cap"):
        assert word in str(error.value)


def test_a_memory_cap_counts_what_the_guard_keeps() -> None:
    most = 3 * 2 * 8 * 4
    assert capped(most).stats().cache_bytes <= most


def test_a_window_of_timesteps() -> None:
    rule = Rule(Trunk(first=1), Interval(2, window=(0.3, 0.8)), storage="residual")
    for decide in ("host", "graph"):
        cached = denoiser(CacheSchedule("window", (rule,)), decide)
        outputs = generate(cached)  # timesteps 1, 0.95, 0.9, ...: inside from step 5 (0.75) to 13 (0.35)
        assert bits(cached) == "RRRRRuRuRuRuRu" + "RRRRRR"
        assert equal(outputs[:5], plain()[:5])


def test_attention_is_broadcast_inside_its_window() -> None:
    """PAB on a text transformer: self-attention every second step, cross-attention every third, between timesteps."""
    model = sample("PixArtTransformer2DModel")
    cached = compile_with_cache(
        model.module, schedules.pab(2, 3, window=(100, 850)), backend="eager", max_programs=None
    )
    args, kwargs = model.args, dict(model.kwargs)
    for moment in (950, 900, 840, 600, 400, 200, 100, 50):
        with torch.no_grad():
            cached(*args, **{**kwargs, "timestep": torch.full_like(kwargs["timestep"], moment)})
    found = {}
    for kind in ("attn1", "attn2"):
        reused = [[name for name in d.reused if name.endswith(kind)] for d in cached.stats().decisions]
        assert {len(names) for names in reused} == {0, 6}
        found[kind] = "".join("u" if names else "R" for names in reused)
    assert found == {"attn1": "RRRuRuRR", "attn2": "RRuRuuRR"}
