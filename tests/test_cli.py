"""The command line: what it prints, what it writes, and how it fails."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner, Result

from bench.readme import README, with_tables
from diffcache_fx import CacheError, CacheSchedule, Interval, Linear, Mask, ScheduleError, Sublayers, schedules
from diffcache_fx.arguments import parse_schedule
from diffcache_fx.cli import app, bars
from diffcache_fx.comparison import Comparison, Row
from diffcache_fx.measure import Timings
from diffcache_fx.models import load_target

pytestmark = pytest.mark.usefixtures("one_thread")

FACTORY = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True) for _ in range(4))
    def forward(self, x, t):
        x = x + t
        for block in self.blocks:
            x = block(x)
        return x

def fixed():
    return Net().eval(), (torch.zeros(1, 4, 16), torch.zeros(1)), {}

def varying():
    x = torch.linspace(0, 1, 64).view(1, 4, 16)
    return Net().eval(), lambda step: ((x ** (1 + step),), {"t": torch.tensor([900.0 - step])})

def wrong():
    return Net()
"""


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def failure(*arguments: str) -> str:
    """The one sentence a command fails with."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    text = result.output.strip().splitlines()
    assert text[-1].startswith("error:")
    assert "Traceback" not in result.output
    return text[-1]


@pytest.fixture
def factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "made_here.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "made_here"


def test_schedules_lists_every_factory() -> None:
    result = run("schedules")
    assert result.exit_code == 0
    for name in schedules.list():
        assert name in result.output
    assert "every=2" in result.output


def test_the_readme_lists_every_method() -> None:
    """Run `python -m bench.readme` where this fails."""
    text = README.read_text()
    assert with_tables(text) == text
    for name in schedules.list():
        assert f"| `{name}` |" in text


def test_what_is_written_in_brackets_is_shown() -> None:
    assert "bits[step][block]" in " ".join(run("schedules").output.replace("│", " ").split())


@pytest.mark.parametrize("decide", ["host", "graph", "lagged"])
def test_bench_with_an_adaptive_guard(decide: str, factory: str) -> None:
    options = ("--steps", "6", "--rounds", "1", "--backend", "eager", "--decide", decide)
    result = run("bench", f"{factory}:varying", "-s", "easy_cache:threshold=9,warm_up=2", *options)
    assert result.exit_code == 0, result.output
    assert "threshold 9" in result.output


def test_an_unknown_place_of_decision(factory: str) -> None:
    options = ("--steps", "2", "--rounds", "1", "--backend", "eager")
    text = failure("bench", f"{factory}:varying", "--decide", "elsewhere", *options)
    assert "'host', 'graph' or 'lagged'" in text


def test_doctor() -> None:
    result = run("doctor")
    assert result.exit_code == 0
    assert torch.__version__ in result.output
    for backend in ("eager", "inductor", "onnxruntime", "torch_tensorrt"):
        assert backend in result.output


def test_inspect_digits() -> None:
    result = run("inspect", "digits", "--schedule", "interval:every=3,forecast=linear", "--graph")
    assert result.exit_code == 0, result.output
    assert "region transformer_blocks.1..transformer_blocks.11" in result.output
    assert "over 50 steps: 17 refresh everything" in result.output
    assert "torch.ops.higher_order.cond" in result.output


def test_inspect_factory(factory: str) -> None:
    result = run("inspect", f"{factory}:fixed", "--steps", "10")
    assert result.exit_code == 0, result.output
    assert "Net under schedule 'default'" in result.output


def test_bench_factory(factory: str, tmp_path: Path) -> None:
    out = tmp_path / "results" / "bench.json"
    arguments = ("-s", "interval:every=2", "--steps", "4", "--rounds", "2", "--backend", "eager", "--out", str(out))
    result = run("bench", f"{factory}:varying", *arguments)
    assert result.exit_code == 0, result.output
    uncached, cached = json.loads(out.read_text())["rows"]
    assert uncached["fidelity"]["error"] == 0
    assert cached["fidelity"]["error"] > 0
    assert cached["ideal"] > 1.3
    assert cached["latency"] > 0
    assert "relative error" in result.output
    assert "2 reused" in result.output


def test_demo_writes_picture_and_tables(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    schedule = "interval:every=2,forecast=linear"
    arguments = (
        "--images",
        "2",
        "--steps",
        "4",
        "--backend",
        "eager",
        "--out",
        str(out),
        "-s",
        schedule,
        "-s",
        "always",
    )
    result = run("demo", *arguments)
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in out.iterdir()) == ["digits.png", "table.json", "table.md"]
    data = json.loads((out / "table.json").read_text())
    rows = {row["name"]: row for row in data["rows"]}
    fewer = "uncached, 2 steps"
    assert list(rows) == ["uncached", schedule, fewer, "always"]
    assert rows[fewer]["beside"] == schedule
    assert rows[fewer]["ideal"] == 2
    assert 0 < rows[fewer]["fidelity"]["psnr_db"] < 60
    assert len(data["samples_s"][fewer]) == 2
    assert rows["always"]["fidelity"]["psnr_db"] is None  # infinite: refreshing everything changes nothing
    assert rows["always"]["ideal"] == 1
    assert 0 < rows[schedule]["fidelity"]["psnr_db"] < 60
    assert rows[schedule]["cache_bytes"] > 0
    assert rows[schedule]["ideal"] > 1.5
    assert all(row["graph_breaks"] == 0 and row["recompiles"] == 0 for row in rows.values())
    assert all(0 <= row["fidelity"]["accuracy"] <= 1 for row in rows.values())
    assert len(data["samples_s"]["uncached"]) == 2
    table = (out / "table.md").read_text()
    assert "| uncached |" in table
    assert "| inf |" in table
    with Image.open(out / "digits.png") as picture:
        assert picture.width > 2 * 600
        assert picture.height > 2 * 130


def test_progress_without_a_terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A line when a stage begins and when it is done, and one a minute."""
    clock = iter([0.0, 10.0, 70.0, 80.0, 90.0, 91.0])
    monkeypatch.setattr("diffcache_fx.cli.time.monotonic", lambda: next(clock))
    with bars() as told:
        for done in range(4):
            told("draw", done, 4)
        told("draw", 4, 4)
        told("draw", 4, 4)
    assert capsys.readouterr().err.splitlines() == ["draw: 0 of 4 ...", "draw: 2 of 4 ...", "draw: done, 90 s"]


