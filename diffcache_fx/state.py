"""Cache state of one context: the history of refreshed values of every region, and where each was refreshed.

The tensors lie in fixed slots written in turn; forecasts permute the row of weights, never the tensors. Programs that
decide inside the graph move the history themselves (newest first); for them slot and age are the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from .program import Region
from .sizes import Sizes, sizes_of


class RegionHistory:
    """The past refreshes of one region: per cut value a list of slots, and the step position of each."""

    def __init__(self, region: Region) -> None:
        self.region = region
        self.depth = max(value.slots for value in region.cut)
        self.slots: list[list[torch.Tensor | None]] = [[None] * value.slots for value in region.cut]
        self.ages: list[int] = []  # slots, newest first
        self.positions: list[float] = []  # positions on the step axis, newest first
        self.shared = False  # the newest value is the mean of the guidance branches already

    @property
    def filled(self) -> bool:
        return bool(self.positions)

    def refresh(self, values: Sequence[torch.Tensor], position: float) -> None:
        """Store freshly computed cut values in the oldest slot."""
        self.shared = False
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

    def take(self, values: Sequence[torch.Tensor]) -> None:
        """Put what a guarded program returned into the slots, in order."""
        supply = iter(values)
        self.slots = [[next(supply) for _ in slots] for slots in self.slots]

    def shift(self, position: float | None) -> None:
        """Note that a guarded program has moved the history itself (position None: it was kept)."""
        if position is not None:
            self.shared = False
            self.positions = [position, *self.positions][: self.depth]
        self.ages = list(range(len(self.positions)))

    def copy(self) -> RegionHistory:
        """One that goes on by itself. On a GPU slots are written to in place, so that it needs its own."""
        made = RegionHistory(self.region)
        made.slots = [[_own(slot) for slot in slots] for slots in self.slots]
        made.ages, made.positions, made.shared = list(self.ages), list(self.positions), self.shared
        return made

    def row(self, weights: Sequence[float]) -> list[float]:
        """Weights given newest first, as a row in slot order, padded with zeros."""
        row = [0.0] * self.depth
        for slot, weight in zip(self.ages, weights, strict=True):
            row[slot] = weight
        return row

    def tensors(self) -> list[torch.Tensor]:
        return [tensor for slots in self.slots for tensor in slots if tensor is not None]

    @property
    def nbytes(self) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in self.tensors())


def _own(slot: torch.Tensor | None) -> torch.Tensor | None:
    return slot.clone() if slot is not None and slot.device.type == "cuda" else slot


@dataclass
class GuardState:
    """What one adaptive guard carries from step to step.

    numbers: its accumulators and counters, by name (on the host). kept: quantities of earlier steps, by name. pending:
    signals of the step before that are still to be read, and whether that step refreshed. last: signals read last.
    graph: everything, by input target, where the guard decides inside the graph.
    """

    numbers: dict[str, float] = field(default_factory=dict)
    kept: dict[str, torch.Tensor] = field(default_factory=dict)
    pending: tuple[Reading, bool] | None = None
    last: dict[str, float] = field(default_factory=dict)
    graph: dict[str, torch.Tensor] = field(default_factory=dict)

    def copy(self) -> GuardState:
        """One that goes on by itself; guards put new tensors in place of those they keep."""
        return GuardState(dict(self.numbers), dict(self.kept), self.pending, dict(self.last), dict(self.graph))

    def tensors(self) -> list[torch.Tensor]:
        return [*self.kept.values(), *self.graph.values()]


class Reading:
    """Scalars on their way to the host: copied at once, waited for when they are asked for."""

    def __init__(self, signals: Mapping[str, torch.Tensor]) -> None:
        """signals: 0-d tensors by name."""
        self._names = list(signals)
        self._event: torch.cuda.Event | None = None
        self._values = torch.stack([value.float() for value in signals.values()]) if signals else torch.empty(0)
        if self._values.device.type == "cuda":
            there = torch.empty(self._values.shape, dtype=torch.float32, pin_memory=True)
            there.copy_(self._values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()
            self._values = there

    def get(self) -> dict[str, float]:
        """The numbers, by name; waits for the copy if it is not done."""
        if self._event is not None:
            self._event.synchronize()
        return dict(zip(self._names, self._values.tolist(), strict=True))


class CacheState:
    """The histories of all regions and the state of all guards, for one context of one captured signature."""

    def __init__(self, regions: Sequence[Region], rules: Iterable[int] = ()) -> None:
        """rules: the indices of those with an adaptive guard."""
        self.regions = regions
        self.histories = {region.name: RegionHistory(region) for region in regions}
        self.guards = {rule: GuardState() for rule in rules}
        self.difference: dict[str, torch.Tensor] = {}  # to the conditional branch: its low and high frequencies
        self.emphasis = (1.0, 1.0)  # what these are multiplied by

    def copy(self) -> CacheState:
        """The same state, from which the two go different ways."""
        made = CacheState(self.regions)
        made.histories = {name: history.copy() for name, history in self.histories.items()}
        made.guards = {rule: guard.copy() for rule, guard in self.guards.items()}
        made.difference, made.emphasis = dict(self.difference), self.emphasis
        return made

    def missing(self) -> frozenset[str]:
        """Regions that were never refreshed in this generation and so cannot be reused."""
        return frozenset(name for name, history in self.histories.items() if not history.filled)

    def zeros(self, name: str, sizes: Sizes) -> list[list[torch.Tensor]]:
        """The slots of a region, made of zeros where still empty (guarded programs take all of them at every step).
        sizes: the symbolic ones of the call."""
        history = self.histories[name]
        for value, slots in zip(history.region.cut, history.slots, strict=True):
            for index, slot in enumerate(slots):
                if slot is None:
                    shape = sizes.of(sizes_of(value.shape))
                    slots[index] = torch.zeros(shape, dtype=value.dtype, device=value.device)
        return history.slots  # type: ignore[return-value]

    def tensors(self) -> list[torch.Tensor]:
        histories = [history.tensors() for history in self.histories.values()]
        return [
            tensor for held in (*histories, *(guard.tensors() for guard in self.guards.values())) for tensor in held
        ]

    @property
    def nbytes(self) -> int:
        return bytes_of([self])


def bytes_of(states: Iterable[CacheState]) -> int:
    """Bytes of memory that these states hold, what they share counted once."""
    storages = [tensor.untyped_storage() for state in states for tensor in state.tensors()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
