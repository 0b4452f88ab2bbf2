"""How good images are: per-image PSNR and SSIM to a reference, accuracy, Fréchet distance, each with its interval.

SSIM and the Fréchet distance are torchmetrics'; the intervals are bootstraps from fixed seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.image import StructuralSimilarityIndexMeasure
from torchmetrics.image.fid import FrechetInceptionDistance

from diffcache_fx.measure import psnr

DRAWS = 2000
FEATURE_DRAWS = 100
CONFIDENCE = 0.95
_EQUAL_DB = 20 * math.log10(2**16)  # images equal to the last bit, as measure.psnr counts them among others


@dataclass(frozen=True)
class Estimate:
    """A figure with its bootstrap interval; in the unit of the figure."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, data: dict[str, float]) -> Estimate:
        return cls(data["value"], data["low"], data["high"])


def psnr_each(images: Tensor, reference: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in [-1, 1], dB, [N] float64; 96 dB where nothing differs."""
    if images.shape != reference.shape:
        raise ValueError(f"images {tuple(images.shape)} and reference {tuple(reference.shape)} differ in shape")
    found = [psnr(a[None], b[None]) for a, b in zip(images, reference, strict=True)]
    return torch.tensor(found, dtype=torch.float64).clamp_max(_EQUAL_DB)


def ssim_each(images: Tensor, reference: Tensor) -> Tensor:
    """Structural similarity of each image [N, C, H, W] in [-1, 1], [N] float64; taken on [0, 1], so that black is 0."""
    metric = StructuralSimilarityIndexMeasure(data_range=1.0, reduction="none")
    return torch.atleast_1d(metric((images.double() + 1) / 2, (reference.double() + 1) / 2)).double()


class _Features(nn.Module):
    """What torchmetrics takes for its feature extractor: the inputs are features already."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.num_features = width

    def forward(self, features: Tensor) -> Tensor:
        return features


class FrechetDistance:
    """Squared Fréchet distance of Gaussians fitted to features [N, D] and to the reference's [M, D], in float64.

    It is biased upwards the more the fewer the rows are: compare figures of equally many.
    """

    def __init__(self, reference: Tensor) -> None:
        self._metric = FrechetInceptionDistance(_Features(reference.shape[1]), reset_real_features=False)
        self._metric.set_dtype(torch.float64)
        self._metric.update(reference.double(), real=True)

    def __call__(self, features: Tensor) -> float:
        self._metric.reset()
        self._metric.update(features.double(), real=False)
        return float(self._metric.compute())


def mean_estimate(values: Tensor, *, draws: int = DRAWS, seed: int = 0) -> Estimate:
    """Mean of per-image values [N]; the interval resamples images."""
    data = values.double().numpy()
    picks = np.random.default_rng(seed).integers(0, len(data), size=(draws, len(data)))
    return _interval(float(data.mean()), data[picks].mean(axis=1))


def distance_estimate(
    features: Tensor, distance: Callable[[Tensor], float], *, draws: int = FEATURE_DRAWS, seed: int = 0
) -> Estimate:
    """A distance of feature rows [N, D]; the interval resamples rows.

    Rows drawn twice make a set look smaller, and so farther away, than it is: the draws are shifted by their mean's
    excess over the value, so that the interval tells the spread and not that bias. It does not go below 0.
    """
    value = distance(features)
    picks = np.random.default_rng(seed).integers(0, len(features), size=(draws, len(features)))
    found = np.array([distance(features[torch.from_numpy(rows)]) for rows in picks])
    return _interval(value, (found - found.mean() + value).clip(min=min(0.0, value)))


def _interval(value: float, draws: np.ndarray[Any, Any]) -> Estimate:
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(draws, [tail, 100 - tail])
    return Estimate(value, float(low), float(high))


def score(
    images: Tensor,
    labels: Tensor,
    read: Callable[[Tensor], tuple[Tensor, Tensor]],
    distance: Callable[[Tensor], float],
    reference: Tensor | None,
) -> dict[str, Estimate]:
    """Everything about images [N, 1, H, W] in [-1, 1] drawn for `labels` [N].

    read: from images to the labels seen in them and their features. reference: the uncached images of the same noise;
    None for these themselves, which have no PSNR and SSIM. Returns `psnr_db`, `ssim`, `accuracy` (a share), `frechet`.
    """
    found = {}
    if reference is not None:
        found["psnr_db"] = mean_estimate(psnr_each(images, reference))
        found["ssim"] = mean_estimate(ssim_each(images, reference))
    seen, features = read(images)
    found["accuracy"] = mean_estimate((seen == labels).double())
    found["frechet"] = distance_estimate(features, distance)
    return found
