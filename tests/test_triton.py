"""Triton repositories: the configuration against Triton's published schema, the model against the bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from diffcache_fx.export.manifest import read_manifest

from diffcache_fx import CacheSchedule, Linear, compile_with_cache, export, schedules
from diffcache_fx.errors import ExportError

from .conftest import sample
from .test_bundle import inputs

pytestmark = pytest.mark.usefixtures("one_thread")
MODEL, STEPS = "DiTTransformer2DModel", 6


def bundle(schedule: CacheSchedule, folder: Path, form: str = "branch", **options: Any) -> Path:
    found = sample(MODEL)
    cached = compile_with_cache(
        found.module,
        schedule,
        backend="eager",
        num_steps=STEPS,
        decide="graph" if form == "branch" else "host",
        example_inputs=(found.args, found.kwargs),
    )
    return export.to_onnx(cached, folder, form, **options)


def read_config(folder: Path) -> Any:
    """The configuration, parsed by the schema that Triton publishes."""
    text_format = pytest.importorskip("google.protobuf.text_format")
    schema = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="needs tritonclient[grpc]")
    return text_format.Parse((folder / "config.pbtxt").read_text(), schema.ModelConfig())


@pytest.mark.parametrize("apart", [False, True], ids=["inside", "external"])
def test_the_configuration(apart: bool, tmp_path: Path) -> None:
    source = bundle(schedules.first_block_cache(0.1, forecast=Linear()), tmp_path / "b", external_data=apart)
    folder = export.to_triton_repository(source, tmp_path / "models", "digits")
    config = read_config(folder)
    (program,) = read_manifest(source).programs.values()
    assert (config.name, config.backend, config.max_batch_size) == ("digits", "onnxruntime", 0)
    states = {state.input_name: state for state in config.sequence_batching.state}
    assert set(states) == {port.name for port in program.inputs if port.kind in ("history", "memory")}
    given = {port.name for port in program.outputs}
    for port in program.inputs:
        if port.name in states:
            state = states[port.name]
            assert state.output_name in given
            assert list(state.dims) == list(port.shape or (1,))
            assert state.initial_state[0].zero_data
            assert state.data_type == state.initial_state[0].data_type
    named = {entry.name for entry in config.input} | set(states)
    assert named == {port.name for port in program.inputs}
    assert {entry.name for entry in config.output} == given - {state.output_name for state in states.values()}
    assert (folder / "1" / "weights.bin").is_file() is apart
    assert read_config(export.to_triton_repository(source, tmp_path / "gpu", gpu=True)).instance_group[0].kind == 1


def test_the_model_keeps_its_sequence(tmp_path: Path) -> None:
    """Driven as Triton would: state goes from outputs to inputs, and the client sends force and moment."""
    schedule = schedules.first_block_cache(0.1, forecast=Linear())
    source = bundle(schedule, tmp_path / "bundle")
    folder = export.to_triton_repository(source, tmp_path / "models")
    session = onnxruntime.InferenceSession(folder / "1" / "model.onnx")
    loaded = export.load_bundle(source)
    (program,) = read_manifest(source).programs.values()
    fed = {("state", p.target) if p.kind == "history" else (p.kind, p.target): p for p in program.inputs}
    state = {p.name: torch.zeros(p.shape or (1,)).numpy() for p in program.inputs if p.kind in ("history", "memory")}
    for step in range(STEPS):
        args, kwargs = inputs(step)
        given = {"hidden_states": args[0], **kwargs}
        feed = dict(state)
        for port in program.inputs:
            if port.kind == "user":
                feed[port.name] = given[port.name].numpy()
            elif port.kind == "force":
                feed[port.name] = torch.tensor([float(step == 0)]).numpy()
            elif port.kind == "moment":
                feed[port.name] = torch.tensor([float(step), (step + 1) / STEPS]).numpy()
        results = session.run([port.name for port in program.outputs], feed)
        for port, value in zip(program.outputs, results, strict=True):
            if (port.kind, port.target) in fed:
                state[fed[port.kind, port.target].name] = value
        with torch.no_grad():
            torch.testing.assert_close(torch.from_numpy(results[0]), loaded(*args, **kwargs).sample)


def test_what_is_refused(tmp_path: Path) -> None:
    pair = bundle(schedules.interval(2), tmp_path / "pair", "pair")
    with pytest.raises(ExportError, match=r"in the pair form.*form='branch'"):
        export.to_triton_repository(pair, tmp_path / "models")
    branch = bundle(schedules.interval(2), tmp_path / "branch")
    with pytest.raises(ExportError, match="named with letters"):
        export.to_triton_repository(branch, tmp_path / "models", "../up")
    export.to_triton_repository(branch, tmp_path / "models")
    with pytest.raises(ExportError, match="exists already"):
        export.to_triton_repository(branch, tmp_path / "models")
    export.to_triton_repository(branch, tmp_path / "models", overwrite=True)
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["denoiser"]
