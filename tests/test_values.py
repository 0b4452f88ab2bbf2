"""Models whose shapes or branches depend on the values of small inputs: the values belong to the captured program."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from diffcache_fx import compile_with_cache, schedules
from diffcache_fx.capture import capture
from diffcache_fx.errors import CaptureError
from diffcache_fx.values import layout_inputs


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x).tanh()


class Packed(nn.Module):
    """Runs on the tokens that the mask keeps, with a branch on how many there are, and puts them back."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(4))

    def forward(self, x: Tensor, timestep: Tensor, mask: Tensor) -> Tensor:
        lengths = mask.sum(1).tolist()
        longest = max(lengths)
        kept = x[mask] * timestep + (0.5 if len(set(lengths)) > 1 else 0.0)
        for layer in self.layers:
            kept = layer(kept)
        places = torch.zeros(mask.shape, dtype=torch.int64)
        places[mask] = torch.arange(int(mask.sum()))
        out = torch.zeros_like(x)
        out[mask] = kept
        return out[:, :longest] * places[:, :longest, None]


def _model() -> Packed:
    torch.manual_seed(0)
    return Packed().eval()


def _call(*lengths: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(6)[None] < torch.tensor(lengths)[:, None]
    return torch.randn(len(lengths), 6, 8, generator=generator), torch.tensor(0.7), mask


def test_values_that_decide_shapes_are_part_of_the_key() -> None:
    model = _model()
    cached = compile_with_cache(model, schedules.always(), backend="eager")
    with torch.no_grad():
        for lengths in ((3, 5), (5, 5), (2, 6), (3, 5)):
            for seed in (0, 1):
                call = _call(*lengths, seed=seed)
                cached.reset()
                assert torch.equal(cached(*call), model(*call))
    assert "known values" in cached.explain().captured_by
    assert cached.stats().compilations == 3  # one for each mask, and none for a mask seen before


def test_a_mask_changed_in_place_is_seen() -> None:
    model = _model()
    cached = compile_with_cache(model, schedules.always(), backend="eager")
    x, t, mask = _call(3, 5)
    with torch.no_grad():
        cached(x, t, mask)
        cached.reset()
        mask[0, 4] = True
        assert torch.equal(cached(x, t, mask), model(x, t, mask))


@pytest.mark.filterwarnings("ignore:shapes, dtypes")
def test_a_mask_that_changes_in_the_middle_takes_nothing_from_the_cache() -> None:
    model = _model()
    cached = compile_with_cache(model, schedules.interval(4), backend="eager")
    with torch.no_grad(), cached.cache_context("one"):
        cached(*_call(3, 5))
        x, t, mask = _call(2, 5)
        assert torch.equal(cached(x, t - 0.1, mask), model(x, t - 0.1, mask))


def test_only_layout_is_baked_in() -> None:
    leaves = (torch.randn(2, 3), torch.ones(2, dtype=torch.bool), torch.tensor([5, 5]), torch.zeros(1 << 17).long())
    assert layout_inputs(leaves, ("x", "mask", "timestep", "table")) == (1,)


def test_decisions_on_what_varies_stay_refused() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return x * 2 if bool((x[mask] > 0).all()) else x

    with pytest.raises(CaptureError, match="known values"):
        capture(Branching().eval(), (torch.randn(2, 3), torch.ones(2, 3, dtype=torch.bool)))
