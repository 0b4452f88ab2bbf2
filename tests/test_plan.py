"""Plans: schedules resolved step by step, and the programs that serve them."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffcache_fx import Blocks, CacheSchedule, Interval, Mask, Modules, Rule, ScheduleError, schedules
from diffcache_fx.plan import HORIZON, Plan, choose_programs
from diffcache_fx.program import Region


def regions(*rules: int) -> list[Region]:
    return [Region(f"r{i}", frozenset({f"n{i}"}), rule=rule) for i, rule in enumerate(rules)]


def drawn(plan: Plan, steps: int, region: str = "r0") -> str:
    return "".join("u" if region in plan.reused(step) else "R" for step in range(steps))


def test_interval_with_limits() -> None:
    assert drawn(Plan(schedules.interval(4), regions(0)), 9) == "RuuuRuuuR"
    assert drawn(Plan(schedules.interval(4, warm_up=3), regions(0)), 9) == "RRRuuuRuu"
    assert drawn(Plan(schedules.interval(4, cool_down=3), regions(0), 9), 9) == "RuuuRuRRR"
    assert drawn(Plan(schedules.interval(9, longest_reuse=2), regions(0)), 9) == "RuuRuuRuu"


def test_each_rule_decides_for_its_own_regions() -> None:
    schedule = CacheSchedule(rules=(Rule(guard=Interval(2)), Rule(Modules(("x",)), Interval(3))))
    plan = Plan(schedule, regions(0, 1, 0))
    assert drawn(plan, 6, "r0") == drawn(plan, 6, "r2") == "RuRuRu"
    assert drawn(plan, 6, "r1") == "RuuRuu"


def test_a_mask_with_a_bit_for_each_region() -> None:
    plan = Plan(schedules.mask([(0, 0), (0, 1), (1, 0)], regions=Blocks(each=True)), regions(0, 0))
    assert plan.num_steps == 3
    assert drawn(plan, 3, "r0") == "RuR"  # the first step computes whatever the mask says
    assert drawn(plan, 3, "r1") == "RRu"
    assert len(plan.rows()) == 3


def test_rows_reach_to_the_horizon_where_the_length_is_unknown() -> None:
    assert len(Plan(schedules.interval(3), regions(0)).rows()) == HORIZON
    assert len(Plan(schedules.interval(3), regions(0), 10).rows()) == 10


def test_delta_dit_changes_ends_at_the_gate() -> None:
    plan = Plan(schedules.delta_dit(2, gate=0.5), regions(0, 1), 8)
    assert drawn(plan, 8, "r0") == "RuRuRRRR"
    assert drawn(plan, 8, "r1") == "RRRRRuRu"


@pytest.mark.parametrize(
    ("schedule", "steps", "word"),
    [
        (schedules.mask([1, 0, 1]), 4, "one entry for each step"),
        (schedules.mask([(1, 1, 1), (0, 0, 0)]), None, "one for each region"),
        (schedules.interval(2, cool_down=1), None, "num_steps="),
        (schedules.delta_dit(2), None, "num_steps="),
    ],
)
def test_what_does_not_fit_is_refused(schedule: CacheSchedule, steps: int | None, word: str) -> None:
    with pytest.raises(ScheduleError, match=word):
        Plan(schedule, regions(0, 0), steps)


def test_merging_takes_the_cheapest_pair() -> None:
    a, b, both = frozenset("a"), frozenset("b"), frozenset("ab")
    rows = [frozenset(), both, both, a, both, b]
    weight = {"a": 60.0, "b": 30.0}
    choice = choose_programs(rows, weight, 100.0, 3)
    assert set(choice.programs) == {frozenset(), both, a}  # giving up b costs 30, a 60
    assert choice.rows == 4
    assert choice.serve(b, weight) == frozenset()
    assert choice.extra == pytest.approx(30 / (100 + 3 * 10 + 40 + 70))
    assert choose_programs(rows, weight, 100.0, 1).programs == (frozenset(),)
    assert set(choose_programs(rows, weight, 100.0, None).programs) == {frozenset(), a, b, both}


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    every=st.integers(1, 6),
    warm_up=st.integers(1, 4),
    cool_down=st.integers(0, 4),
    limit=st.none() | st.integers(1, 4),
    steps=st.integers(1, 20),
    mask=st.none() | st.lists(st.booleans(), min_size=20, max_size=20).filter(any),
)
def test_limits_hold_whatever_the_guard_says(
    every: int, warm_up: int, cool_down: int, limit: int | None, steps: int, mask: list[bool] | None
) -> None:
    guard = Interval(every) if mask is None else Mask(tuple((bit,) for bit in mask[:steps]) or ((True,),))
    if mask is not None and not any(mask[:steps]):
        return
    schedule = CacheSchedule(rules=(Rule(guard=guard),), warm_up=warm_up, cool_down=cool_down, longest_reuse=limit)
    line = drawn(Plan(schedule, regions(0), steps), steps)
    assert line[: min(warm_up, steps)] == "R" * min(warm_up, steps)
    assert line[max(steps - cool_down, 0) :] == "R" * min(cool_down, steps)
    assert limit is None or "u" * (limit + 1) not in line
    if mask is not None:
        assert all(letter == "R" for letter, bit in zip(line, mask, strict=False) if bit)


def test_steps_may_be_asked_for_in_any_order() -> None:
    schedule = schedules.interval(5, longest_reuse=2)
    forward, backward = Plan(schedule, regions(0)), Plan(schedule, regions(0))
    line = drawn(forward, 12)
    assert [("u" if "r0" in backward.reused(step) else "R") for step in reversed(range(12))] == list(line[::-1])
