"""Published sizes on fake tensors: captured, cut and explained without weights in memory."""

from __future__ import annotations

import pytest

from bench.coverage import measure_in_process
from bench.zoo import published

LIMIT_SECONDS, LIMIT_GIB = 60.0, 4.0
# Parameters, and the share of a step's FLOPs that reusing the whole trunk saves at least. The rest: `bench.coverage`.
FAST = {"SD-1.5": (0.86e9, 0.90), "SD3-medium": (2.03e9, 0.95)}


@pytest.mark.parametrize("name", FAST)
def test_published_size_is_captured_cut_and_explained(name: str) -> None:
    assert name in published()
    row = measure_in_process(name)
    assert "failure" not in row, row["failure"]
    parameters, share = FAST[name]
    assert row["parameters"] == pytest.approx(parameters, rel=0.01)
    assert row["share"] >= share
    # Processor time: what others do on this machine is not the compiler's.
    assert row["capture_cpu"] < LIMIT_SECONDS
    assert row["regions_seconds"] < LIMIT_SECONDS
    assert row["explain_seconds"] < LIMIT_SECONDS
    assert row["peak_gib"] < LIMIT_GIB
    assert 0 < row["cut_bytes"] < 2**30
