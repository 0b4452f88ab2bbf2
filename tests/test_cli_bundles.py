"""`export`, `run`, `inspect BUNDLE` and `doctor` on the command line."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffcache_fx.export import load_bundle
from diffcache_fx.export.manifest import read_manifest
from PIL import Image
from typer.testing import CliRunner, Result

from diffcache_fx import compile_with_cache, export, schedules
from diffcache_fx.cli import app
from diffcache_fx.cli_bundles import _is_of
from diffcache_fx.models import load_demo

from .tiny_pipelines import CASES

pytestmark = pytest.mark.usefixtures("one_thread")


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def failure(*arguments: object) -> str:
    """The one sentence a command fails with."""
    result = run(*arguments)
    assert result.exit_code == 1, result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.split("error:")[-1].split())


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits") / "bundle"
    result = run("export", "digits", "-s", "fora:interval=3", "--steps", 8, "-o", folder)
    assert result.exit_code == 0, result.output
    return folder


def test_export_writes_a_bundle_and_says_what_is_in_it(digits: Path) -> None:
    manifest = read_manifest(digits)
    assert (manifest.artefact, manifest.form, manifest.control.num_steps) == ("onnx", "pair", 8)
    shown = run("inspect", digits).output
    for words in (
        "DiTTransformer2DModel (float32) under schedule 'fora'",
        "refresh.onnx",
        "weights.bin",
        "MiB",
        "value",
    ):
        assert words in shown, shown


def test_run_draws_digits(digits: Path, tmp_path: Path) -> None:
    result = run("run", digits, "--images", 2, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "schedule 'fora': 16 calls" in result.output or "schedule 'fora': 8 calls" in result.output
    picture = Image.open(tmp_path / "out" / "digits.png")
    assert picture.size[0] > picture.size[1] > 32
    assert len(set(picture.getdata())) > 20


def test_run_in_a_pipeline(tmp_path: Path) -> None:
    case = next(case for case in CASES if case.name == "DiTPipeline")
    pipe = case.build()
    pipe.save_pretrained(tmp_path / "pipe")
    cached = compile_with_cache(pipe.transformer, schedules.interval(2), backend="eager", num_steps=4)
    pipe.transformer = cached
    expected = pipe(class_labels=[1], num_inference_steps=4, generator=torch.Generator().manual_seed(0)).images[0]
    export.to_onnx(cached, tmp_path / "bundle")
    call = json.dumps({"class_labels": [1]})
    result = run("run", tmp_path / "bundle", "--pipeline", tmp_path / "pipe", "--call", call, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "2 reused" in result.output
    assert Image.open(tmp_path / "out" / "image_0.png").size == expected.size


def test_failures_are_one_sentence(digits: Path, tmp_path: Path) -> None:
    assert "--format must be one of onnx, tensorrt, aot-inductor, bundle, not 'tar'" in failure(
        "export", "digits", "-f", "tar", "-o", tmp_path / "x"
    )
    assert "exists already" in failure("export", "digits", "-s", "fora", "-o", digits)
    assert "nothing to split" in failure("export", "digits", "-s", "fora", "--form", "split", "-o", tmp_path / "x")
    assert "is no bundle" in failure("run", tmp_path)
    assert "must be a JSON object" in failure("run", digits, "--pipeline", tmp_path, "--call", "[1]")
    assert "holds no model_index.json" in failure("run", digits, "--pipeline", tmp_path)


def test_inspect_finds_a_changed_file(digits: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(digits, tmp_path / "copy")
    assert "all files are as written" in run("inspect", copy).output
    content = bytearray((copy / "weights.bin").read_bytes())
    content[1000] ^= 1
    (copy / "weights.bin").write_bytes(content)
    assert "weights.bin is not the file that was exported" in failure("inspect", copy)


def test_what_cannot_be_written_is_refused_before_the_model_is_loaded(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffcache_fx.models.load_target", lambda *_: pytest.fail("the model was loaded"))
    assert "exists already" in failure("export", "digits", "-o", digits)
    assert "form must be one of pair, split, branch, not 'tree'" in failure(
        "export", "digits", "--form", "tree", "-o", tmp_path / "x"
    )


def test_what_is_not_installed_is_told_before_the_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(package: str) -> str:
        raise importlib.metadata.PackageNotFoundError(package)

    monkeypatch.setattr("diffcache_fx.models.load_target", lambda *_: pytest.fail("the model was loaded"))
    monkeypatch.setattr("importlib.metadata.version", version)
    told = failure("export", "digits", "-o", tmp_path / "x")
    assert told.startswith("onnx is not installed, and is needed to write these files: `diffcache-fx doctor`")


def test_a_bundle_of_another_process_is_known(digits: Path) -> None:
    """diffusers notes which options were left out, in an order that differs from process to process."""
    loaded, model = load_bundle(digits), load_demo("digits").model
    assert not any(name.startswith("_") for name in loaded.config)
    for noted in (["a", "b"], ["b", "a"]):
        told = {**loaded.config, "_use_default_values": noted}
        assert _is_of(SimpleNamespace(manifest=loaded.manifest, config=told), model)
    other = {**loaded.config, "num_layers": 99}
    assert not _is_of(SimpleNamespace(manifest=loaded.manifest, config=other), model)


def test_doctor_tells_what_each_runtime_can_do() -> None:
    shown = run("doctor").output
    for words in ("aot-inductor", "onnxruntime", "tensorrt", "providers: "):
        assert words in shown, shown
