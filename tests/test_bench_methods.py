"""`bench.methods` with a trivial sampler: settings, plans, controls, resuming, timing and the report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.method_calibration import LOOKAHEAD, Calibration
from bench.method_report import Report
from bench.method_runs import Drawn, Runs
from bench.method_settings import Setting, even_grid, even_hold, known, methods, same_cost, uncached
from bench.methods import forget, quality, report, timing, with_controls
from bench.quality import FrechetDistance
from diffcache_fx import ScheduleError, schedules

pytestmark = pytest.mark.usefixtures("one_thread")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_settings_have_keys_of_their_own() -> None:
    keys = [setting.key for setting in methods()]
    assert len(set(keys)) == len(keys)
    assert all(key.replace("-", "").replace(".", "").isalnum() for key in keys)
    assert {setting.factory for setting in known()} <= set(schedules.list())
    assert {setting.method for setting in known(["fora"])} == {"fora"}
    assert len({setting.method for setting in known(["taylor_seer"])}) == 2
    with pytest.raises(ValueError, match="no method is called 'forra'"):
        known(["forra"])


def test_settings_make_schedules() -> None:
    table = [[float(k + 1)] * LOOKAHEAD for k in range(10)]
    calibration = Calibration(
        [1.0] * 10, [0.0, 0.0, 0.0, 1.0, 0.0], {"attention": table, "mlp": table}, [[0.2] * 12] * 10
    )
    refused = []
    for setting in known():
        try:
            assert setting.schedule(lambda: calibration) is not None
        except ScheduleError:
            refused.append(setting.method)
    assert not refused


def test_plans() -> None:
    inf = float("inf")
    grows = [[inf, inf, inf], [0.1, inf, inf], [0.1, 0.2, inf]] + [[0.1, 0.2, 0.3]] * 5
    found = Calibration([], [], {"mlp": grows}, [[inf, inf]] + [[0.1, 0.4]] * 5)
    assert found.smooth_plan(0.05)["mlp"] == [1] * 8
    assert found.smooth_plan(0.1)["mlp"] == [1, 0] * 4
    assert found.smooth_plan(9)["mlp"] == [1, 0, 0, 0, 1, 0, 0, 0]
    assert found.block_plan(0.25) == [[1, 1], [0, 1], [0, 1], [1, 1], [0, 1], [0, 1]]


def test_controls_at_the_same_cost() -> None:
    hold = even_hold(3, 10)
    assert hold.options == {"bits": (1, 0, 0, 1, 0, 0, 1, 0, 0, 0)}
    assert hold.control
    steps, even = same_cost(2.0, 0.1, 50)
    assert (steps.steps, steps.label) == (25, "25 steps")
    assert even.key == even_hold(22, 50).key  # (22 + 28 x 0.1) / 50 = 0.496
    assert same_cost(1.0, 0.1, 50) == []
    assert [setting.label for setting in even_grid(50)] == ["25 of 50", "17 of 50", "13 of 50", "10 of 50", "8 of 50"]


class Trivial(Runs):
    """The demo without its denoiser: images are a function of index and setting, and drawing is counted."""

    def __init__(self, work: Path, **options: Any) -> None:
        super().__init__(work, **{"samples": 20, "steps": 10, "batch": 10, **options})
        self.drawn: list[tuple[str, int]] = []
        self.fail_at: tuple[str, int] | None = None

    @property
    def step_flops(self) -> tuple[int, int]:  # type: ignore[override]
        return 1000, 100

    def denoiser(self, setting: Setting, images: int) -> Any:
        setting.schedule(lambda: self.calibration)
        return setting

    def flops(self, denoiser: Any, setting: Setting) -> tuple[int, int]:
        every = setting.arguments(lambda: self.calibration).get("interval", 1)
        return 1000 * (setting.steps or self.steps) // every, 1000 * self.steps

    def draw(self, denoiser: Any, setting: Setting, first: int, count: int, told: Any = None) -> Tensor:
        if self.fail_at == (setting.key, first):
            raise KeyboardInterrupt
        self.drawn.append((setting.key, first))
        if told is not None:
            told(setting.steps or self.steps, 0)
        clean = torch.stack([noise(1, 32, 32, seed=index) for index in range(first, first + count)])
        return (clean + (0.0 if setting.reference else 0.01 * len(setting.key))).clamp(-1, 1)


FORA = Setting("fora", "interval 2", "fora", {"interval": 2})


def test_a_finished_setting_is_not_run_again(tmp_path: Path) -> None:
    runs = Trivial(tmp_path)
    record = runs.quality(FORA)
    assert runs.drawn.count((FORA.key, 0)) == runs.drawn.count((FORA.key, 10)) == 1
    assert record["ideal_speedup"] == 2
    assert 0 < record["quality"]["psnr_db"]["value"] < 60
    again = Trivial(tmp_path)
    assert again.quality(FORA) == record
    assert again.drawn == []


def test_an_interrupted_setting_goes_on(tmp_path: Path) -> None:
    whole = Trivial(tmp_path / "whole").quality(FORA)
    runs = Trivial(tmp_path / "cut")
    runs.fail_at = FORA.key, 10
    with pytest.raises(KeyboardInterrupt):
        runs.quality(FORA)
    assert not (runs.work / f"{FORA.key}.json").exists()
    again = Trivial(tmp_path / "cut")
    record = again.quality(FORA)
    assert [first for key, first in again.drawn if key == FORA.key] == [10]
    assert record["quality"] == whole["quality"]
    more = Trivial(tmp_path / "cut", samples=30)
    more.quality(FORA)
    assert (FORA.key, 20) in more.drawn
    assert (FORA.key, 10) not in more.drawn


def test_other_options_are_another_run(tmp_path: Path) -> None:
    Trivial(tmp_path).quality(FORA)
    changed = Setting("fora", "interval 2", "fora", {"interval": 3})
    runs = Trivial(tmp_path)
    assert runs.finished(changed) is None
    assert runs.quality(changed)["ideal_speedup"] == pytest.approx(3, rel=0.01)
    assert len([key for key, _ in runs.drawn if key == FORA.key]) == 2


def test_a_method_that_does_not_apply_gets_a_row(tmp_path: Path) -> None:
    runs = Trivial(tmp_path)
    record = runs.quality(Setting("fora", "wrong", "fora", {"speed": 2}))
    assert "speed" in record["not_applicable"]
    assert runs.controls(record) == []


def test_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = Setting("deep_cache", "wrong", "deep_cache", {"interval": 0})
    for module in ("bench.methods", "bench.method_report"):
        monkeypatch.setattr(f"{module}.known", lambda wanted=(): [FORA, wrong])
    monkeypatch.setattr(Trivial, "distance", FrechetDistance(noise(100, 64)))
    runs = Trivial(tmp_path / "work")
    assert quality(runs, [FORA, wrong]) == []
    assert not quality(Trivial(tmp_path / "work"), [FORA, wrong])
    assert {"uncached-10-steps", "uncached-5-steps", even_hold(4, 10).key} <= with_controls(runs, [FORA]).keys()
    timing(runs, images=2, rounds=2)
    rounds = json.loads((runs.work / "timing.json").read_text())["rounds"]
    timing(runs, images=2, rounds=3)
    kept = json.loads((runs.work / "timing.json").read_text())["rounds"]
    assert kept[:2] == rounds
    assert len(kept) == 3
    report(runs, tmp_path / "out")
    page = (tmp_path / "out" / "methods.md").read_text()
    assert "| **fora, interval 2** | 50.0 | 2.00 |" in page
    assert page.index("**fora, interval 2**") < page.index("fewer steps: 5") < page.index("even hold: 4 of 10")
    assert "- deep_cache, wrong: not applicable:" in page
    assert "fora" in capsys.readouterr().out
    data = json.loads((tmp_path / "out" / "methods.json").read_text())
    row = next(row for row in data["rows"] if row["key"] == FORA.key)
    assert row["controls"] == ["uncached-5-steps", even_hold(4, 10).key]
    assert row["speedup"]["low"] <= row["speedup"]["value"] <= row["speedup"]["high"]
    assert (tmp_path / "out" / "methods.png").stat().st_size > 10_000
    forget(runs, [FORA], ("quality",))
    assert runs.finished(FORA) is None
    assert runs.finished(uncached(10, 10)) is not None
    forget(runs, None, ("quality", "timing"))
    assert list(runs.work.iterdir()) == []


def test_images_survive_the_disk(tmp_path: Path) -> None:
    drawn = Drawn(noise(3, 1, 32, 32), [(1, 2, 0.5)])
    drawn.save(tmp_path / "a.safetensors", {"steps": 5})
    found = Drawn.load(tmp_path / "a.safetensors", {"steps": 5})
    assert found is not None
    assert torch.equal(found.images, drawn.images)
    assert found.batches == drawn.batches
    assert Drawn.load(tmp_path / "a.safetensors", {"steps": 6}) is None
    assert Drawn.load(tmp_path / "b.safetensors", {}) is None


def test_report_without_timing(tmp_path: Path) -> None:
    runs = Trivial(tmp_path)
    runs.quality(uncached(10, 10))
    runs.quality(FORA)
    made = Report.of(runs, with_controls(runs, [FORA]), {})
    assert made.facts["timing"] is None
    assert "| - |" in made.markdown()
    made.picture(tmp_path / "methods.png")
