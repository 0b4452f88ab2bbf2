"""`StepProgram`: the one intermediate form. A functional ATen graph of one denoising step, with everything it needs
from outside as explicit inputs: parameters by name, the caller's tensors, the cache state, forecast rows, predicates.

Passes map a StepProgram to a StepProgram; lowerings map a StepProgram to something callable or to a file.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree


class InputKind(enum.Enum):
    """Where a program's input comes from at run time."""

    PARAMETER = "parameter"  # target: FQN in the user's module
    BUFFER = "buffer"  # target: FQN in the user's module
    CONSTANT = "constant"  # target: key in StepProgram.constants
    USER = "user"  # target: index of the caller's tensor leaf
    HISTORY = "history"  # target: "region/value/slot"
    ROWS = "rows"  # float32 [number of regions, slots]: forecast weights, in slot order
    PREDICATE = "predicate"  # target: name of the group whose regions refresh together; bool scalar, True = refresh
    MEMORY = "memory"  # target: "rule/name": what an adaptive guard keeps from step to step
    LIVE = "live"  # target: a node of the full program: what the probe program has computed at this step
    FORCE = "force"  # target: "rule": float32 scalar; 1 refreshes and -1 reuses whatever the guard says; 0: free
    MOMENT = "moment"  # float32 [2]: the number of the step, and the share of the run that it completes


class OutputKind(enum.Enum):
    """What a program's output is for."""

    USER = "user"  # target: index of the leaf in the model's output
    STATE = "state"  # target: "region/value": the freshly computed cut value (specialised), or "region/value/slot"
    SIGNAL = "signal"  # target: "rule/name": float32 scalar that an adaptive guard measures
    MEMORY = "memory"  # target: "rule/name": what the guard may keep (specialised), or keeps (guarded)
    LIVE = "live"  # target: a node of the full program, handed on to the rest of the step
    DECISION = "decision"  # target: "rule": bool scalar, True = refreshed
    EXTRA = "extra"  # target: a name asked for by the caller


def size_hint(size: int | torch.SymInt) -> int:
    """A size as a number, without fixing it: for a symbolic one the value met at capture (1 where none is known)."""
    if isinstance(size, int):
        return size
    hint = size.node.hint
    if hint is None:  # a size that depends on data; capture notes what it was in the example call
        seen = size.node.expr.xreplace(size.node.shape_env.var_to_hint_override)
        hint = seen if getattr(seen, "is_number", True) else 1
    return int(hint)


def same_layout(a: torch.Tensor, b: torch.Tensor, strides: bool = False) -> bool:
    """Whether two example values agree in shape, dtype and device (and strides). Symbolic sizes are compared by what
    they are written as: comparing them as numbers would fix them."""
    return (
        str(tuple(a.shape)) == str(tuple(b.shape))
        and a.dtype == b.dtype
        and a.device == b.device
        and (not strides or str(a.stride()) == str(b.stride()))
    )


@dataclass(frozen=True)
class Input:
    kind: InputKind
    name: str
    target: str


@dataclass(frozen=True)
class Output:
    kind: OutputKind
    target: str


@dataclass(frozen=True)
class CutValue:
    """One tensor that crosses from a region to the rest of the graph.

    node: name of the node that computes it in the full program.
    base: name of the node whose value is subtracted before storing, for cuts stored as residuals; else None.
    slots: how many past refreshes are kept (1 for values that cannot be forecast, such as masks).
    order: the axes as they lie in memory, where the value is computed in another layout (channels last, say); it is
    stored with its axes in that order, and `shape` is that of what is stored. None: as they are.
    scale, shift: names of the nodes that what is reused is multiplied by and moved by, if it is corrected; else None.
    """

    node: str
    shape: tuple[int | torch.SymInt, ...]
    dtype: torch.dtype
    device: torch.device
    base: str | None = None
    slots: int = 1
    order: tuple[int, ...] | None = None
    scale: str | None = None
    shift: str | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of one stored copy, counted by what is stored (contiguous), not by what it was a view of."""
        count = 1
        for size in self.shape:
            count *= size_hint(size)
        return count * self.dtype.itemsize


@dataclass(frozen=True)
class Region:
    """Nodes refreshed or reused as one. `rule` is the index of the schedule rule that decides for it."""

    name: str
    nodes: frozenset[str]
    cut: tuple[CutValue, ...] = ()
    rule: int = 0
    blocks: tuple[str, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes of cache state for one context, all slots counted."""
        return sum(value.nbytes * value.slots for value in self.cut)


@dataclass(frozen=True)
class Measured:
    """What the graph measures for the adaptive guard of one rule.

    before: names of the signals known before the rule's regions are computed. after: those known only when the step is
    done. checks: regions whose forecast is compared with what the reuse program computes of it.
    early, late: reference quantities that the guard may keep, known before the decision and after the step.
    """

    rule: int
    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    checks: tuple[str, ...] = ()
    early: tuple[str, ...] = ()
    late: tuple[str, ...] = ()


