"""The compiled programs of one captured signature, run on flat inputs: weights, the caller's tensors, cache state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .plan import ProgramChoice, Reused
from .program import InputKind, OutputKind, Region
from .state import CacheState

if TYPE_CHECKING:
    from .export.lowered import Lowered


class StepSet:
    """The compiled programs of one captured signature, with their parameters looked up once per generation."""

    def __init__(
        self,
        regions: Sequence[Region],
        lowered: Mapping[Reused, Lowered],
        choice: ProgramChoice,
        weight: Mapping[str, float],
        parameters: Callable[[str], torch.Tensor],
        groups: Mapping[str, str] | None = None,
    ) -> None:
        """groups: for a branching program, the name of each region's predicate."""
        self.regions = tuple(regions)
        self.lowered = dict(lowered)
        self.choice = choice
        self.weight = dict(weight)
        self.groups = dict(groups or {})
        self.branching = any(entry.branching for entry in self.lowered.values())
        self._parameters = parameters
        self._templates: dict[Reused, list[Any]] = {}
        self._layout = {key: _Layout(entry) for key, entry in self.lowered.items()}

    def bind(self) -> None:
        """Look the parameters up anew: at the start of a generation, so that replaced tensors take effect."""
        found: dict[str, torch.Tensor] = {}

        def lookup(name: str) -> torch.Tensor:
            if name not in found:
                found[name] = self._parameters(name)
            return found[name]

        self._templates = {key: layout.template(lookup) for key, layout in self._layout.items()}

    def run(
        self,
        key: Reused,
        users: Mapping[int, torch.Tensor],
        state: CacheState,
        rows: torch.Tensor | None,
        predicates: Mapping[str, torch.Tensor],
    ) -> tuple[list[torch.Tensor], dict[str, list[torch.Tensor]]]:
        """Run one program; returns the user's outputs and, by region, the state it returned, in declared order."""
        layout = self._layout[key]
        args = self._templates[key].copy()
        for position, leaf in layout.users:
            args[position] = users[leaf]
        for position, region, value, slot in layout.history:
            args[position] = state.histories[region].slots[value][slot]
        for position, _ in layout.rows:
            args[position] = rows
        for position, group in layout.predicates:
            args[position] = predicates[group]
        results = self.lowered[key].run(*args)
        states: dict[str, list[torch.Tensor]] = {}
        for position, region in layout.states:
            states.setdefault(region, []).append(results[position])
        return [results[position] for position in layout.outputs], states


class _Layout:
    """Where each kind of input and output of a lowered program lies."""

    def __init__(self, lowered: Lowered) -> None:
        self._lowered = lowered
        self.users: list[tuple[int, int]] = []
        self.history: list[tuple[int, str, int, int]] = []
        self.rows: list[tuple[int, str]] = []
        self.predicates: list[tuple[int, str]] = []
        for position, entry in enumerate(lowered.inputs):
            if entry.kind is InputKind.USER:
                self.users.append((position, int(entry.target)))
            elif entry.kind is InputKind.HISTORY:
                region, value, slot = entry.target.rsplit("/", 2)
                self.history.append((position, region, int(value), int(slot)))
            elif entry.kind is InputKind.ROWS:
                self.rows.append((position, entry.target))
            elif entry.kind is InputKind.PREDICATE:
                self.predicates.append((position, entry.target))
        self.outputs = [i for i, output in enumerate(lowered.outputs) if output.kind is OutputKind.USER]
        drop = 2 if lowered.branching else 1
        self.states = [
            (i, output.target.rsplit("/", drop)[0])
            for i, output in enumerate(lowered.outputs)
            if output.kind is OutputKind.STATE
        ]

    def template(self, parameters: Callable[[str], torch.Tensor]) -> list[Any]:
        kinds = (InputKind.PARAMETER, InputKind.BUFFER)
        return [
            parameters(entry.target)
            if entry.kind in kinds
            else self._lowered.constants[entry.target]
            if entry.kind is InputKind.CONSTANT
            else None
            for entry in self._lowered.inputs
        ]
