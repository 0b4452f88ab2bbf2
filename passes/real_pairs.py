"""RealPairs: complex tensors as real ones with one more axis, of two."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from diffcache_fx.errors import VerificationError
from diffcache_fx.program import StepProgram

from .emit import call, fake_mode_of
from .everywhere import everywhere
from .purity import is_assert

aten = torch.ops.aten


@dataclass(frozen=True)
class RealPairs:
    """Write what a program computes in complex numbers, such as rotary embeddings, in real ones.

    ONNX has no complex type. A complex tensor becomes one of its parts' dtype with a last axis of 2: real part,
    imaginary part, as `torch.view_as_real` shows it. Complex inputs and results become such tensors, too; complex
    constants of the program are kept so.

    Before:  c = view_as_complex(x); y = view_as_real(c * freqs)              freqs: complex64 [64]
    After:   y = stack([x0 * f0 - x1 * f1, x0 * f1 + x1 * f0], -1)            freqs: float32 [64, 2]

    Rules:
    1. Branches of conditionals are rewritten, too.
    2. Only in finished programs: the new nodes belong to no region.
    3. What is computed in pairs may lie in memory in another order: views must be reshapes before.
    4. Raises VerificationError for an operator that has no such form here.
    """

    def __call__(self, program: StepProgram) -> StepProgram:
        if not has_complex(program):
            return program
        result = everywhere(program, lambda graph: _Rewriting(graph).run())
        return result.replace(constants={name: as_pairs(tensor) for name, tensor in result.constants.items()})


def as_pairs(tensor: torch.Tensor) -> torch.Tensor:
    """A complex tensor as pairs, in the same memory; others as they are."""
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def has_complex(program: StepProgram) -> bool:
    """Whether anything in it is."""
    modules = [module for module in program.module.modules() if isinstance(module, fx.GraphModule)]
    return any(_is_complex(node) for module in modules for node in module.graph.nodes)


def _is_complex(node: Any) -> bool:
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    values = value if isinstance(value, (list, tuple)) else [value]
    return any(isinstance(v, torch.Tensor) and v.is_complex() for v in values)


class _Rewriting:
    """Of one graph. `made`: by complex node, the real one that stands for it."""

    def __init__(self, graph: fx.Graph) -> None:
        self.graph = graph
        self.made: dict[fx.Node, fx.Node] = {}
        self.complex = {node for node in graph.nodes if _is_complex(node)}

    def run(self) -> None:
        concerned = [n for n in self.graph.nodes if n in self.complex or self.complex.intersection(n.all_input_nodes)]
        for node in concerned:
            if node.op == "placeholder":
                with fake_mode_of(self.graph):
                    node.meta["val"] = torch.view_as_real(node.meta["val"])
                self.made[node] = node
            elif node.op == "output":
                node.args = self._taken(node.args)
            elif isinstance(node.target, torch._ops.HigherOrderOperator):
                node.args = self._taken(node.args)
                with fake_mode_of(self.graph):
                    node.meta["val"] = tuple(as_pairs(value) for value in node.meta["val"])
                self.made[node] = node
            else:
                self._replace(node)
        for node in reversed(concerned):
            if node in self.made and self.made[node] is not node:
                self.graph.erase_node(node)

    def _replace(self, node: fx.Node) -> None:
        if is_assert(node):
            self.graph.erase_node(node)
            return
        args, kwargs = self._taken(node.args), self._taken(node.kwargs)
        both = [isinstance(argument, fx.Node) and argument in self.complex for argument in node.args]
        rule, schema = _RULES.get(node.target), getattr(node.target, "_schema", None)
        with self.graph.inserting_before(node), fake_mode_of(self.graph):
            if rule is not None:
                made = rule(self.graph, both, *args, **kwargs)
            elif node.target is operator.getitem:
                made = call(self.graph, node.target, *args)
            elif schema is not None and schema.name in _STRUCTURAL and not kwargs.keys() & {*_AXES, "dims", *_SIZES}:
                made = call(self.graph, node.target, *_moved(node, args), **kwargs)
            else:
                raise VerificationError(f"{node.target} of complex tensors has no form in real ones")
        self.made[node] = made
        if node not in self.complex:
            node.replace_all_uses_with(made)

    def _taken(self, argument: Any) -> Any:
        return fx.node.map_arg(argument, lambda n: self.made.get(n, n))


# Operators that do the same on pairs once their axes and sizes leave the last one alone; by the names of their schema.
_STRUCTURAL = frozenset(
    {
        *("aten::slice", "aten::select", "aten::unsqueeze", "aten::squeeze", "aten::cat", "aten::stack", "aten::index"),
        *("aten::split_with_sizes", "aten::split", "aten::chunk", "aten::transpose", "aten::permute", "aten::expand"),
        *("aten::view", "aten::reshape", "aten::_unsafe_view", "aten::repeat", "aten::clone", "aten::alias"),
        *("aten::copy", "aten::select_scatter", "aten::slice_scatter", "aten::pad_sequence", "aten::detach"),
        *("aten::contiguous", "aten::neg"),
    }
)
_AXES = ("dim", "dim0", "dim1", "start_dim", "end_dim")
_SIZES = {"size": 2, "shape": 2, "repeats": 1}


def _moved(node: fx.Node, args: Any) -> list[Any]:
    """Arguments with axes counted from the end moved by one, and sizes with one more."""
    schema: Any = node.target._schema  # type: ignore[union-attr]
    moved: list[Any] = []
    for spec, value in zip(schema.arguments, args, strict=False):
        if spec.name in _AXES and isinstance(value, int):
            moved.append(value - 1 if value < 0 else value)
        elif spec.name in ("dim", "dims") and isinstance(value, (list, tuple)):
            rank = args[0].meta["val"].dim() - 1
            axes = [axis % rank for axis in value]
            moved.append([*axes, rank] if schema.name == "aten::permute" else axes)
        elif spec.name in _SIZES:
            moved.append([*value, _SIZES[spec.name]])
        else:
            moved.append(value)
    return moved


def _parts(graph: fx.Graph, pairs: fx.Node) -> tuple[fx.Node, fx.Node]:
    return call(graph, aten.select.int, pairs, -1, 0), call(graph, aten.select.int, pairs, -1, 1)


def _pair(graph: fx.Graph, real: fx.Node, imaginary: fx.Node) -> fx.Node:
    return call(graph, aten.stack.default, [real, imaginary], -1)


def _product(graph: fx.Graph, both: list[bool], a: Any, b: Any) -> fx.Node:
    if not all(both):
        pairs, factor = (a, b) if both[0] else (b, a)
        if isinstance(factor, complex):
            raise VerificationError("a product with a complex number has no form in real ones")
        wide = call(graph, aten.unsqueeze.default, factor, -1) if isinstance(factor, fx.Node) else factor
        return call(graph, aten.mul.Tensor, pairs, wide)
    (a0, a1), (b0, b1) = _parts(graph, a), _parts(graph, b)

    def times(x: fx.Node, y: fx.Node) -> fx.Node:
        return call(graph, aten.mul.Tensor, x, y)

    real = call(graph, aten.sub.Tensor, times(a0, b0), times(a1, b1))
    return _pair(graph, real, call(graph, aten.add.Tensor, times(a0, b1), times(a1, b0)))


def _sum_of(target: Any) -> Callable[..., fx.Node]:
    def rule(graph: fx.Graph, both: list[bool], a: Any, b: Any, **kwargs: Any) -> fx.Node:
        if not all(both[:2]):
            raise VerificationError(f"{target} of a complex and a real tensor has no form in real ones")
        return call(graph, target, a, b, **kwargs)

    return rule


def _polar(graph: fx.Graph, both: list[bool], size: fx.Node, angle: fx.Node) -> fx.Node:
    turned = [call(graph, function, angle) for function in (aten.cos.default, aten.sin.default)]
    return _pair(graph, *(call(graph, aten.mul.Tensor, size, part) for part in turned))


def _conjugate(graph: fx.Graph, both: list[bool], pairs: fx.Node) -> fx.Node:
    real, imaginary = _parts(graph, pairs)
    return _pair(graph, real, call(graph, aten.neg.default, imaginary))


def _gather(graph: fx.Graph, both: list[bool], pairs: fx.Node, dim: int, index: fx.Node) -> fx.Node:
    wide = call(graph, aten.unsqueeze.default, index, -1)
    wide = call(graph, aten.expand.default, wide, [*index.meta["val"].shape, 2])
    return call(graph, aten.gather.default, pairs, dim - 1 if dim < 0 else dim, wide)


def _zeros(graph: fx.Graph, both: list[bool], size: Any, **kwargs: Any) -> fx.Node:
    return call(graph, aten.zeros.default, [*size, 2], **{**kwargs, "dtype": kwargs["dtype"].to_real()})


def _same(graph: fx.Graph, both: list[bool], pairs: fx.Node) -> fx.Node:
    return pairs


_RULES: dict[Any, Callable[..., fx.Node]] = {
    aten.view_as_complex.default: _same,
    aten.view_as_real.default: _same,
    aten.mul.Tensor: _product,
    aten.add.Tensor: _sum_of(aten.add.Tensor),
    aten.sub.Tensor: _sum_of(aten.sub.Tensor),
    aten.polar.default: _polar,
    aten.complex.default: lambda graph, both, real, imaginary: _pair(graph, real, imaginary),
    aten.real.default: lambda graph, both, pairs: _parts(graph, pairs)[0],
    aten.imag.default: lambda graph, both, pairs: _parts(graph, pairs)[1],
    aten._conj.default: _conjugate,
    aten.conj_physical.default: _conjugate,
    aten.resolve_conj.default: _same,
    aten.gather.default: _gather,
    aten.zeros.default: _zeros,
}
