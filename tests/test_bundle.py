"""Bundles: what the manifest says, what is refused, and that a bundle is a denoiser like any other."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffcache_fx.export import onnx as onnx_writer
from diffcache_fx.export.manifest import NAME, read_manifest
from torch import nn

from diffcache_fx import CacheSchedule, Interval, Linear, Rule, Trunk, compile_with_cache, export, schedules
from diffcache_fx.errors import BundleError, CallError, ExportError
from diffcache_fx.measure import relative_error

from .conftest import sample

pytestmark = pytest.mark.usefixtures("one_thread")
MODEL, STEPS = "DiTTransformer2DModel", 6


def denoiser(schedule: CacheSchedule, **options: Any) -> Any:
    found = sample(MODEL)
    example = (found.args, found.kwargs)
    return compile_with_cache(
        found.module, schedule, backend="eager", example_inputs=example, num_steps=STEPS, **options
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made") / "bundle"
    return export.to_onnx(denoiser(schedules.interval(2, forecast=Linear())), folder)


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "bundle"))


def inputs(step: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs of a step: other latents, a lower timestep, and the same conditioning."""
    args, kwargs = sample(MODEL).entry.inputs(step)
    return args, {**sample(MODEL).entry.inputs(0)[1], "timestep": torch.full_like(kwargs["timestep"], 900 - 100 * step)}


def run(model: Any, steps: int = STEPS, **changes: Any) -> list[torch.Tensor]:
    outputs = []
    for step in range(steps):
        args, kwargs = inputs(step)
        with torch.no_grad():
            outputs.append(model(*args, **{**kwargs, **changes})[0])
    return outputs


# --- the manifest ---------------------------------------------------------------------------------------------------


