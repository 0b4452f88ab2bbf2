"""How scale and shift are learned from what `alignment` measures: in closed form, or trained as published.

Block Caching (Wimbauer et al., CVPR 2024). Tables are [steps, 2, channels], scale before shift; learners write to them
in place, and the next step runs with what they wrote.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from diffcache_fx.passes.compare import FORECAST, FORECAST_SQUARE, FRESH, FRESH_SQUARE, PRODUCT

FREQUENCIES = 64
Moments = Mapping[str, Tensor]  # by "region/index": [5, channels], see `passes.compare`


class Learner(Protocol):
    """again: whether a step runs once more with what was learned at it."""

    again: bool

    def learn(self, step: int, moments: Moments) -> None:
        """Take what a step has measured."""


class ClosedForm:
    """Each step's scale and shift by least squares, channel by channel, over all samples seen so far."""

    again = True

    def __init__(self, tables: Mapping[str, Tensor]) -> None:
        self.tables = tables
        self._sums: dict[tuple[str, int], tuple[int, Tensor]] = {}

    def learn(self, step: int, moments: Moments) -> None:
        for name, found in moments.items():
            count, raw = self._sums.get((name, step), (0, torch.zeros(4, found.shape[1], dtype=torch.float64)))
            m = found.double().cpu()
            h, f = m[FORECAST], m[FRESH]
            raw = raw + torch.stack((h, f, m[FORECAST_SQUARE] + h * h, m[PRODUCT] + h * f))
            self._sums[name, step] = count + 1, raw
            h, f, square, product = raw / (count + 1)
            variance, covariance = square - h * h, product - h * f
            flat = variance <= 1e-6 * square  # a channel that hardly varies tells of a shift only
            scale = torch.where(flat, 1.0, covariance / variance.clamp_min(1e-30))
            self.tables[name][step] = torch.stack((scale, f - scale * h)).to(self.tables[name])


class Trained:
    """Scale and shift as linear maps of the timestep's embedding (sines and cosines of `FREQUENCIES` frequencies, and
    1), trained by Adam, one update for each step that reuses; the learning rate falls to zero along a cosine. What is
    minimised is the mean square of what is left of each value, over its mean square, summed over the values."""

    again = False

    def __init__(
        self, tables: Mapping[str, Tensor], timesteps: list[float], iterations: int, learning_rate: float
    ) -> None:
        self.tables, self.iterations, self.done = tables, iterations, 0
        self.losses: list[float] = []
        self._embedding = embedding(torch.tensor(timesteps))
        width = self._embedding.shape[1]
        self._maps = {name: torch.zeros(width, 2, table.shape[2], requires_grad=True) for name, table in tables.items()}
        self._adam = torch.optim.Adam(self._maps.values(), lr=learning_rate)
        self._rate = torch.optim.lr_scheduler.CosineAnnealingLR(self._adam, iterations)

    def learn(self, step: int, moments: Moments) -> None:
        if not moments or self.done == self.iterations:
            return
        with torch.inference_mode(False), torch.enable_grad():
            seen = {name: found.float().cpu().clone() for name, found in moments.items()}
            loss = torch.stack([self._loss(step, name, found) for name, found in seen.items()]).sum()
            self._adam.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
        self._adam.step()
        self._rate.step()
        self.losses.append(float(loss.detach()))
        self.done += 1
        for name, table in self.tables.items():
            made = torch.einsum("se,ekc->skc", self._embedding, self._maps[name].detach())
            made[:, 0] += 1.0
            table.copy_(made)

    def _loss(self, step: int, name: str, m: Tensor) -> Tensor:
        scale, shift = torch.einsum("e,ekc->kc", self._embedding[step], self._maps[name])
        scale = 1.0 + scale
        h, f = m[FORECAST], m[FRESH]
        off = scale * h + shift - f  # of the means; what varies around them comes on top
        left = off.square() + scale.square() * m[FORECAST_SQUARE] - 2 * scale * m[PRODUCT] + m[FRESH_SQUARE]
        return left.mean() / (m[FRESH_SQUARE] + f.square()).mean().clamp_min(1e-12)


def embedding(timesteps: Tensor) -> Tensor:
    """[steps, 2 FREQUENCIES + 1] of length 1 or so: sinusoids of periods from 2 pi to 2 pi 10,000, as denoisers embed
    timesteps from 0 to 1000, and 1."""
    scaled = timesteps.double() * (1000.0 / timesteps.abs().max().double().clamp_min(1e-6))
    rates = torch.exp(-torch.arange(FREQUENCIES).double() * (torch.tensor(10000.0).log() / FREQUENCIES))
    angles = scaled[:, None] * rates
    waves = torch.cat((angles.sin(), angles.cos()), dim=1) / FREQUENCIES**0.5
    return torch.cat((waves, torch.ones(len(scaled), 1)), dim=1).float()