@dataclass(frozen=True)
class CallSignature:
    """The model's calling convention at capture: how the caller's arguments become flat tensors, and back.

    in_spec: tree of `(args, kwargs)`. leaves: for each leaf, either the literal constant baked in, or TENSOR.
    names: a readable path for each leaf. numbers: leaves that are Python numbers turned into 0-d tensors.
    out_spec: tree of the model's output; out_constants: output leaves that are no tensors.
    """

    in_spec: pytree.TreeSpec
    leaves: tuple[Any, ...]
    names: tuple[str, ...]
    numbers: frozenset[int]
    out_spec: pytree.TreeSpec
    out_constants: tuple[tuple[int, Any], ...] = ()

    @property
    def tensor_leaves(self) -> tuple[int, ...]:
        return tuple(i for i, leaf in enumerate(self.leaves) if leaf is TENSOR)

    def siblings(self, leaf: int) -> range:
        """The leaves of the list or tuple argument that holds `leaf`; that leaf alone if it is an argument itself."""
        start = 0
        for side in self.in_spec.children():
            for argument in side.children():
                stop = start + argument.num_leaves
                if start <= leaf < stop:
                    return range(start, stop) if argument.type in (list, tuple) else range(leaf, leaf + 1)
                start = stop
        raise IndexError(f"no leaf {leaf} in this call")

    def unflatten(self, tensors: list[torch.Tensor]) -> Any:
        """Rebuild the model's own output object from its tensor leaves."""
        if not self.out_constants:
            return pytree.tree_unflatten(tensors, self.out_spec)
        constants = dict(self.out_constants)
        supply = iter(tensors)
        total = len(tensors) + len(constants)
        return pytree.tree_unflatten(
            [constants[i] if i in constants else next(supply) for i in range(total)], self.out_spec
        )


class _Tensor:
    """Marks an argument leaf that is a tensor (anything else in its place is a baked constant)."""

    def __repr__(self) -> str:
        return "<tensor>"

    def __deepcopy__(self, memo: dict[int, Any]) -> _Tensor:
        return self

    def __copy__(self) -> _Tensor:
        return self


TENSOR = _Tensor()


@dataclass(frozen=True)
class StepProgram:
    """One step of a denoiser as a functional graph.

    `module.graph` has one placeholder for each entry of `inputs`, in order, and returns one flat tuple with an entry
    for each of `outputs`. The graph is never mutated once a program holds it: passes work on `copy()`.
    """

    module: fx.GraphModule
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    signature: CallSignature
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    regions: tuple[Region, ...] = ()
    reused: frozenset[str] = frozenset()
    measured: tuple[Measured, ...] = ()
    captured_by: str = "export"

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    def copy(self) -> StepProgram:
        """A program with graphs of its own, those of conditionals' branches too (node names and metadata kept)."""
        return dataclasses.replace(self, module=_copied(self.module))

    def replace(self, **changes: Any) -> StepProgram:
        return dataclasses.replace(self, **changes)

    def named_nodes(self) -> dict[str, fx.Node]:
        return {node.name: node for node in self.graph.nodes}

    def region(self, name: str) -> Region:
        return next(region for region in self.regions if region.name == name)

    def inputs_of(self, kind: InputKind) -> Iterator[tuple[int, Input]]:
        return ((i, entry) for i, entry in enumerate(self.inputs) if entry.kind is kind)

    def outputs_of(self, kind: OutputKind) -> Iterator[tuple[int, Output]]:
        return ((i, entry) for i, entry in enumerate(self.outputs) if entry.kind is kind)

    def bind(self, parameters: Callable[[str], torch.Tensor], users: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The inputs of a program that has neither state nor rows: weights by name, the caller's tensors in order."""
        supply = iter(users)
        return [
            self.constants[entry.target]
            if entry.kind is InputKind.CONSTANT
            else next(supply)
            if entry.kind is InputKind.USER
            else parameters(entry.target)
            for entry in self.inputs
        ]

    def code(self) -> str:
        """The program as readable Python."""
        return self.module.print_readable(print_output=False)


def _copied(module: fx.GraphModule) -> fx.GraphModule:
    graph = fx.Graph()
    memo: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(module.graph, memo, return_output_node=True)
    assert isinstance(result, tuple)
    value, output = result
    graph.output(value).meta = copy.copy(output.meta)
    made = fx.GraphModule(module, graph)
    for name, child in list(made.named_children()):
        if isinstance(child, fx.GraphModule):
            setattr(made, name, _copied(child))
    return made


def output_node(graph: fx.Graph) -> fx.Node:
    """The one output node of a graph."""
    return next(reversed(graph.nodes))


def returned(graph: fx.Graph) -> tuple[Any, ...]:
    """The flat tuple a program's graph returns."""
    values = output_node(graph).args[0]
    return tuple(values) if isinstance(values, (tuple, list)) else (values,)


def value_of(node: fx.Node) -> Any:
    """The example value (a fake tensor, a tuple of them, a SymInt) recorded for a node, or None."""
    return node.meta.get("val")


def module_path(node: fx.Node) -> tuple[tuple[str, str], ...]:
    """The modules being called when this node was traced, outermost first: (FQN, class name) pairs.

    The order is that of the calls, not of the names: a submodule of block 0 that the model calls from its top level
    does not list block 0. Repeated calls of one module carry an `@n` suffix from the second on.
    """
    stack = node.meta.get("nn_module_stack") or {}
    path = []
    for key, (fqn, kind) in stack.items():
        call = key.rpartition("@")[2] if "@" in key and "@" not in fqn else ""
        name = kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__qualname__}"
        path.append((f"{fqn}@{call}" if call else fqn, name))
    return tuple(path)
