"""Cache state: slots written in turn, positions newest first, rows permuted instead of tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffcache_fx import Linear
from diffcache_fx.program import CutValue, Region
from diffcache_fx.sizes import Sizes
from diffcache_fx.state import CacheState, RegionHistory


def region(slots: int = 2, name: str = "r") -> Region:
    cpu = torch.device("cpu")
    deep = CutValue("n", (2,), torch.float32, cpu, slots=slots)
    flat = CutValue("m", (3,), torch.int64, cpu)
    return Region(name, frozenset({"n", "m"}), (deep, flat))


def values(step: float) -> list[torch.Tensor]:
    return [torch.full((2,), step), torch.full((3,), int(step))]


@settings(max_examples=50, deadline=None, derandomize=True, database=None)
@given(slots=st.integers(1, 4), steps=st.lists(st.floats(0, 50), min_size=1, max_size=9))
def test_rows_follow_the_slots(slots: int, steps: list[float]) -> None:
    history = RegionHistory(region(slots))
    for step in steps:
        history.refresh(values(step), step)
    newest_first = steps[::-1][:slots]
    assert history.positions == newest_first
    for age, position in enumerate(newest_first):
        weights = [float(i == age) for i in range(len(newest_first))]
        row = history.row(weights)
        assert len(row) == slots
        mixed = sum(w * t for w, t in zip(row, history.slots[0], strict=True))
        assert torch.equal(mixed, torch.full((2,), position))
    assert torch.equal(history.slots[1][0], values(steps[-1])[1])  # the value of one slot is the newest


def test_empty_slots_hold_numbers() -> None:
    history = RegionHistory(region(3))
    assert not history.filled
    history.refresh(values(1.0), 1.0)
    assert [torch.equal(t, torch.zeros(2)) for t in history.slots[0]] == [False, True, True]
    assert history.row(Linear().weights(history.positions, 2.0)) == [1.0, 0.0, 0.0]


def test_slots_share_no_memory() -> None:
    history = RegionHistory(region(3))
    for step in (0.0, 1.0, 2.0, 3.0, 4.0):
        history.refresh(values(step), step)
    places = {t.untyped_storage().data_ptr() for slots in history.slots for t in slots}
    assert len(places) == 4
    assert history.nbytes == sum(t.untyped_storage().nbytes() for slots in history.slots for t in slots) == 48


def test_a_guarded_program_moves_the_history_itself() -> None:
    history = RegionHistory(region(2))
    for position in (0.0, None, 2.0, 3.0):
        history.shift(position)
    assert history.positions == [3.0, 2.0]
    assert history.ages == [0, 1]
    assert history.row([0.25, 0.75]) == [0.25, 0.75]


def test_missing_regions_and_zeros() -> None:
    state = CacheState([region(name="a"), region(name="b")])
    assert state.missing() == {"a", "b"}
    state.histories["a"].refresh(values(1.0), 1.0)
    assert state.missing() == {"b"}
    zeros = state.zeros("b", Sizes({}))
    assert [t.shape for slots in zeros for t in slots] == [(2,), (2,), (3,)]
    assert all(not t.any() for slots in zeros for t in slots)
    assert state.missing() == {"b"}  # zeros are no refreshed values
    assert state.zeros("b", Sizes({}))[0][0] is zeros[0][0]
    assert state.nbytes == state.histories["a"].nbytes + state.histories["b"].nbytes > 0


def test_zeros_are_of_the_sizes_of_the_call() -> None:
    value = CutValue("n", ("s0", 3, "s0*(s1//2)"), torch.float32, torch.device("cpu"), slots=1)  # type: ignore[arg-type]
    state = CacheState([Region("r", frozenset({"n"}), (value,))])
    ((zeros,),) = state.zeros("r", Sizes({"s0": 4, "s1": 5}))
    assert zeros.shape == (4, 3, 8)


def test_bytes_of_a_region_count_all_slots() -> None:
    assert region(1).nbytes == 8 + 24
    assert region(3).nbytes == pytest.approx(24 + 24)
