"""How good images are: per-image PSNR and SSIM to a reference, accuracy, Fréchet distance, each with its interval.

SSIM and the Fréchet distance are torchmetrics'; the intervals are bootstraps from fixed seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from statistics import NormalDist
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
    """A figure with its bootstrap interval; in the unit of the figure. draws: of the bootstrap, where they are kept;
    those of two sets of images of the same noise take the same images, and can be compared one by one."""

    value: float
    low: float
    high: float
    draws: tuple[float, ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, data: dict[str, Any]) -> Estimate:
        return cls(data["value"], data["low"], data["high"], tuple(data.get("draws", ())))

    def to_dict(self, draws: bool = False) -> dict[str, Any]:
        """For JSON; with the draws, where they are wanted and there are any."""
        found: dict[str, Any] = {"value": self.value, "low": self.low, "high": self.high}
        return found | ({"draws": [round(draw, 5) for draw in self.draws]} if draws and self.draws else {})


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


class Neighbourhoods:
    """Precision: the share of features [N, D] that lie within the distance of some reference row to its k-th nearest;
    recall: the share of reference rows that lie within such a distance of a feature row (Kynkaanniemi et al., 2019).

    reference: [M, D]; recall is taken over as many of its rows, drawn from a fixed seed, as there are features.
    """

    def __init__(self, reference: Tensor, nearest: int = 3) -> None:
        self._reference, self._nearest = reference.float(), nearest
        self._radii = self._radii_of(self._reference)

    def __call__(self, features: Tensor) -> dict[str, Tensor]:
        """`precision` and `recall`, one 0 or 1 for each row."""
        rows = features.float()
        picks = torch.randperm(len(self._reference), generator=torch.Generator().manual_seed(0))[: len(rows)]
        inside = torch.cat([(part <= self._radii).any(1) for part in self._distances(rows, self._reference)])
        chosen, radii = self._reference[picks], self._radii_of(rows)
        covered = torch.cat([(part <= radii).any(1) for part in self._distances(chosen, rows)])
        return {"precision": inside.double(), "recall": covered.double()}

    def _radii_of(self, rows: Tensor) -> Tensor:
        """Of each row, the distance to its k-th nearest other row."""
        count = self._nearest + 1  # each row is its own nearest
        return torch.cat([part.kthvalue(count, dim=1).values for part in self._distances(rows, rows)])

    @staticmethod
    def _distances(rows: Tensor, others: Tensor) -> Iterator[Tensor]:
        """[., len(others)] for some rows after the other, so that memory stays small."""
        for part in rows.split(500):
            yield torch.cdist(part, others)


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
    excess over the value, so that the interval tells the spread, not that bias. It does not go below 0. Draws are kept.
    """
    value = distance(features)
    picks = np.random.default_rng(seed).integers(0, len(features), size=(draws, len(features)))
    found = np.array([distance(features[torch.from_numpy(rows)]) for rows in picks])
    shifted = found - found.mean() + value
    return replace(_interval(value, shifted.clip(min=min(0.0, value))), draws=tuple(shifted.tolist()))


def difference(ours: Estimate, other: Estimate) -> Estimate:
    """Of two figures of images of the same noise, whose draws are of the same images; interval and draws are those of
    the differences. Raises ValueError where draws were not kept."""
    if not ours.draws or len(ours.draws) != len(other.draws):
        raise ValueError(f"{len(ours.draws)} and {len(other.draws)} draws cannot be compared one by one")
    draws = np.array(ours.draws) - np.array(other.draws)
    return replace(_interval(ours.value - other.value, draws), draws=tuple(draws.tolist()))


def probability_of_none(found: Estimate) -> float:
    """Two-sided probability of a difference at least this large where there is none: normal, with the spread of the
    draws, since these are too few for small probabilities. Raises ValueError where draws were not kept."""
    if not found.draws:
        raise ValueError("a difference without its draws has no spread")
    spread = float(np.std(found.draws, ddof=1))
    if spread == 0:
        return float(found.value == 0)
    return 2 * NormalDist().cdf(-abs(found.value) / spread)


def shown_of_many(probabilities: Sequence[float], level: float = 1 - CONFIDENCE) -> list[bool]:
    """Which of several differences are shown though so many were looked at (Holm, 1979): the chance that any of them
    is none is at most `level`."""
    found = [False] * len(probabilities)
    for rank, index in enumerate(np.argsort(probabilities, kind="stable")):
        if probabilities[index] > level / (len(probabilities) - rank):
            break
        found[index] = True
    return found


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
    neighbourhoods: Neighbourhoods | None = None,
) -> dict[str, Estimate]:
    """Everything about images [N, 1, H, W] in [-1, 1] drawn for `labels` [N].

    read: from images to the labels seen in them and their features. reference: the uncached images of the same noise;
    None for these themselves, which have no PSNR and SSIM. Returns `psnr_db`, `ssim`, `accuracy` (a share), `frechet`;
    with neighbourhoods of real features, `precision` and `recall`.
    """
    found = {}
    if reference is not None:
        found["psnr_db"] = mean_estimate(psnr_each(images, reference))
        found["ssim"] = mean_estimate(ssim_each(images, reference))
    seen, features = read(images)
    found["accuracy"] = mean_estimate((seen == labels).double())
    found["frechet"] = distance_estimate(features, distance)
    if neighbourhoods is not None:
        found |= {name: mean_estimate(values) for name, values in neighbourhoods(features).items()}
    return found
