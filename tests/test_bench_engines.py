"""bench.engines: each cell is run or says why not, and its figures are of what it ran."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import engines
from bench.engine_table import Cell, cell_of, markdown, plain
from diffcache_fx import schedules

pytestmark = pytest.mark.usefixtures("one_thread")


def test_cells_of_the_demo_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = {
        engines.UNCACHED: (schedules.always(), ("pair",)),
        "interval 2": (schedules.interval(2), ("pair", "branch")),
    }
    monkeypatch.setattr(engines, "SCHEDULES", few)
    monkeypatch.setattr(engines, "BACKEND", "eager")  # compiling it is tested elsewhere
    cells = engines.cells_of("digits", 6, "cpu", ["torch.compile", "onnxruntime", "tensorrt"], 1)
    by_key = {cell.key: cell for cell in cells}
    assert len(cells) == 2 + 3 + 3 + 3
    for cell in cells:
        assert bool(cell.reason) == (cell.runtime in ("tensorrt", "aot_inductor"))
    for form in ("pair", "branch"):
        cell = by_key[f"onnxruntime | interval 2 | {form}"]
        assert cell.latency_s is not None
        assert cell.latency_s > 0
        assert cell.ideal is not None
        assert cell.ideal > 1.5
        assert cell.reuse_cost is not None
        assert cell.reuse_flops is not None
        assert 0 < cell.reuse_flops < 0.3
        assert 0 < cell.reuse_cost < 1
        assert cell.fidelity["psnr_db"] > 20
    sheet = markdown("digits", cells)
    assert sheet.count("not run: an engine runs on a GPU") == 3
    assert plain(by_key["tensorrt | uncached | pair"])["run"] is False
    known = json.loads(json.dumps([plain(cell) for cell in cells]))
    record = {"models": {"digits": {"title": "digits", "steps": 6, "cells": known}}}
    assert engines.sheet(record).endswith(markdown("digits", cells))
    assert [cell_of(cell).key for cell in known] == [cell.key for cell in cells]


def test_what_was_not_run_has_no_figures() -> None:
    cell = Cell("tensorrt", "uncached", "pair", reason="there is none")
    assert plain(cell) == {
        "runtime": "tensorrt",
        "schedule": "uncached",
        "form": "pair",
        "reason": "there is none",
        "run": False,
    }
    assert "not run: there is none" in markdown("x", [cell])