def test_the_plan_is_data_that_any_host_can_follow(made: Path) -> None:
    """A host that knows nothing but the manifest and the files gives the denoiser's own images."""
    import onnxruntime

    data = json.loads((made / NAME).read_text())
    sessions = {name: onnxruntime.InferenceSession(made / entry["file"]) for name, entry in data["programs"].items()}
    expected = run(denoiser(schedules.interval(2, forecast=Linear())))
    slots: dict[str, Any] = {}
    for value in data["regions"]:
        for index, cut in enumerate(value["cut"]):
            for slot in range(cut["slots"]):
                slots[f"{value['name']}/{index}/{slot}"] = torch.zeros(cut["shape"]).numpy()
    assert len(data["control"]["plan"]) == STEPS
    for step, entry in enumerate(data["control"]["plan"]):
        args, kwargs = inputs(step)
        given = {"hidden_states": args[0], **kwargs}
        program = data["programs"][entry["program"]]
        feed = {}
        for port in program["inputs"]:
            if port["kind"] == "user":
                feed[port["name"]] = given[data["call"]["leaves"][int(port["target"])]["name"]].numpy()
            elif port["kind"] == "history":
                feed[port["name"]] = slots[port["target"]]
            else:
                assert port["kind"] == "rows"
                feed[port["name"]] = torch.tensor(entry["rows"]).numpy()
        outputs = sessions[entry["program"]].run([port["name"] for port in program["outputs"]], feed)
        for port, value in zip(program["outputs"], outputs, strict=True):
            if port["kind"] == "user":
                assert relative_error(torch.from_numpy(value), expected[step]) < 1e-4
            else:
                region, index = port["target"].rsplit("/", 1)
                slots[f"{region}/{index}/{entry['store'][region]}"] = value
    reused = [entry["program"] for entry in data["control"]["plan"]]
    assert reused == ["refresh", "reuse"] * (STEPS // 2)


def test_the_manifest_tells_what_was_exported(made: Path) -> None:
    manifest = read_manifest(made)
    captured = denoiser(schedules.interval(2, forecast=Linear()))
    assert (manifest.artefact, manifest.form, manifest.model) == ("onnx", "pair", MODEL)
    assert CacheSchedule.from_dict(manifest.schedule) == schedules.interval(2, forecast=Linear())
    assert manifest.config["num_layers"] == sample(MODEL).module.config.num_layers
    assert manifest.state_bytes == captured.explain().cache_bytes
    assert manifest.full_flops == captured.explain().full_flops
    assert {path.name for path in made.iterdir()} == {*manifest.files, NAME}
    assert set(manifest.created_with) >= {"diffcache_fx", "torch", "onnx"}
    assert manifest.programs["reuse"].flops < manifest.programs["refresh"].flops == manifest.full_flops


def test_endless_windows_survive_the_file(tmp_path: Path) -> None:
    schedule = schedules.pab(2, 0, window=(-1.0, math.inf))
    loaded = export.load_bundle(export.to_onnx(denoiser(schedule), tmp_path / "bundle"))
    assert loaded.schedule == schedule
    run(loaded)
    assert loaded.stats().reused > 0


def test_what_is_decided_at_run_time_has_no_plan(tmp_path: Path) -> None:
    folder = export.to_onnx(denoiser(schedules.first_block_cache(0.1)), tmp_path / "bundle")
    manifest = read_manifest(folder)
    assert manifest.control.plan == ()
    assert manifest.form == "split"
    assert list(manifest.programs) == ["refresh", "reuse", "probe"]
    assert manifest.schedule["rules"][0]["guard"]["threshold"] == 0.1


# --- a denoiser like any other --------------------------------------------------------------------------------------


def test_contexts_reset_stats_and_attributes(made: Path) -> None:
    model, loaded = denoiser(schedules.interval(2, forecast=Linear())), export.load_bundle(made)
    for name in ("cond", "uncond"):
        for each in (model, loaded):
            with each.cache_context(name):
                run(each, 3)
    assert [(d.context, d.step, d.reused) for d in loaded.stats().decisions] == [
        (d.context, d.step, d.reused) for d in model.stats().decisions
    ]
    assert loaded.stats().cache_bytes == model.stats().cache_bytes
    assert loaded.summary() == model.summary()
    loaded._reset_stateful_cache()
    first = run(loaded, 1)
    loaded.reset()
    assert torch.equal(run(loaded, 1)[0], first[0])
    assert loaded.dtype == torch.float32
    assert loaded.device == torch.device("cpu")
    assert loaded.config.num_layers == sample(MODEL).module.config.num_layers
    assert not loaded.training
    with pytest.raises(CallError, match="for inference"):
        loaded.train()
    assert "onnx pair" in repr(loaded)


def test_calls_as_the_model_takes_them(made: Path) -> None:
    loaded = export.load_bundle(made)
    args, kwargs = inputs(0)
    output = loaded(*args, **kwargs)
    assert torch.equal(output.sample, output["sample"])
    assert torch.equal(output[0], output.sample)
    loaded.reset()
    named = loaded(**kwargs, hidden_states=args[0], return_dict=False)
    assert isinstance(named, tuple)
    assert torch.equal(named[0], output.sample)
    with pytest.raises(AttributeError, match="no field 'image'; it has sample"):
        _ = output.image


def test_outputs_are_the_callers_own(made: Path) -> None:
    """Pipelines write into what they get; the cache must not change."""
    loaded, again = export.load_bundle(made), export.load_bundle(made)
    expected = run(again, 4)
    found = []
    for step in range(4):
        args, kwargs = inputs(step)
        with torch.no_grad():
            output = loaded(*args, **kwargs)[0]
        found.append(output.clone())
        output.zero_()
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


# --- what is refused ------------------------------------------------------------------------------------------------


def changed(folder: Path, **fields: Any) -> Path:
    data = json.loads((folder / NAME).read_text())
    (folder / NAME).write_text(json.dumps({**data, **fields}))
    return folder


def controlled(folder: Path, **fields: Any) -> Path:
    return changed(folder, control={**json.loads((folder / NAME).read_text())["control"], **fields})


def flipped(folder: Path) -> None:
    path = folder / "weights.bin"
    content = bytearray(path.read_bytes())
    content[100] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "reuse.onnx").unlink(), "reuse.onnx is missing"),
        (flipped, "weights.bin is not the file that was exported"),
        (lambda folder: changed(folder, version=99), "format version 99, and this library reads up to 1"),
        (lambda folder: changed(folder, format="other"), "no manifest of a bundle"),
        (lambda folder: changed(folder, surprise=1), "malformed at surprise"),
        (lambda folder: changed(folder, full_flops="many"), "malformed at full_flops"),
        (
            lambda folder: changed(folder, files={"../../etc/hosts": {"bytes": 1, "sha256": ""}}),
            "outside of the bundle",
        ),
        (lambda folder: controlled(folder, num_steps=-4), "-4 is no number of steps"),
        (lambda folder: controlled(folder, programs=["refresh", "zzz"]), "names the program 'zzz', which is not there"),
        (lambda folder: controlled(folder, num_steps=3), "6 steps, where control.num_steps says 3"),
        (lambda folder: changed(folder, files={}), "gives no checksum for refresh.onnx, reuse.onnx"),
        (lambda folder: (folder / NAME).write_text("{"), "cannot be read"),
        (lambda folder: (folder / NAME).unlink(), "is no bundle"),
    ],
)
def test_a_spoilt_bundle(copied: Path, spoil: Callable[[Path], Any], words: str) -> None:
    spoil(copied)
    with pytest.raises(BundleError, match=words):
        export.load_bundle(copied)


def test_only_a_cached_denoiser_is_exported(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="what compile_with_cache returns is exported, not a DiTTransformer2DModel"):
        export.to_onnx(sample(MODEL).module, tmp_path / "bundle")  # type: ignore[arg-type]


def test_a_runtime_that_does_not_fit(made: Path) -> None:
    with pytest.raises(BundleError, match="runs in onnxruntime, not in 'tensorrt'"):
        export.load_bundle(made, "tensorrt")
    with pytest.raises(BundleError, match="no MagicExecutionProvider"):
        export.load_bundle(made, providers=["MagicExecutionProvider"])
    with pytest.raises(BundleError, match="no attribute 'speed'"):
        export.load_bundle(made, session_options={"speed": 1})


