"""backend="torch_tensorrt": what Torch-TensorRT is given, and, where it is installed, what it makes of it."""

from __future__ import annotations

import copy
import sys
import types
from typing import Any

import pytest
import torch

from diffcache_fx import CacheSchedule, Linear, compile_with_cache, schedules
from diffcache_fx.errors import CacheError
from diffcache_fx.measure import relative_error

from .conftest import sample
from .test_export_onnx import FEW, decisions, generation

pytestmark = pytest.mark.usefixtures("one_thread")
SCHEDULES = {"static": schedules.interval(3, forecast=Linear()), "split": schedules.first_block_cache(0.1)}


def made(schedule: CacheSchedule, backend: str, **options: Any) -> Any:
    found = sample(FEW[0])
    example = (found.args, found.kwargs)
    return compile_with_cache(found.module, schedule, backend=backend, num_steps=20, example_inputs=example, **options)


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A stand-in for Torch-TensorRT that runs what it is given with PyTorch, and the calls it got."""
    calls: list[dict[str, Any]] = []

    def compile_(exported: Any, *, arg_inputs: list[torch.Tensor], **options: Any) -> Any:
        calls.append({"inputs": arg_inputs, "weights": len(exported.state_dict), **options})
        return exported.module()

    stand_in = types.ModuleType("torch_tensorrt")
    stand_in.dynamo = types.SimpleNamespace(compile=compile_)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_tensorrt", stand_in)
    return calls


@pytest.mark.parametrize("name", SCHEDULES)
def test_it_gets_the_specialised_programs(given: list[dict[str, Any]], name: str) -> None:
    eager = made(SCHEDULES[name], "eager")
    ours = made(SCHEDULES[name], "torch_tensorrt", optimization_level=3)
    expected, found = generation(eager, FEW[0]), generation(ours, FEW[0])
    assert decisions(ours) == decisions(eager)
    assert max(relative_error(a, b) for a, b in zip(found, expected, strict=True)) < 1e-5
    assert len(given) == ours.stats().compilations
    assert all(call["optimization_level"] == 3 for call in given)
    assert all(call["weights"] > 0 for call in given if name == "static")
    inputs = {id(parameter) for parameter in sample(FEW[0]).module.parameters()}
    assert not any(id(tensor) in inputs for call in given for tensor in call["inputs"])


def test_a_failure_names_the_program(monkeypatch: pytest.MonkeyPatch, given: list[dict[str, Any]]) -> None:
    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no converter")

    monkeypatch.setattr(sys.modules["torch_tensorrt"].dynamo, "compile", fails)
    with pytest.raises(CacheError, match="failed on the program that reuses 0 regions: RuntimeError: no converter"):
        generation(made(SCHEDULES["static"], "torch_tensorrt"), FEW[0], 1)
    assert not given


def test_what_it_cannot_have(given: list[dict[str, Any]]) -> None:
    with pytest.raises(CacheError, match="not the choice between them"):
        generation(made(SCHEDULES["static"], "torch_tensorrt", decide="graph"), FEW[0], 1)
    assert not given


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_tensorrt", None)
    with pytest.raises(CacheError, match="pip install torch-tensorrt"):
        generation(made(SCHEDULES["static"], "torch_tensorrt"), FEW[0], 1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, and torch-tensorrt")
@pytest.mark.parametrize("name", SCHEDULES)
def test_engines_equal_eager(name: str) -> None:
    pytest.importorskip("torch_tensorrt", reason="needs torch-tensorrt: pip install torch-tensorrt")
    found = sample(FEW[0])
    module = copy.deepcopy(found.module).cuda()
    args, kwargs = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.cuda(), (found.args, found.kwargs))
    made_ = [
        compile_with_cache(module, SCHEDULES[name], backend=backend, num_steps=20, example_inputs=(args, kwargs))
        for backend in ("eager", "torch_tensorrt")
    ]
    for _ in range(6):
        expected, got = (denoiser(*args, **kwargs) for denoiser in made_)
        assert relative_error(got.sample, expected.sample) < 1e-2
