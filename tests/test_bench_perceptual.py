"""Measures that need weights of their own: what they are given, with stand-ins for the networks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from bench import perceptual
from diffcache_fx import CacheError

IMAGES = torch.rand((8, 1, 32, 32), generator=torch.Generator().manual_seed(0)) * 2 - 1
PROMPTS = [f"the digit {n}" for n in range(8)]


def test_images_as_such_networks_take_them() -> None:
    found = perceptual.coloured(IMAGES)
    assert found.shape == (8, 3, 64, 64)
    assert torch.equal(found[:, 2, ::2, ::2], (IMAGES[:, 0] + 1) / 2)
    large = torch.full((2, 3, 100, 80), -3.0)
    assert torch.equal(perceptual.coloured(large), torch.zeros(2, 3, 100, 80))


def test_distance_in_features() -> None:
    seen: list[torch.Tensor] = []

    def features(images: torch.Tensor) -> torch.Tensor:
        seen.append(images)
        return images.float().flatten(2).mean(2) + torch.eye(3)[torch.arange(len(images)) % 3]

    measure = perceptual.fid(features)
    assert measure(IMAGES, None, PROMPTS) is None
    same, moved = measure(IMAGES, IMAGES, PROMPTS), measure(IMAGES.clamp_min(0), IMAGES, PROMPTS)
    assert same is not None
    assert moved is not None
    assert same.value == pytest.approx(0.0, abs=1e-6)
    assert moved.value > 100
    assert {images.dtype for images in seen} == {torch.uint8}


def test_images_with_their_prompts() -> None:
    def bright(image: Any, prompt: str) -> torch.Tensor:
        return image.float().mean() * 0 + int(prompt.split()[-1])

    found = perceptual.clip(bright)(IMAGES, IMAGES, PROMPTS)
    assert found is not None
    assert found.value == 3.5
    assert found.low < 3.5 < found.high
    sizes = set()

    def of_pil(image: Any, prompt: str) -> torch.Tensor:
        sizes.add((image.size, image.mode))
        return torch.tensor(float(prompt.split()[-1]))

    assert perceptual.image_reward(of_pil)(IMAGES, None, PROMPTS) == found
    assert sizes == {((64, 64), "RGB")}


@pytest.mark.parametrize("name", perceptual.MEASURES)
def test_what_is_missing_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> Any:
        raise OSError("We couldn't connect\nto the hub")

    monkeypatch.setitem(perceptual.MEASURES, name, absent)
    with pytest.raises(CacheError, match=f"--metrics {name} needs .*cannot be loaded here: We couldn't connect$"):
        perceptual.load([name])
