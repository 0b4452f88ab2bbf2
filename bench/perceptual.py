"""Measures that need weights of their own, for those who have them: LPIPS, FID and CLIP score through torchmetrics, and
ImageReward. `python -m bench.fidelity --metrics NAME ...`; none is part of the committed results.

LPIPS and FID compare with the uncached images of the same noise; CLIP score and ImageReward with the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from bench.quality import Estimate, FrechetDistance, distance_estimate, mean_estimate
from diffcache_fx import CacheError

# images and reference [N, C, H, W] in [-1, 1] (no reference: they are it), prompts [N]; None where it tells nothing.
Measure = Callable[[Tensor, Tensor | None, Sequence[str]], Estimate | None]
Each = Callable[..., Tensor]
_BATCH = 50
_LEAST = 64  # pixels: the networks of LPIPS halve an image five times


def lpips(network: str = "alex") -> Measure:
    """Learned perceptual distance to the uncached image (Zhang et al., 2018); 0 is the same."""
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    metric = LearnedPerceptualImagePatchSimilarity(network, reduction="none", normalize=True)  # type: ignore[arg-type]

    def measure(images: Tensor, reference: Tensor | None, prompts: Sequence[str]) -> Estimate | None:
        if reference is None:
            return None
        found = []
        for part, beside in zip(images.split(_BATCH), reference.split(_BATCH), strict=True):
            found.append(torch.atleast_1d(metric(coloured(part), coloured(beside))))
        return mean_estimate(torch.cat(found))

    return measure


def fid(features: Callable[[Tensor], Tensor] | None = None) -> Measure:
    """Fréchet distance to the uncached images in Inception features; features: of images [N, 3, H, W] uint8."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    extract = features or FrechetInceptionDistance(feature=2048).inception

    def of(images: Tensor) -> Tensor:
        parts = [(255 * coloured(part)).round().to(torch.uint8) for part in images.split(_BATCH)]
        return torch.cat([extract(part) for part in parts])

    def measure(images: Tensor, reference: Tensor | None, prompts: Sequence[str]) -> Estimate | None:
        if reference is None:
            return None
        return distance_estimate(of(images), FrechetDistance(of(reference)))

    return measure


def clip(score: Each | None = None) -> Measure:
    """CLIP score of an image and its prompt, up to 100 (Hessel et al., 2021); score: of an image and a text."""
    if score is None:
        from torchmetrics.multimodal.clip_score import CLIPScore

        score = CLIPScore("openai/clip-vit-base-patch16")
    return _by_prompt(lambda image, prompt: score((255 * image).round().to(torch.uint8), prompt))


def image_reward(score: Each | None = None) -> Measure:
    """How much people would like an image for its prompt (Xu et al., 2023); score: of a PIL image and a text."""
    if score is None:
        import ImageReward  # type: ignore[import-not-found]

        model = ImageReward.load("ImageReward-v1.0")
        score = lambda image, prompt: torch.tensor(model.score(prompt, image))  # noqa: E731
    from diffusers.utils.pil_utils import numpy_to_pil

    return _by_prompt(lambda image, prompt: score(numpy_to_pil(image.permute(1, 2, 0).numpy())[0], prompt))


def _by_prompt(score: Each) -> Measure:
    def measure(images: Tensor, reference: Tensor | None, prompts: Sequence[str]) -> Estimate:
        pairs = zip(coloured(images), prompts, strict=True)
        return mean_estimate(torch.stack([score(image, prompt).detach().cpu() for image, prompt in pairs]))

    return measure


def coloured(images: Tensor) -> Tensor:
    """[N, 1 or 3, H, W] in [-1, 1] as [N, 3, H, W] in [0, 1], no smaller than such networks take."""
    found = ((images.float() + 1) / 2).clamp(0, 1).expand(-1, 3, -1, -1)
    least = min(found.shape[-2:])
    return found if least >= _LEAST else functional.interpolate(found, scale_factor=-(-_LEAST // least))


MEASURES: dict[str, Callable[[], Measure]] = {"lpips": lpips, "fid": fid, "clip": clip, "image_reward": image_reward}
_NEEDS = {
    "lpips": "torchvision and the weights of AlexNet",
    "fid": "torch-fidelity and the weights of its Inception network",
    "clip": "the weights of openai/clip-vit-base-patch16",
    "image_reward": "the package image-reward and its weights",
}


def load(names: Sequence[str]) -> dict[str, Measure]:
    """Measures by name. Raises CacheError where a package or weights are not here."""
    found = {}
    for name in names:
        try:
            found[name] = MEASURES[name]()
        except (ImportError, OSError, RuntimeError) as error:  # what hubs raise where there is no network
            reason = str(error).strip().split("\n")[0]
            raise CacheError(f"--metrics {name} needs {_NEEDS[name]}, which cannot be loaded here: {reason}") from error
    return found
