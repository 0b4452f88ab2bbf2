"""The compiled programs of one captured signature, run on flat inputs: weights, the caller's tensors, cache state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from .plan import ProgramChoice, Reused
from .program import InputKind, Measured, OutputKind, Region
from .sizes import Sizes, Symbols
from .state import CacheState

if TYPE_CHECKING:
    from .export.lowered import Lowered

Key = Reused | str
# Programs beside those that refresh and reuse, by name.
PROBE, DIFFERENCE, REBUILD = "probe", "difference", "rebuild"


@dataclass
class Feed:
    """What a call of a program takes beside weights and cache state.

    users: the caller's tensors, by leaf. rows: forecast weights [regions, slots]. predicates: by group. live: what the
    probe program handed on, by node. kept: what guards keep, by target. force: for guards in the graph. moment: for
    these, and for corrections.
    """

    users: Mapping[int, torch.Tensor]
    rows: torch.Tensor | None = None
    predicates: Mapping[str, torch.Tensor] = field(default_factory=dict)
    live: Mapping[str, torch.Tensor] = field(default_factory=dict)
    kept: Mapping[str, torch.Tensor] = field(default_factory=dict)
    force: Mapping[str, torch.Tensor] = field(default_factory=dict)
    moment: torch.Tensor | None = None


@dataclass
class Results:
    """What a program returned. users: the model's output tensors. states: by region, in declared order. Others by
    target."""

    users: list[torch.Tensor]
    states: dict[str, list[torch.Tensor]]
    signals: dict[str, torch.Tensor]
    memory: dict[str, torch.Tensor]
    live: dict[str, torch.Tensor]
    decisions: dict[str, torch.Tensor]


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
        extra: Mapping[str, Lowered] | None = None,
        measured: Sequence[Measured] = (),
    ) -> None:
        """groups: for a branching program, the name of each region's predicate. extra: other programs by name: what
        runs before the decision (PROBE), what works on the outputs of two guidance branches."""
        self.regions = tuple(regions)
        self.lowered: dict[Key, Lowered] = dict(lowered.items())
        self.lowered.update(extra or {})
        self.choice = choice
        self.weight = dict(weight)
        self.groups = dict(groups or {})
        self.measured = {entry.rule: entry for entry in measured}
        self.branching = any(entry.branching for entry in self.lowered.values())
        self.split = PROBE in self.lowered
        self._parameters = parameters
        shapes = {leaf: shape for entry in self.lowered.values() for leaf, shape in entry.shapes.items()}
        self._leaves = tuple(shapes)
        self._symbols = Symbols(tuple(shapes.values()))
        self._templates: dict[Key, list[Any]] = {}
        self._layout = {key: _Layout(entry) for key, entry in self.lowered.items()}

    def bind(self) -> None:
        """Look the parameters up anew: at the start of a generation, so that replaced tensors take effect."""
        found: dict[str, torch.Tensor] = {}

        def lookup(name: str) -> torch.Tensor:
            if name not in found:
                found[name] = self._parameters(name)
            return found[name]

        self._templates = {key: layout.template(lookup) for key, layout in self._layout.items()}

    def run(self, key: Key, state: CacheState, feed: Feed) -> Results:
        """Run one program."""
        layout = self._layout[key]
        args = self._templates[key].copy()
        layout.fill(args, state, feed)
        return layout.sort(self.lowered[key].run(*args))

    def sizes(self, users: Mapping[int, torch.Tensor]) -> Sizes:
        """What symbolic sizes are in a call."""
        return self._symbols.bind([users[leaf].shape for leaf in self._leaves])

    def memory(self, key: Key, sizes: Sizes) -> Mapping[str, torch.Tensor]:
        """Zeros for each kept quantity that a program takes, by target: what a generation starts from."""
        return {
            target: torch.zeros(sizes.of(shape), dtype=dtype, device=device)
            for target, (shape, dtype, device) in self.lowered[key].blanks.items()
        }


class _Layout:
    """Where each kind of input and output of a lowered program lies."""

    def __init__(self, lowered: Lowered) -> None:
        self._lowered = lowered
        self._inputs: dict[InputKind, list[tuple[int, str]]] = {kind: [] for kind in InputKind}
        for position, entry in enumerate(lowered.inputs):
            self._inputs[entry.kind].append((position, entry.target))
        self._users = [(position, int(target)) for position, target in self._inputs[InputKind.USER]]
        self._history = []
        for position, target in self._inputs[InputKind.HISTORY]:
            region, value, slot = target.rsplit("/", 2)
            self._history.append((position, region, int(value), int(slot)))
        self._outputs: dict[OutputKind, list[tuple[int, str]]] = {kind: [] for kind in OutputKind}
        for position, output in enumerate(lowered.outputs):
            self._outputs[output.kind].append((position, output.target))
        drop = 2 if lowered.branching else 1
        self._states = [(i, target.rsplit("/", drop)[0]) for i, target in self._outputs[OutputKind.STATE]]

    def fill(self, args: list[Any], state: CacheState, feed: Feed) -> None:
        """Put a call's tensors into their places."""
        for position, leaf in self._users:
            args[position] = feed.users[leaf]
        for position, region, value, slot in self._history:
            args[position] = state.histories[region].slots[value][slot]
        for position, _ in self._inputs[InputKind.ROWS]:
            args[position] = feed.rows
        for position, _ in self._inputs[InputKind.MOMENT]:
            args[position] = feed.moment
        named = (
            (InputKind.PREDICATE, feed.predicates),
            (InputKind.LIVE, feed.live),
            (InputKind.MEMORY, feed.kept),
            (InputKind.FORCE, feed.force),
        )
        for kind, source in named:
            for position, target in self._inputs[kind]:
                args[position] = source[target]

    def sort(self, results: Sequence[torch.Tensor]) -> Results:
        """A program's results by kind."""
        states: dict[str, list[torch.Tensor]] = {}
        for position, region in self._states:
            states.setdefault(region, []).append(results[position])

        def named(kind: OutputKind) -> dict[str, torch.Tensor]:
            return {target: results[position] for position, target in self._outputs[kind]}

        return Results(
            [results[position] for position, _ in self._outputs[OutputKind.USER]],
            states,
            named(OutputKind.SIGNAL),
            named(OutputKind.MEMORY),
            named(OutputKind.LIVE),
            named(OutputKind.DECISION),
        )

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
