"""ExchangeableDenoiser: another schedule on compiled programs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from diffcache_fx import (
    CacheSchedule,
    CalibrationError,
    Hold,
    Linear,
    ScheduleError,
    Trunk,
    compile_with_cache,
    fit_scale_shift,
    schedules,
)
from diffcache_fx.compile import Options
from diffcache_fx.exchange import ExchangeableDenoiser

from .toy import MODEL, STEPS, Denoiser, sampler

pytestmark = pytest.mark.usefixtures("one_thread")


def denoiser(schedule: CacheSchedule, **options: Any) -> ExchangeableDenoiser:
    return ExchangeableDenoiser(MODEL, schedule, Options("eager", STEPS, **options))


def drawn(cached: Any) -> torch.Tensor:
    with torch.no_grad():
        return sampler(cached, 1)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (schedules.first_block_cache(0.05), schedules.first_block_cache(0.4)),
        (schedules.interval(2, forecast=Linear()), schedules.mask([1, 0, 0, 1, 0, 1] * 2, forecast=Hold())),
        (
            schedules.block_cache([[1] * 6, [0] * 6] * 6),
            schedules.block_cache([[1] * 6, [0, 1, 0, 1, 0, 1], [1, 1, 0, 0, 0, 0]] * 4),
        ),
    ],
    ids=["threshold", "plan", "rows"],
)
def test_it_does_what_one_compiled_for_it_does(first: CacheSchedule, second: CacheSchedule) -> None:
    cached = denoiser(first)
    drawn(cached)
    cached.exchange(second)
    found = drawn(cached)
    fresh = compile_with_cache(MODEL, second, backend="eager", num_steps=STEPS)
    assert torch.equal(found, drawn(fresh))
    assert [d.reused for d in cached.stats().decisions] == [d.reused for d in fresh.stats().decisions]
    before = cached.stats().compilations
    for schedule in (first, second, first):
        cached.exchange(schedule)
        drawn(cached)
    assert cached.stats().compilations == before


def test_before_the_first_call() -> None:
    """What is captured is what it was made for, however far the first schedule that it follows looks back."""
    cached, held = denoiser(schedules.interval(3, forecast=Linear())), schedules.interval(3)
    cached.exchange(held)
    fresh = compile_with_cache(MODEL, held, backend="eager", num_steps=STEPS)
    assert torch.equal(drawn(cached), drawn(fresh))
    cached.exchange(schedules.interval(2, forecast=Linear()))
    fresh = compile_with_cache(MODEL, schedules.interval(2, forecast=Linear()), backend="eager", num_steps=STEPS)
    assert torch.equal(drawn(cached), drawn(fresh))


def test_predicates_of_the_graph_are_data() -> None:
    first, second = (schedules.block_cache([[1] * 6, row] * 6) for row in ([0] * 6, [0, 1, 1, 0, 1, 0]))
    cached = denoiser(first, decide="graph")
    drawn(cached)
    cached.exchange(second)
    assert torch.equal(drawn(cached), drawn(compile_with_cache(MODEL, second, backend="eager", decide="graph")))


@pytest.mark.parametrize(
    "other",
    [
        schedules.first_block_cache(0.05, forecast=Linear()),
        schedules.tea_cache(0.05),
        schedules.interval(2),
        schedules.interval(2, regions=Trunk(first=0), storage="residual"),
    ],
    ids=["history", "signal", "guard", "regions"],
)
def test_other_programs_are_refused(other: CacheSchedule) -> None:
    cached = denoiser(schedules.first_block_cache(0.05))
    with pytest.raises(ScheduleError, match="needs other programs than 'first_block_cache'"):
        cached.exchange(other)
    drawn(cached)


def test_a_threshold_inside_the_graph_stays() -> None:
    with pytest.raises(ScheduleError, match="part of the graph"):
        denoiser(schedules.first_block_cache(0.05), decide="graph").exchange(schedules.first_block_cache(0.1))


class TestWhatDoesNotFit:
    def test_a_mask_of_another_length(self) -> None:
        cached = denoiser(schedules.interval(2))
        drawn(cached)
        with pytest.raises(ScheduleError, match="covers 6 steps and the run has 12"):
            cached.exchange(schedules.mask([1, 0] * 3))
        assert torch.equal(drawn(cached), drawn(denoiser(schedules.interval(2))))

    def test_a_schedule_of_another_model(self) -> None:
        other = Denoiser().eval()
        other.head.weight.data.mul_(2.0)
        made = fit_scale_shift(other, sampler, schedules.mask([1, 0] * 6))
        rule = dataclasses.replace(made.rules[0], correction=None)
        with pytest.raises(CalibrationError, match="other weights"):
            denoiser(schedules.interval(2)).exchange(dataclasses.replace(made, rules=(rule,)))
