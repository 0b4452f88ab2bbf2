"""The model's calling convention: a call's arguments as flat leaves, the key under which a call is captured, and the
shape rules of programs captured with symbolic sizes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from .program import InputKind, StepProgram


@dataclass(frozen=True)
class Call:
    """One call of the model, flattened. `leaves` keeps the caller's own objects, in the order of `spec`."""

    leaves: tuple[Any, ...]
    spec: pytree.TreeSpec
    names: tuple[str, ...]

    @staticmethod
    def of(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Call:
        """Flatten a call; positional arguments get the parameter names of `module.forward`."""
        paths, spec = pytree.tree_flatten_with_path((args, {name: kwargs[name] for name in sorted(kwargs)}))
        positional = positional_names(module)
        return Call(tuple(leaf for _, leaf in paths), spec, tuple(_name(path, positional) for path, _ in paths))


def positional_names(module: nn.Module) -> list[str]:
    """Parameter names of the module's forward, in order; empty if it takes only `*args`."""
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return []
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [parameter.name for parameter in parameters if parameter.kind in kinds]


def _name(path: tuple[Any, ...], positional: list[str]) -> str:
    """A readable, identifier-like name for one argument leaf, such as `added_cond_kwargs_text_embeds`."""
    side, where, *rest = path
    if side.idx == 0:
        name = positional[where.idx] if where.idx < len(positional) else f"arg{where.idx}"
    else:
        name = str(where.key)
    parts = [str(getattr(key, "key", getattr(key, "idx", getattr(key, "name", key)))) for key in rest]
    return "_".join([name, *parts])


def is_number(leaf: Any) -> bool:
    """A Python number that may vary from step to step (bool is a switch, not a number)."""
    return isinstance(leaf, (int, float)) and not isinstance(leaf, bool)


def number_tensor(value: int | float) -> torch.Tensor:
    """The 0-d tensor that stands for a Python number: int64 or float64, so that no precision is lost."""
    return torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64)


def autocast_state(device_type: str) -> tuple[bool, torch.dtype | None]:
    """Whether autocast is on for the device type, and to which dtype: part of the capture key."""
    try:
        enabled = torch.is_autocast_enabled(device_type)
    except RuntimeError:
        return (False, None)
    return (enabled, torch.get_autocast_dtype(device_type) if enabled else None)


def quick_flatten(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[list[Any], tuple[Any, ...]]:
    """The leaves of a call in pytree order, and a hashable picture of its structure; a few microseconds.

    Keyword arguments are taken in alphabetical order, so that their order in the call does not matter.
    """
    leaves: list[Any] = []
    shape = tuple(_descend(arg, leaves) for arg in args)
    named = tuple((name, _descend(kwargs[name], leaves)) for name in sorted(kwargs))
    return leaves, (shape, named)


def _descend(value: Any, leaves: list[Any]) -> Any:
    kind = type(value)
    if kind is dict:
        return ("dict", tuple((key, _descend(entry, leaves)) for key, entry in value.items()))
    if kind is list or kind is tuple:
        return (kind, tuple(_descend(entry, leaves) for entry in value))
    if kind in pytree.SUPPORTED_NODES:
        inner, spec = pytree.tree_flatten(value)
        leaves.extend(inner)
        return spec
    leaves.append(value)
    return None


def leaf_key(leaf: Any) -> Any:
    """What must be equal of one leaf for a program to serve it; numbers count by their type alone."""
    if isinstance(leaf, torch.Tensor):
        return (leaf.shape, leaf.dtype, leaf.device)
    if is_number(leaf):
        return type(leaf)
    try:
        hash(leaf)
    except TypeError:
        return (type(leaf), id(leaf))
    return (type(leaf), leaf)


def rank_key(leaf: Any) -> Any:
    """`leaf_key` without sizes, for programs captured with symbolic ones."""
    return (leaf.dim(), leaf.dtype, leaf.device) if isinstance(leaf, torch.Tensor) else leaf_key(leaf)


def note_sizes(program: StepProgram, inputs: Sequence[torch.Tensor]) -> None:
    """Run a program on real tensors and note, for `size_hint`, the sizes in it that depend on data."""

    class Noting(fx.Interpreter):
        def run_node(self, node: fx.Node) -> Any:
            result, example = super().run_node(node), node.meta.get("val")
            expected = example.shape if isinstance(example, torch.Tensor) else (example,)
            found = result.shape if isinstance(result, torch.Tensor) else (result,)
            for size, number in zip(expected, found, strict=True):
                if isinstance(size, torch.SymInt) and size.node.hint is None and size.node.expr.is_symbol:
                    size.node.shape_env.var_to_hint_override[size.node.expr] = int(number)
            return result

    examples = (node.meta.get("val") for node in program.graph.nodes if node.op == "call_function")
    sizes = (size for value in examples if isinstance(value, torch.Tensor) for size in value.shape)
    if any(isinstance(size, torch.SymInt) and size.node.hint is None for size in sizes):
        Noting(program.module).run(*inputs)


class ShapeRules:
    """Decides whether a program captured with symbolic sizes serves given shapes.

    Built from the symbolic shapes of the program's own inputs, the ranges export derived, and the guards met while
    tracing. Matching binds each symbol once, then evaluates every rule on the bound numbers.
    """

    def __init__(self, program: StepProgram, ranges: Mapping[Any, Any], guards: list[Any]) -> None:
        self._shapes: dict[int, tuple[Any, ...]] = {}
        self._ranges = dict(ranges)
        self._guards = guards
        nodes = [node for node in program.graph.nodes if node.op == "placeholder"]
        for (position, entry), leaf in zip(
            program.inputs_of(InputKind.USER), program.signature.tensor_leaves, strict=True
        ):
            assert int(entry.target) == leaf
            self._shapes[leaf] = tuple(_expression(size) for size in nodes[position].meta["val"].shape)

    @property
    def symbolic(self) -> bool:
        return any(not isinstance(size, int) for shape in self._shapes.values() for size in shape)

    def accepts(self, leaves: Sequence[Any]) -> bool:
        """True if every size of the call's tensors obeys the program's symbols, ranges and guards."""
        bound: dict[Any, int] = {}
        later: list[tuple[Any, int]] = []
        for leaf, shape in self._shapes.items():
            value = leaves[leaf]
            sizes = tuple(value.shape) if isinstance(value, torch.Tensor) else ()
            if len(sizes) != len(shape):
                return False
            for expected, size in zip(shape, sizes, strict=True):
                if isinstance(expected, int):
                    if expected != size:
                        return False
                elif expected.is_symbol:
                    if bound.setdefault(expected, size) != size:
                        return False
                else:
                    later.append((expected, size))
        if any(expression.xreplace(bound) != size for expression, size in later):
            return False
        for symbol, allowed in self._ranges.items():
            if symbol in bound and not (allowed.lower <= bound[symbol] <= allowed.upper):
                return False
        return all(bool(guard.xreplace(bound)) is True for guard in self._guards if guard.free_symbols <= bound.keys())


def _expression(size: Any) -> Any:
    return size if isinstance(size, int) else size.node.expr
