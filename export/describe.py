"""A captured call as data: the calling convention that a manifest carries."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch.utils import _pytree as pytree

from diffcache_fx.errors import ExportError
from diffcache_fx.program import TENSOR, CallSignature, InputKind, StepProgram
from diffcache_fx.sizes import sizes_of

from .convention import SCALARS, Convention, Leaf, Parameter, Scalar, Tree
from .ports import name_of_dtype

# Of a tensor that is part of the program.
_MOST_VALUES = 1 << 16


def describe(
    forward: Any,
    program: StepProgram,
    latents: int,
    timestep: int | None,
    conditioning: Sequence[int],
) -> Convention:
    """A captured call as data. Raises ExportError where an argument or the output is an object JSON cannot tell."""
    signature = program.signature
    parameters = _parameters(forward)
    positional = [parameter.name for parameter in parameters if not parameter.keyword_only]
    nodes = program.graph.find_nodes(op="placeholder")
    examples = {int(entry.target): nodes[i].meta["val"] for i, entry in program.inputs_of(InputKind.USER)}
    args, kwargs = signature.in_spec.children()
    counter = iter(range(len(signature.leaves)))
    arguments = {}
    for place, spec in enumerate(args.children()):
        name = positional[place] if place < len(positional) else f"arg{place}"
        arguments[name] = _tree(spec, counter, name)
    for name, spec in zip(kwargs.context, kwargs.children(), strict=True):
        arguments[name] = _tree(spec, counter, name)
    return Convention(
        parameters=parameters,
        arguments=arguments,
        leaves=tuple(_leaf(signature, i, examples.get(i)) for i in range(len(signature.leaves))),
        latents=latents,
        timestep=timestep,
        conditioning=tuple(conditioning),
        output=_tree(signature.out_spec, iter(range(signature.out_spec.num_leaves)), "the output", named=True),
        output_constants={i: _scalar(value, "the output") for i, value in signature.out_constants},
    )


def _leaf(signature: CallSignature, index: int, example: Any) -> Leaf:
    value, name = signature.leaves[index], signature.names[index]
    if value is not TENSOR:
        if isinstance(value, torch.Tensor):
            return _fixed(value, name)
        return Leaf(name=name, kind="constant", value=_scalar(value, name))
    if index in signature.numbers:
        return Leaf(name=name, kind="number", dtype=name_of_dtype(example.dtype))
    return Leaf(name=name, kind="tensor", dtype=name_of_dtype(example.dtype), shape=sizes_of(example.shape))


def _fixed(value: torch.Tensor, name: str) -> Leaf:
    """A tensor whose values decide a shape or a branch."""
    if value.numel() > _MOST_VALUES:
        raise ExportError(
            f"the {value.numel():,} values of {name!r} are part of the program (they decide a shape or a branch), more "
            "than a manifest should hold: export a model whose shapes do not depend on them"
        )
    values = tuple(value.flatten().tolist())
    return Leaf(name=name, kind="constant", dtype=name_of_dtype(value.dtype), shape=tuple(value.shape), values=values)


def _scalar(value: Any, where: str) -> Scalar:
    if not isinstance(value, SCALARS):
        raise ExportError(
            f"{where} holds a {type(value).__name__}, which a manifest cannot tell: pass tensors, numbers, strings or "
            "booleans, or leave it out"
        )
    return value


def _parameters(forward: Any) -> tuple[Parameter, ...]:
    kinds = inspect.Parameter
    found = []
    for parameter in inspect.signature(forward).parameters.values():
        if parameter.kind in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD):
            continue
        plain = isinstance(parameter.default, SCALARS)
        found.append(
            Parameter(
                name=parameter.name,
                keyword_only=parameter.kind is kinds.KEYWORD_ONLY,
                required=parameter.default is kinds.empty or not plain,
                default=parameter.default if plain else None,
            )
        )
    return tuple(found)


def _tree(spec: pytree.TreeSpec, counter: Any, where: str, named: bool = False) -> Tree:
    if spec.is_leaf():
        return Tree(kind="leaf", leaf=next(counter))
    items = tuple(_tree(child, counter, where, named) for child in spec.children())
    if spec.type in (list, tuple):
        return Tree(kind=spec.type.__name__, items=items)
    names = _field_names(spec) if named or spec.type is dict else None
    if names is None:
        raise ExportError(
            f"{where} holds a {getattr(spec.type, '__name__', spec.type)}, which a manifest cannot tell: use tensors, "
            "lists, tuples and dicts"
        )
    kind: Literal["dict", "named"] = "dict" if spec.type is dict else "named"
    return Tree(kind=kind, items=items, keys=names, name=spec.type.__name__)


def _field_names(spec: pytree.TreeSpec) -> tuple[str | int, ...] | None:
    """Names of the children of a dict, a named tuple, a dataclass, or one of diffusers' outputs."""
    kind, count = spec.type, len(spec.children())
    if isinstance(kind, type) and issubclass(kind, dict) and isinstance(spec.context, (list, tuple)):
        names = tuple(spec.context)
    elif hasattr(kind, "_fields"):
        names = tuple(kind._fields)
    elif dataclasses.is_dataclass(kind):
        names = tuple(entry.name for entry in dataclasses.fields(kind))
    elif getattr(spec.context, "_fields", None):
        names = tuple(spec.context._fields)
    else:
        return None
    return names if len(names) == count and all(type(name) in (str, int) for name in names) else None
