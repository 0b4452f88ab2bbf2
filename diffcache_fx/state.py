"""Cache state of one context: the history of refreshed values of every region, and where each was refreshed.

The tensors lie in fixed slots written in turn; forecasts permute the row of weights, never the tensors. Programs that
decide inside the graph move the history themselves (newest first); for them slot and age are the same.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .program import Region, size_hint


class RegionHistory:
    """The past refreshes of one region: per cut value a list of slots, and the step position of each."""

    def __init__(self, region: Region) -> None:
        self.region = region
        self.depth = max(value.slots for value in region.cut)
        self.slots: list[list[torch.Tensor | None]] = [[None] * value.slots for value in region.cut]
        self.ages: list[int] = []  # slots, newest first
        self.positions: list[float] = []  # positions on the step axis, newest first

    @property
    def filled(self) -> bool:
        return bool(self.positions)

    def refresh(self, values: Sequence[torch.Tensor], position: float) -> None:
        """Store freshly computed cut values in the oldest slot."""
        if len(self.ages) < self.depth:
            slot = len(self.ages)
        else:
            slot = self.ages.pop()
            self.positions.pop()
        self.ages.insert(0, slot)
        self.positions.insert(0, position)
        for value, slots in zip(values, self.slots, strict=True):
            if slots[0] is None:
                # An empty slot gets weight 0, and 0 x NaN is NaN: it must hold numbers.
                for index in range(1, len(slots)):
                    slots[index] = torch.zeros_like(value)
            held = slots[slot % len(slots)]
            if held is not None and value.device.type == "cuda" and held.shape == value.shape:
                held.copy_(value)  # same address at every step, for CUDA graphs
            else:
                slots[slot % len(slots)] = value

    def shift(self, position: float | None) -> None:
        """Note that a guarded program has moved the history itself (position None: it was kept)."""
        if position is not None:
            self.positions = [position, *self.positions][: self.depth]
        self.ages = list(range(len(self.positions)))

    def row(self, weights: Sequence[float]) -> list[float]:
        """Weights given newest first, as a row in slot order, padded with zeros."""
        row = [0.0] * self.depth
        for slot, weight in zip(self.ages, weights, strict=True):
            row[slot] = weight
        return row

    @property
    def nbytes(self) -> int:
        return sum(t.untyped_storage().nbytes() for slots in self.slots for t in slots if t is not None)


class CacheState:
    """The histories of all regions, for one context of one captured signature."""

    def __init__(self, regions: Sequence[Region]) -> None:
        self.regions = regions
        self.histories = {region.name: RegionHistory(region) for region in regions}

    def missing(self) -> frozenset[str]:
        """Regions that were never refreshed in this generation and so cannot be reused."""
        return frozenset(name for name, history in self.histories.items() if not history.filled)

    def zeros(self, name: str) -> list[list[torch.Tensor]]:
        """The slots of a region, made of zeros where still empty (guarded programs take all of them at every step)."""
        history = self.histories[name]
        for value, slots in zip(history.region.cut, history.slots, strict=True):
            for index, slot in enumerate(slots):
                if slot is None:
                    shape = tuple(size_hint(size) for size in value.shape)
                    slots[index] = torch.zeros(shape, dtype=value.dtype, device=value.device)
        return history.slots  # type: ignore[return-value]

    @property
    def nbytes(self) -> int:
        return sum(history.nbytes for history in self.histories.values())