def test_what_few_or_unsteady_rounds_tell() -> None:
    def found(seconds: dict[str, list[float]]) -> Comparison:
        timings = Timings({name: np.array(taken) for name, taken in seconds.items()}, "uncached")
        rows = [Row(name, 1.0, timings.ratio("uncached", name), 2.0, {}) for name in seconds]
        return Comparison("toy", "image", "eager", 10, rows, timings, {})

    one = found({"uncached": [2.0], "interval": [1.0]})
    assert one.cells(one.rows[1])[2] == "2.00"
    assert one.unsteady == ""
    steady = found({"uncached": [2.0, 2.1, 2.0], "interval": [1.0, 1.0, 1.1]})
    assert steady.cells(steady.rows[1])[2].startswith("2.00 [")
    assert steady.unsteady == ""
    assert "'interval' differ by half" in found({"uncached": [2.0, 2.0, 9.0], "interval": [1.0, 5.0, 1.0]}).unsteady


def test_unknown_schedule_and_options() -> None:
    assert "did you mean 'interval'" in failure("inspect", "digits", "-s", "intervall")
    assert "no option 'evry'; did you mean 'every'" in failure("inspect", "digits", "-s", "interval:evry=3")
    assert "every must be a whole number" in failure("inspect", "digits", "-s", "interval:every=0")
    assert "fora:interval=x: every must be a whole number" in failure("inspect", "digits", "-s", "fora:interval=x")
    assert "did you mean 'linear'" in failure("inspect", "digits", "-s", "interval:forecast=liner")
    assert "no schedule file" in failure("inspect", "digits", "-s", "nowhere/plan.json")


def test_unknown_model(factory: str, tmp_path: Path) -> None:
    assert "there is no model 'digit'" in failure("inspect", "digit")
    assert "cannot import" in failure("inspect", "no_such_package.module:factory")
    assert "failed when it was called without arguments (TypeError" in failure("inspect", "torch.nn:Linear")
    assert "has no function 'nobody'" in failure("inspect", f"{factory}:nobody")
    assert "must return (module, args, kwargs)" in failure("inspect", f"{factory}:wrong")
    (tmp_path / "empty").mkdir()
    assert "model_index.json" in failure("inspect", str(tmp_path / "empty"))


def test_debug_lets_the_traceback_through() -> None:
    result = run("--debug", "inspect", "digit")
    assert isinstance(result.exception, CacheError)


def test_diffusers_folder(tmp_path: Path) -> None:
    import diffusers

    model = diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    model.save_pretrained(tmp_path / "pipeline" / "unet")
    index = {"_class_name": "DDPMPipeline", "unet": ["diffusers", "UNet2DModel"], "scheduler": ["diffusers", "DDIM"]}
    (tmp_path / "pipeline" / "model_index.json").write_text(json.dumps(index))
    for folder in (tmp_path / "pipeline", tmp_path / "pipeline" / "unet"):
        target = load_target(str(folder))
        assert isinstance(target.module, nn.Module)
        assert type(target.module) is type(model)
        with pytest.raises(CacheError, match="not what it is called with"):
            target.example()
    assert "package.module:factory" in failure("bench", str(tmp_path / "pipeline"))


def test_parse_schedule(tmp_path: Path) -> None:
    found = parse_schedule("interval:every=3,forecast=linear,warm_up=2,regions=sublayers")
    assert found.rules[0].guard == Interval(3)
    assert found.rules[0].forecast == Linear()
    assert found.rules[0].regions == Sublayers()
    assert found.warm_up == 2
    assert parse_schedule("mask:bits=[1,0,(1),0]").rules[0].guard == Mask(((1,), (0,), (1,), (0,)))
    assert parse_schedule("delta_dit:gate=0.25").rules[0].guard == Interval(3, end=0.25)
    assert parse_schedule("fora") == schedules.fora()
    saved = CacheSchedule(name="mine").save_pretrained(tmp_path / "saved")
    assert parse_schedule(str(saved)).name == "mine"
    assert parse_schedule(str(saved.parent)).name == "mine"
    for text in ("interval:", "interval:every", "interval:every=1,every=2", "interval:regions=modules"):
        if text == "interval:":
            assert parse_schedule(text) == schedules.interval()
            continue
        with pytest.raises(ScheduleError):
            parse_schedule(text)


def test_infinity_is_written_as_null() -> None:
    from diffcache_fx.comparison import _finite

    assert _finite({"a": [math.inf, 1.0], "b": math.nan}) == {"a": [None, 1.0], "b": None}
