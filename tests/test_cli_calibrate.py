"""`calibrate` on the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffcache_fx import CacheSchedule

from .test_cli_bundles import failure, run
from .tiny_pipelines import CASES

pytestmark = pytest.mark.usefixtures("one_thread")
QUICK = ("--backend", "eager", "--samples", 2, "--steps", 5)


def test_it_writes_a_schedule_that_inspect_and_demo_take(tmp_path: Path) -> None:
    result = run("calibrate", "digits", "--psnr", 30, "-o", tmp_path / "plan", *QUICK)
    assert result.exit_code == 0, result.output
    assert "5 steps: 30 dB to the uncached samples" in result.output
    for words in (
        "refreshes",
        "speed-up by FLOPs",
        "mean square error, measured on other noise",
        "Judged on 2 samples",
    ):
        assert words in result.output
    schedule = CacheSchedule.from_pretrained(tmp_path / "plan")
    assert schedule.made_for is not None
    assert (schedule.made_for.steps, schedule.made_for.sampler) == (5, "DDIMScheduler")
    shown = run("inspect", "digits", "-s", tmp_path / "plan", "--steps", 5).output
    assert "calibrated" in shown
    assert "calibrated for 5 steps and this run has 6" in failure(
        "inspect", "digits", "-s", tmp_path / "plan", "--steps", 6
    )


def test_a_pipeline_folder(tmp_path: Path) -> None:
    next(case for case in CASES if case.name == "DiTPipeline").build().save_pretrained(tmp_path / "pipe")
    call = '{"class_labels": [1, 2]}'
    result = run("calibrate", tmp_path / "pipe", "--relative-l1", 0.2, "--call", call, "-o", tmp_path / "plan", *QUICK)
    assert result.exit_code == 0, result.output
    made_for = CacheSchedule.from_pretrained(tmp_path / "plan").made_for
    assert made_for is not None
    assert made_for.model == "DiTTransformer2DModel"


def test_failures_are_one_sentence(tmp_path: Path) -> None:
    out = ("-o", tmp_path / "plan")
    assert "give one target" in failure("calibrate", "digits", *out)
    assert "give one target" in failure("calibrate", "digits", "--psnr", 30, "--speedup", 2, *out)
    assert "a speed-up is 1 or more" in failure("calibrate", "digits", "--speedup", 0.5, *out)
    assert "is neither" in failure("calibrate", "bench.zoo:make", "--psnr", 30, *out)
    assert "--call is for pipelines" in failure("calibrate", "digits", "--psnr", 30, "--call", '{"a": 1}', *out)
    assert "must be a JSON object" in failure("calibrate", "digits", "--psnr", 30, "--call", "{broken", *out)
    assert not (tmp_path / "plan").exists()


def test_where_nothing_can_be_written_is_told_before_anything_runs(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("kept")
    for command in (
        ("calibrate", "digits", "--psnr", 30, "-o", file),
        ("demo", "--out", file),
        ("bench", "digits", "--report", file),
        ("run", tmp_path / "bundle", "--out", file),
    ):
        assert f"{file} is a file: give a folder" in failure(*command)
    assert f"{file / 'a'} cannot be made (Not a directory)" in failure("demo", "--out", file / "a")
    assert "is a folder: give a file" in failure("bench", "digits", "--out", tmp_path)
    assert file.read_text() == "kept"
    assert "no bundle" in failure("run", tmp_path / "nothing", "--out", tmp_path / "images")
    assert list(tmp_path.iterdir()) == [file]
