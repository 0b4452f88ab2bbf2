"""Schedules: strictly validated data that survives a round trip; guards and forecasts as their equations say."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffcache_fx import (
    Always,
    Blocks,
    CacheSchedule,
    Hold,
    Interval,
    Linear,
    Listed,
    Mask,
    Modules,
    Rule,
    Scale,
    ScheduleError,
    Sublayers,
    Trunk,
    schedules,
)
from diffcache_fx.schedules import resolve

selections = st.one_of(
    st.builds(Trunk, first=st.integers(0, 3), last=st.floats(0.1, 0.9), branch=st.integers(0, 2)),
    st.builds(Blocks, first=st.floats(0.1, 0.9), last=st.integers(0, 3), each=st.booleans()),
    st.builds(Scale, st.integers(0, 4)),
    st.builds(Sublayers, kinds=st.sampled_from([("mlp",), ("attention", "cross_attention")])),
    st.just(Modules(("*.attn1", "blocks.?.ff"))),
    st.builds(Listed, st.just((("a.0", "a.1"), ("b",))), st.booleans()),
)
guards = st.one_of(
    st.just(Always()),
    st.builds(Interval, st.integers(1, 9), begin=st.integers(0, 5), end=st.none() | st.floats(0.2, 0.9)),
    st.just(Mask(((True, False), (False, True)))),
)
rules = st.builds(
    Rule, selections, guards, st.sampled_from([Hold(), Linear()]), st.sampled_from(["auto", "value", "residual"])
)
any_schedule = st.builds(
    CacheSchedule,
    name=st.sampled_from(["a", "schedule of mine"]),
    rules=st.lists(rules, min_size=1, max_size=3).map(tuple),
    warm_up=st.integers(1, 5),
    cool_down=st.integers(0, 5),
    longest_reuse=st.none() | st.integers(1, 9),
)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(any_schedule)
def test_round_trip(schedule: CacheSchedule) -> None:
    assert CacheSchedule.from_json(schedule.to_json()) == schedule
    assert CacheSchedule.from_dict(schedule.to_dict()) == schedule
    assert hash(CacheSchedule.from_json(schedule.to_json())) == hash(schedule)


def test_a_saved_schedule_is_plain_json(tmp_path: Path) -> None:
    schedule = schedules.delta_dit(4)
    file = schedule.save_pretrained(tmp_path / "new")
    data = json.loads(file.read_text())
    assert data["format"] == "diffcache_fx.schedule"
    assert data["version"] == 1
    assert [rule["guard"]["kind"] for rule in data["rules"]] == ["interval", "interval"]
    for source in (file, file.parent):
        assert CacheSchedule.from_pretrained(source) == schedule
        assert resolve(source) == resolve(str(source)) == schedule
    assert [path.name for path in file.parent.iterdir()] == ["cache_schedule.json"]


def test_schedules_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedules.interval(2).warm_up = 3  # type: ignore[misc]


# What factories cannot do without.
NEEDED: dict[str, dict[str, Any]] = {
    "mask": {"bits": [1, 0]},
    "block_cache": {"bits": [[1, 1], [1, 0]]},
    "smooth_cache": {"attention": [1, 0]},
    "l2p": {"rows": [[1.0], [1.0]]},
}


@pytest.mark.parametrize("name", schedules.list())
def test_every_factory_by_name(name: str) -> None:
    options: dict[str, Any] = NEEDED.get(name, {})
    schedule = schedules.get(name, **options)
    assert schedule.name == name
    assert getattr(schedules, name)(**options) == schedule
    assert CacheSchedule.from_json(schedule.to_json()) == schedule
    if not options:
        assert resolve(name) == schedule


def test_the_default_is_named() -> None:
    assert resolve(None) == schedules.default()
    assert schedules.default().warm_up == 3


def bits(guard: Any, steps: int, total: int | None = None, warm_up: int = 1) -> str:
    return "".join("R" if guard.refresh(s, total, 0, warm_up) else "u" for s in range(steps))


def test_interval_counts_from_the_end_of_warm_up() -> None:
    assert bits(Interval(3), 8) == "RuuRuuRu"
    assert bits(Interval(3), 8, warm_up=3) == "RRRuuRuu"
    assert bits(Interval(1), 4) == "RRRR"
    assert bits(Interval(2, begin=3, end=7), 10) == "RRRRuRuRRR"
    assert bits(Interval(2, begin=0.5), 8, total=8) == "RRRRRuRu"


def test_mask_says_each_step() -> None:
    assert bits(Mask((1, 0, 0, 1)), 4) == "RuuR"  # type: ignore[arg-type]
    assert bits(Mask((1, 0)), 4) == "RuRR"  # type: ignore[arg-type]  # past its end everything is computed
    wide = Mask(((True, True), (False, True)))
    assert [wide.refresh(1, None, region, 1) for region in (0, 1)] == [False, True]
    assert bits(Always(), 3) == "RRR"


def test_hold_and_linear_are_rows_of_weights() -> None:
    assert Hold().weights([4.0, 2.0], 5.0) == (1.0, 0.0)
    assert Linear().weights([4.0], 5.0) == (1.0,)
    assert Linear().weights([4.0, 2.0], 5.0) == (1.5, -0.5)
    assert Linear().weights([4.0, 4.0], 5.0) == (1.0, 0.0)  # a sampler may refine at one position
    for step in (5.0, 6.5):  # a straight line is continued exactly
        weights = Linear().weights([4.0, 1.0], step)
        assert sum(w * (3 * p + 2) for w, p in zip(weights, (4.0, 1.0), strict=True)) == pytest.approx(3 * step + 2)


def test_masks_of_one_schedule_cover_the_same_steps() -> None:
    short, long = Rule(Trunk(), Mask(((True,), (False,)))), Rule(Scale(1), Mask(((True,),)))
    assert CacheSchedule(rules=(short,)).mask_length == 2
    with pytest.raises(ScheduleError, match="same steps"):
        _ = CacheSchedule(rules=(short, long)).mask_length


def test_slots_are_the_most_any_forecast_asks_for() -> None:
    assert CacheSchedule(rules=(Rule(), Rule(Scale(1), Interval(), Linear()))).slots == 2
    assert schedules.interval(2).slots == 1


def test_one_rule_is_enough_and_a_name_may_have_options() -> None:
    rule = Rule(guard=Interval(4))
    assert CacheSchedule("mine", rule) == CacheSchedule("mine", (rule,))  # type: ignore[arg-type]
    assert schedules.resolve("interval:every=4,forecast=linear") == schedules.interval(4, forecast=Linear())
