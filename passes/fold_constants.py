"""FoldConstants: what depends on no input, computed once, when the file is written."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from diffcache_fx.program import Input, InputKind, StepProgram

from .aliasing import is_view
from .conditional import COND
from .emit import drop_unused_inputs, placeholder
from .purity import eliminate_dead, is_impure

_WEIGHTS = frozenset({InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT})
# Values that a runtime makes as exactly as PyTorch does, in less room than they take in a file.
_PLAIN = frozenset(
    f"aten::{name}"
    for name in ("_to_copy", "clone", "arange", "eye", "empty", "full", "full_like", "ones", "ones_like", "zeros")
) | {"aten::zeros_like", "aten::scalar_tensor", "aten::lift_fresh_copy"}
# Elements: a megabyte in float32.
LARGEST = 1 << 18


@dataclass(frozen=True)
class FoldConstants:
    """Replace what is computed from nothing, or from weights alone, by constants.

    parameters: the weights by name, where what is written holds their values for good; None: they may change later, and
        only what needs none of them is folded.
    largest: most elements of a constant.

    The constants are what PyTorch computes. Another runtime's exponential differs in the last place, which a table of
    frequencies up to 10,000 turns into another phase; and some functions of weights, such as a QR decomposition, other
    runtimes do not have.

    Before:  f = exp(arange(8) * -1.1); y = cos(t * f)
    After:   y = cos(t * folded)                            folded: float32 [8]

    Rules:
    1. Real and complex values of known size only: integers and booleans are exact everywhere.
    2. Views, casts and plain fills are left to the runtime, and so is what repeats a value (`expand`): a copy of a
       weight is only another copy.
    3. Branches of conditionals are rewritten, too; what they get in place is handed in from outside.
    4. Only in finished programs: the new inputs belong to no region.
    """

    parameters: Callable[[str], torch.Tensor] | None
    largest: int = LARGEST

    def __call__(self, program: StepProgram) -> StepProgram:
        result = program.copy()
        known: dict[fx.Node, Callable[[], torch.Tensor]] = {}
        for node, entry in zip(result.graph.find_nodes(op="placeholder"), result.inputs, strict=True):
            if self.parameters is not None and entry.kind in _WEIGHTS:
                known[node] = self._weight(result, entry)
        found = _fold(result.module, known, self.largest)
        if not found:
            return program
        constants, inputs = dict(result.constants), list(result.inputs)
        taken = {entry.target for entry in result.inputs}
        for node, tensor in found:
            target = next(name for name in _names(node.name) if name not in taken)
            taken.add(target)
            constants[target] = tensor
            inputs.append(Input(InputKind.CONSTANT, node.name, target))
        left = {node.name for node in result.graph.nodes}
        regions = tuple(dataclasses.replace(region, nodes=region.nodes & left) for region in result.regions)
        result = result.replace(inputs=tuple(inputs), constants=constants, regions=regions)
        result = drop_unused_inputs(result, _WEIGHTS)
        used = {entry.target for entry in result.inputs if entry.kind is InputKind.CONSTANT}
        return result.replace(constants={name: tensor for name, tensor in constants.items() if name in used})

    def _weight(self, program: StepProgram, entry: Input) -> Callable[[], torch.Tensor]:
        if entry.kind is InputKind.CONSTANT:
            return lambda: program.constants[entry.target]
        assert self.parameters is not None
        parameters = self.parameters
        return lambda: parameters(entry.target)


def _names(first: str) -> Iterable[str]:
    yield first
    count = 1
    while True:
        yield f"{first}_{count}"
        count += 1


def _fold(
    module: fx.GraphModule, known: dict[fx.Node, Callable[[], torch.Tensor]], largest: int
) -> list[tuple[fx.Node, torch.Tensor]]:
    """Rewrite one graph in place. Returns its new placeholders, which come after the others, and their values."""
    graph = module.graph
    fixed, worthwhile = _fixed(graph, known, largest)
    evaluate = _Evaluation(known)
    found: list[tuple[fx.Node, torch.Tensor]] = []
    for node in list(graph.nodes):
        if node.target is COND:
            _fold_branches(module, node, fixed, evaluate, largest, found)
        elif node in worthwhile and any(user not in fixed for user in node.users):
            tensor = evaluate(node)
            made = _constant(graph, tensor)
            evaluate.know(made, tensor)
            found.append((made, tensor))
            node.replace_all_uses_with(made)
    if found:
        eliminate_dead(graph)
        graph.lint()
        module.recompile()
    return found


def _fixed(graph: fx.Graph, known: Iterable[fx.Node], largest: int) -> tuple[set[fx.Node], set[fx.Node]]:
    """The nodes that depend on nothing but what is known, and those among them that are worth a constant."""
    fixed, worthwhile, computed = set(known), set[fx.Node](), set[fx.Node]()
    for node in graph.nodes:
        if not _foldable(node, largest) or not fixed.issuperset(node.all_input_nodes) or _repeats(node):
            continue
        fixed.add(node)
        schema = getattr(node.target, "_schema", None)
        plain = is_view(node) or (schema is not None and schema.name in _PLAIN)
        if not plain or computed.intersection(node.all_input_nodes):
            computed.add(node)
        value = node.meta["val"]
        if node in computed and isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex()):
            worthwhile.add(node)
    return fixed, worthwhile


def _repeats(node: fx.Node) -> bool:
    """Whether it is a view with more elements than there are."""
    before, after = (getattr(n, "meta", {}).get("val") for n in (node.args[0] if node.args else None, node))
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    return is_view(node) and math.prod(after.shape) > math.prod(before.shape)


def _foldable(node: fx.Node, largest: int) -> bool:
    """Whether it could be computed beforehand, if its arguments are known."""
    if node.op != "call_function" or is_impure(node) or "val" not in node.meta:
        return False
    if not isinstance(node.target, torch._ops.OpOverload) and node.target is not operator.getitem:
        return False
    values = node.meta["val"] if isinstance(node.meta["val"], (list, tuple)) else [node.meta["val"]]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    if len(tensors) != len(values):
        return False
    sizes = [tuple(tensor.shape) for tensor in tensors]
    return all(isinstance(size, int) for shape in sizes for size in shape) and all(
        math.prod(shape) <= largest for shape in sizes
    )


class _Evaluation:
    """What nodes are worth, computed when asked for and once."""

    def __init__(self, known: dict[fx.Node, Callable[[], torch.Tensor]]) -> None:
        self._known = known
        self._made: dict[fx.Node, Any] = {}

    def know(self, node: fx.Node, value: torch.Tensor) -> None:
        """A constant that has taken the place of what was computed."""
        self._made[node] = value

    def __call__(self, node: fx.Node) -> Any:
        if node not in self._made:
            if node in self._known:
                self._made[node] = self._known[node]().detach()
            else:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), self)
                with torch.no_grad():
                    self._made[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        return self._made[node]


def _constant(graph: fx.Graph, tensor: torch.Tensor) -> fx.Node:
    taken = {node.target for node in graph.find_nodes(op="placeholder")}
    name = next(name for name in _names("folded") if name not in taken)
    return placeholder(graph, name, tensor.shape, tensor.dtype, tensor.device)


def _fold_branches(
    module: fx.GraphModule,
    node: fx.Node,
    fixed: set[fx.Node],
    evaluate: _Evaluation,
    largest: int,
    found: list[tuple[fx.Node, torch.Tensor]],
) -> None:
    """Rewrite the two ways of a conditional. Both take the same operands: each has a place for what the other needs."""
    predicate, *ways, operands = node.args
    branches = [module.get_submodule(str(way.target)) for way in ways]  # type: ignore[union-attr]
    operands = list(operands)  # type: ignore[arg-type]
    for number, branch in enumerate(branches):
        inner = branch.graph.find_nodes(op="placeholder")  # type: ignore[union-attr, operator]
        known = {
            place: (lambda value=value: evaluate(value))
            for place, value in zip(inner, operands, strict=True)
            if isinstance(value, fx.Node) and value in fixed
        }
        for _, tensor in _fold(branch, known, largest):  # type: ignore[arg-type]
            _constant(branches[1 - number].graph, tensor)  # type: ignore[arg-type]
            made = _constant(module.graph, tensor)
            found.append((made, tensor))
            operands.append(made)
    for branch in branches:
        branch.recompile()  # type: ignore[operator]
    node.args = (predicate, *ways, tuple(operands))
