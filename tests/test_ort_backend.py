"""backend="onnxruntime": the same decisions and outputs as eager, on the model's own weights."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from diffcache_fx import CacheSchedule, Linear, compile_with_cache, schedules
from diffcache_fx.errors import CacheError
from diffcache_fx.measure import relative_error

from .conftest import sample
from .test_export_onnx import FEW, decisions, generation

pytestmark = pytest.mark.usefixtures("one_thread")


def made(module: Any, name: str, schedule: CacheSchedule, backend: str, **options: Any) -> Any:
    found = sample(name)
    example = (found.args, found.kwargs)
    return compile_with_cache(module, schedule, backend=backend, num_steps=20, example_inputs=example, **options)


@pytest.mark.parametrize(
    ("name", "schedule", "decide"),
    [
        (FEW[0], schedules.interval(3, forecast=Linear()), "host"),
        (FEW[0], schedules.first_block_cache(0.1), "host"),
        (FEW[0], schedules.first_block_cache(0.1), "graph"),
        (FEW[1], schedules.deep_cache(3), "host"),
    ],
    ids=["static", "adaptive", "graph", "unet"],
)
def test_equals_eager(name: str, schedule: CacheSchedule, decide: str) -> None:
    module = sample(name).module
    eager, ours = (made(module, name, schedule, backend, decide=decide) for backend in ("eager", "onnxruntime"))
    expected, found = generation(eager, name), generation(ours, name)
    assert decisions(ours) == decisions(eager)
    assert max(relative_error(a, b) for a, b in zip(found, expected, strict=True)) < 1e-4


def test_weights_are_the_models_own() -> None:
    """Written in place, through .data, and replaced: each takes effect at the next generation."""
    name = FEW[0]
    module = copy.deepcopy(sample(name).module)
    ours = made(module, name, schedules.interval(2), "onnxruntime")
    first = generation(ours, name, 2)

    def in_place() -> None:
        with torch.no_grad():
            module.proj_out_2.bias.add_(1.0)

    def through_data() -> None:
        module.proj_out_2.bias.data.mul_(2.0)

    def replaced() -> None:
        module.proj_out_2.bias = torch.nn.Parameter(module.proj_out_2.bias.detach() - 3.0)

    for change in (in_place, through_data, replaced):
        change()
        ours.reset()
        found = generation(ours, name, 2)
        assert relative_error(found[0], first[0]) > 0.01
        expected = generation(made(module, name, schedules.interval(2), "eager"), name, 2)
        assert max(relative_error(a, b) for a, b in zip(found, expected, strict=True)) < 1e-4
        first = found


def test_options() -> None:
    module = sample(FEW[0]).module
    ours = made(module, FEW[0], schedules.interval(2), "onnxruntime", session_options={"intra_op_num_threads": 1})
    ours.prepare()
    for options, words in (
        ({"speed": 1}, "onnxruntime backend has no option 'speed'.*'providers'"),
        ({"providers": ["MagicExecutionProvider"]}, "no MagicExecutionProvider"),
    ):
        with pytest.raises(CacheError, match=words):
            made(module, FEW[0], schedules.interval(2), "onnxruntime", **options).prepare()