def test_a_runtime_that_is_not_installed(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(BundleError, match="pip install onnxruntime"):
        export.load_bundle(made)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"timestep": torch.zeros(2)}, "timestep must be int64, not float32"),
        ({"timestep": 3}, "timestep must be a int64 tensor, not 3"),
        ({"class_labels": torch.zeros(5, dtype=torch.int64)}, r"class_labels must be of shape \[2\], not \[5\]"),
        ({"class_labels": torch.zeros(2, 1, dtype=torch.int64)}, "class_labels must have 1 dimensions, not 2"),
        ({"cross_attention_kwargs": {}}, "without the argument 'cross_attention_kwargs'"),
        ({"strength": 1}, "without the argument 'strength'"),
        ({"hidden_states": torch.zeros(1)}, "'hidden_states' was given twice"),
    ],
)
def test_calls_that_do_not_fit(made: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(CallError, match=words):
        run(export.load_bundle(made), 1, **change)


def test_a_bundle_stays_where_it_was_loaded(made: Path) -> None:
    loaded = export.load_bundle(made)
    assert loaded.to("cpu") is loaded
    assert loaded.to(device="cpu", dtype=torch.float32) is loaded
    with pytest.raises(CallError, match=r"does not move from cpu to cuda: load_bundle\(folder, device='cuda'\)"):
        loaded.to("cuda")
    with pytest.raises(CallError, match="export the model in that dtype"):
        loaded.to(torch.float16)


def test_an_argument_is_missing(made: Path) -> None:
    with pytest.raises(CallError, match="the argument 'hidden_states' is missing"):
        export.load_bundle(made)(**sample(MODEL).kwargs)


def test_nothing_half_done(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that is there stays; an export that fails, or is interrupted, leaves nothing."""
    model = denoiser(schedules.interval(2))
    with pytest.raises(ExportError, match="exists already"):
        export.to_onnx(model, made)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("precious")
    with pytest.raises(ExportError, match="is no bundle, so it is not overwritten"):
        export.to_onnx(model, tmp_path / "mine", overwrite=True)
    for error in (RuntimeError("disk full"), KeyboardInterrupt()):

        def fail(*args: Any, error: BaseException = error) -> None:
            raise error

        monkeypatch.setattr(onnx_writer, "check_model", fail)
        for target in (tmp_path / "new", shutil.copytree(made, tmp_path / "old", dirs_exist_ok=True)):
            with pytest.raises(type(error)):
                export.to_onnx(model, target, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "old"]
    assert read_manifest(tmp_path / "old") == read_manifest(made)
    export.load_bundle(tmp_path / "old")


def test_overwriting_a_bundle(copied: Path) -> None:
    before = read_manifest(copied)
    export.to_onnx(denoiser(schedules.interval(3)), copied, "branch", overwrite=True)
    after = read_manifest(copied)
    assert (before.form, after.form) == ("pair", "branch")
    assert {path.name for path in copied.iterdir()} == {"step.onnx", NAME}
    assert [path.name for path in copied.parent.iterdir()] == [copied.name]


class Tricky(nn.Module):
    """Takes lists, dicts, numbers, switches and defaults; returns a dict with something that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block() for _ in range(4))

    def forward(
        self,
        latents: list[torch.Tensor],
        timestep: float,
        extra: dict[str, torch.Tensor],
        mode: str = "plain",
        *,
        scale: float | None = None,
        flag: bool = True,
    ) -> dict[str, Any]:
        x = torch.cat(latents) * timestep + extra["shift"]
        for block in self.blocks:
            x = block(x)
        return {"x": x, "mode": mode, "pair": [x * 2, x - 1]}


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(x)


def test_a_call_with_all_kinds_of_arguments(tmp_path: Path) -> None:
    model = Tricky().eval()
    args = ([torch.randn(1, 3, 4), torch.randn(1, 3, 4)], 0.5, {"shift": torch.randn(4)})
    schedule = CacheSchedule(rules=(Rule(Trunk(first=1), Interval(2)),))
    cached = compile_with_cache(model, schedule, backend="eager", example_inputs=(args, {}), num_steps=4)
    loaded = export.load_bundle(export.to_onnx(cached, tmp_path / "bundle"))
    for step in range(4):
        changed = (args[0], 0.5 + step, args[2])
        found, expected = loaded(*changed), cached(*changed)
        assert set(found) == set(expected)
        assert found["mode"] == "plain"
        for a, b in ((found["x"], expected["x"]), *zip(found["pair"], expected["pair"], strict=True)):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert loaded(*args, mode="plain", scale=None, flag=True)["mode"] == "plain"
    for change, words in (
        ({"mode": "other"}, "without the argument 'mode'"),
        ({"scale": 2.0}, "without the argument 'scale'"),
    ):
        with pytest.raises(CallError, match=words):
            loaded(*args, **change)
    for spoilt, words in (
        ((args[0][:1], 0.5, args[2]), "latents must have 2 entries, not 1"),
        ((args[0], 1, args[2]), "timestep must be a Python float, not 1"),
        ((args[0], 0.5, {"other": args[2]["shift"]}), "extra must have the keys shift, not other"),
        ((args[0], 0.5, [args[2]["shift"]]), "extra must be a dict"),
    ):
        with pytest.raises(CallError, match=words):
            loaded(*spoilt)
