"""What ONNX takes only in another form: through ONNX Runtime, against eager."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import flex_attention

from diffcache_fx import compile_with_cache, export, schedules
from diffcache_fx.errors import CallError, ExportError
from diffcache_fx.measure import relative_error

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore:flex_attention called")]
Step = Callable[[torch.Tensor], torch.Tensor]


def _narrow_index(x: torch.Tensor) -> torch.Tensor:
    return x[:, torch.arange(5, -1, -1, dtype=torch.int32)]


def _booleans(x: torch.Tensor) -> torch.Tensor:
    positive, large = x > 0, x > 1
    either = torch.where(large, positive, ~positive).masked_fill(x < -1, True)
    return x * (either * positive)


def _order(x: torch.Tensor) -> torch.Tensor:
    return torch.take_along_dim(x, torch.argsort(x, dim=1, stable=True), dim=1)


def _near(score: torch.Tensor, _: Any, head: Any, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return torch.where((q - k).abs() < 3, score, float("-inf"))


def _flex(x: torch.Tensor) -> torch.Tensor:
    heads = x.reshape(x.shape[0], 6, 2, 4).transpose(1, 2)
    return flex_attention(heads, heads, heads, score_mod=_near).transpose(1, 2).reshape(x.shape)  # type: ignore[union-attr]


def _one_head(x: torch.Tensor) -> torch.Tensor:
    near = (torch.arange(6)[:, None] - torch.arange(6)).abs() < 3
    found = nn.functional.scaled_dot_product_attention(x, x, x)
    return found + nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=near.expand(x.shape[0], 6, 6))


def _smaller_and_larger(x: torch.Tensor) -> torch.Tensor:
    sizes = (x.unsqueeze(1), (9, 5)), (x.unsqueeze(1), (4, 16))
    first, second = (nn.functional.interpolate(a, size, mode="bicubic", antialias=True) for a, size in sizes)
    return x + first.mean() + second.mean(dim=(2, 3)).sum()


def _aligned(x: torch.Tensor) -> torch.Tensor:
    first = nn.functional.interpolate(x.unsqueeze(1), (4, 5), mode="bicubic", antialias=True, align_corners=True)
    second = nn.functional.interpolate(x.unsqueeze(1), scale_factor=0.5, mode="bilinear", antialias=True)
    return x + first.std() + second.std(dim=(2, 3)).sum()


def _frequencies(x: torch.Tensor) -> torch.Tensor:
    """The last place of a table's largest entry is a tenth of a turn."""
    table = torch.exp(torch.linspace(0.0, 13.8, 8))
    return x + torch.sin(table * x.round())


def _orthogonal(x: torch.Tensor) -> torch.Tensor:
    return x @ torch.linalg.qr(torch.arange(64.0).sin().reshape(8, 8))[0]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 8), nn.GELU())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x)


class Blocks(nn.Module):
    """Four residual blocks, after a first step that is one of those above."""

    def __init__(self, first: Step) -> None:
        super().__init__()
        self.first = first
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = self.first(x) + timestep
        for block in self.blocks:
            x = block(x)
        return x


X = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "step",
    [_narrow_index, _booleans, _order, _flex, _one_head, _smaller_and_larger, _aligned, _frequencies, _orthogonal],
    ids=lambda step: step.__name__,
)
def test_through_onnx_runtime(step: Step, tmp_path: Path) -> None:
    model = Blocks(step).eval()
    cached = compile_with_cache(
        model, schedules.interval(2), backend="eager", num_steps=4, example_inputs=((X, torch.tensor(1.0)), {})
    )
    loaded = export.load_bundle(export.to_onnx(cached, tmp_path / "bundle"))
    for count in range(4):
        moment = torch.tensor(1.0 - count / 4)
        with torch.no_grad():
            assert relative_error(loaded(X, moment), cached(X, moment)) < 1e-5
    assert loaded.stats().reused == 2


def test_flex_attention_before_the_decision() -> None:
    """The probe of an adaptive guard keeps the functions that its attention calls."""
    model = Blocks(_flex).eval()
    outputs = []
    for decide in ("host", "graph"):
        cached = compile_with_cache(
            model,
            schedules.first_block_cache(10.0),
            backend="eager",
            decide=decide,
            num_steps=4,
            example_inputs=((X, X.mean()), {}),
        )
        with torch.no_grad():
            outputs.append([cached(X, torch.tensor(1.0 - step / 4)) for step in range(4)])
        assert cached.explain().conditionals == 1
    assert all(torch.equal(a, b) for a, b in zip(*outputs, strict=True))


class Masked(nn.Module):
    """How many tokens there are depends on the mask's values."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = x[:, : int(mask.sum().item())] * timestep
        for block in self.blocks:
            x = block(x)
        return x


def test_values_that_decide_a_shape_are_part_of_the_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mask = torch.tensor([1, 1, 1, 1, 0, 0])
    inputs = (X, torch.tensor(1.0), mask)
    cached = compile_with_cache(Masked().eval(), schedules.interval(2), backend="eager", example_inputs=(inputs, {}))
    with torch.no_grad():
        expected = cached(*inputs)
    cached.reset()
    loaded = export.load_bundle(export.to_onnx(cached, tmp_path / "bundle"))
    with torch.no_grad():
        assert relative_error(loaded(*inputs), expected) < 1e-5
    assert expected.shape[1] == 4
    with pytest.raises(CallError, match="the values of mask are part of this bundle's programs"):
        loaded(X, torch.tensor(0.5), torch.tensor([1, 1, 1, 0, 0, 0]))
    monkeypatch.setattr("diffcache_fx.export.describe._MOST_VALUES", 5)
    with pytest.raises(ExportError, match="the 6 values of 'mask' are part of the program"):
        export.to_onnx(cached, tmp_path / "other")


class WithAbsentPast(nn.Module):
    """What it hands from before the decision to after the blocks has no elements."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        past = torch.sin(x[:, 6:])
        x = x * timestep
        for block in self.blocks:
            x = block(x)
        return torch.cat([past, x], dim=1)


def test_empty_values_cross_from_the_probe_to_the_rest(tmp_path: Path) -> None:
    cached = compile_with_cache(
        WithAbsentPast().eval(),
        schedules.first_block_cache(10.0),
        backend="eager",
        num_steps=4,
        example_inputs=((X, torch.tensor(1.0)), {}),
    )
    loaded = export.load_bundle(export.to_onnx(cached, tmp_path / "bundle", form="split"))
    for count in range(4):
        moment = torch.tensor(1.0 - count / 4)
        with torch.no_grad():
            assert relative_error(loaded(X, moment), cached(X, moment)) < 1e-5
    assert loaded.stats().reused == 3
