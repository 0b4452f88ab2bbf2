"""The model's calling convention as data: how a call's arguments become the flat tensors that programs take, and how
their outputs become the model's own again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch.utils import _pytree as pytree

from diffcache_fx.calling import is_number, number_tensor
from diffcache_fx.errors import CallError
from diffcache_fx.sizes import Size

from .ports import name_of_dtype

Scalar = bool | int | float | str | None
SCALARS = (bool, int, float, str, type(None))


class Data(BaseModel):
    """Plain data of a manifest: unknown fields are refused, and nothing is converted silently."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, ser_json_inf_nan="constants")


class Leaf(Data):
    """One leaf of a call. A number comes as a Python number and goes in as a 0-d tensor; a constant is part of the
    programs, and a call must have the same one: a plain value, or a tensor's dtype, shape and values in order."""

    name: str
    kind: Literal["tensor", "number", "constant"]
    dtype: str | None = None
    shape: tuple[Size, ...] = ()
    value: Scalar = None
    values: tuple[bool | int | float, ...] | None = None


class Tree(Data):
    """How leaves are put together. A leaf has an index; a list, a tuple, a dict and a named output have items."""

    kind: Literal["leaf", "list", "tuple", "dict", "named"]
    leaf: int = -1
    items: tuple[Tree, ...] = ()
    keys: tuple[str | int, ...] = ()
    name: str = ""


class Parameter(Data):
    """One parameter of the model's forward."""

    name: str
    keyword_only: bool = False
    required: bool = True
    default: Scalar = None


class NamedOutput(OrderedDict):  # type: ignore[type-arg]
    """An output with fields: by name, by attribute or by position, as diffusers' output classes are."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"the output has no field {name!r}; it has {', '.join(self)}")

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else tuple(self.values())[key]

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields in order."""
        return tuple(self.values())


pytree.register_pytree_node(
    NamedOutput,
    lambda output: (list(output.values()), list(output)),
    lambda values, names: NamedOutput(zip(names, values, strict=True)),
    serialized_type_name="diffcache_fx.NamedOutput",
)


class Convention(Data):
    """What a call looks like, going in and coming out.

    parameters: those of the model's forward. arguments: a tree for each argument of the captured call. latents,
    timestep, conditioning: leaves by which a call's place in a generation is recognised. output: the tree of the
    model's output, over its tensors; output_constants: leaves of it that are no tensors.
    """

    parameters: tuple[Parameter, ...]
    arguments: dict[str, Tree]
    leaves: tuple[Leaf, ...]
    latents: int
    timestep: int | None
    conditioning: tuple[int, ...]
    output: Tree
    output_constants: dict[int, Scalar]

    def flatten(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """The leaves of a call, checked. Raises CallError, naming the argument, where it is not the captured call."""
        given = self._bind(args, kwargs)
        leaves: list[Any] = [None] * len(self.leaves)
        for name, tree in self.arguments.items():
            if name not in given:
                raise CallError(f"the argument {name!r} is missing: the bundle was made with it")
            _take(tree, given[name], leaves, name)
        for leaf, value in zip(self.leaves, leaves, strict=True):
            _check_kind(leaf, value)
        return leaves

    def tensors(self, leaves: Sequence[Any]) -> dict[int, torch.Tensor]:
        """The program's tensor inputs by leaf; contiguous, since artefacts are built for that layout."""
        return {
            i: number_tensor(leaves[i]) if leaf.kind == "number" else leaves[i].contiguous()
            for i, leaf in enumerate(self.leaves)
            if leaf.kind != "constant"
        }

    def unflatten(self, tensors: Sequence[torch.Tensor], as_tuple: bool = False) -> Any:
        """The model's output from its tensors, in order."""
        supply = iter(tensors)
        total = len(tensors) + len(self.output_constants)
        leaves = [self.output_constants[i] if i in self.output_constants else next(supply) for i in range(total)]
        made = _build(self.output, leaves)
        return made.to_tuple() if as_tuple and isinstance(made, NamedOutput) else made

    def wants_tuple(self, kwargs: Mapping[str, Any]) -> bool:
        """Whether a call asks for a plain tuple although the captured one did not (diffusers' return_dict)."""
        return kwargs.get("return_dict") is False and self.output.kind == "named"

    def _bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        places = [p for p in self.parameters if not p.keyword_only]
        given = {f"arg{i}": value for i, value in enumerate(args) if i >= len(places)}
        given |= {parameter.name: value for parameter, value in zip(places, args, strict=False)}
        for name, value in kwargs.items():
            if name in given:
                raise CallError(f"the argument {name!r} was given twice")
            given[name] = value
        if self.output.kind == "named" and given.get("return_dict") is False:
            given["return_dict"] = True
            if "return_dict" not in self.arguments:
                del given["return_dict"]
        defaults = {parameter.name: parameter.default for parameter in self.parameters if not parameter.required}
        for name in self.arguments:
            if name not in given and name in defaults:
                given[name] = defaults[name]
        for name in [name for name in given if name not in self.arguments]:
            if name not in defaults or not _same(given[name], defaults[name]):
                raise CallError(
                    f"the bundle was made without the argument {name!r}: leave it out, or export with a call that "
                    "has it"
                )
        return given


def _same(value: Any, default: Scalar) -> bool:
    return type(value) is type(default) and value == default


def _take(tree: Tree, value: Any, leaves: list[Any], where: str) -> None:
    if tree.kind == "leaf":
        leaves[tree.leaf] = value
        return
    kinds = {"list": list, "tuple": tuple, "dict": dict}
    if not isinstance(value, kinds[tree.kind]):
        raise CallError(f"{where} must be a {tree.kind}, as in the call the bundle was made with, not {_told(value)}")
    if tree.kind == "dict":
        if set(value) != set(tree.keys):
            raise CallError(
                f"{where} must have the keys {', '.join(map(str, tree.keys))}, not {', '.join(map(str, value))}"
            )
        pairs = [(f"{where}[{key!r}]", value[key]) for key in tree.keys]
    else:
        if len(value) != len(tree.items):
            raise CallError(f"{where} must have {len(tree.items)} entries, not {len(value)}")
        pairs = [(f"{where}[{i}]", entry) for i, entry in enumerate(value)]
    for item, (place, entry) in zip(tree.items, pairs, strict=True):
        _take(item, entry, leaves, place)


def _check_kind(leaf: Leaf, value: Any) -> None:
    if leaf.values is not None:
        if not isinstance(value, torch.Tensor) or tuple(value.flatten().tolist()) != leaf.values:
            raise CallError(
                f"the values of {leaf.name} are part of this bundle's programs (they decide a shape or a branch), and "
                "this call has others: export again with those"
            )
        return
    if leaf.kind == "constant":
        if not _same(value, leaf.value):
            raise CallError(
                f"{leaf.name} is {leaf.value!r} in this bundle, which is part of its programs; this call has "
                f"{_told(value)}: export again with that"
            )
        return
    if leaf.kind == "number":
        kind = int if leaf.dtype == "int64" else float
        if not is_number(value) or not isinstance(value, kind):
            raise CallError(f"{leaf.name} must be a Python {kind.__name__}, not {_told(value)}")
        return
    if not isinstance(value, torch.Tensor):
        raise CallError(f"{leaf.name} must be a {leaf.dtype} tensor, not {_told(value)}")
    if name_of_dtype(value.dtype) != leaf.dtype:
        raise CallError(
            f"{leaf.name} must be {leaf.dtype}, not {name_of_dtype(value.dtype)}: the bundle was made for that"
        )


def _told(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a {name_of_dtype(value.dtype)} tensor {list(value.shape)}"
    return repr(value) if isinstance(value, SCALARS) else type(value).__name__


def _build(tree: Tree, leaves: Sequence[Any]) -> Any:
    if tree.kind == "leaf":
        return leaves[tree.leaf]
    items = [_build(item, leaves) for item in tree.items]
    if tree.kind == "list":
        return items
    if tree.kind == "tuple":
        return tuple(items)
    pairs = zip(tree.keys, items, strict=True)
    return dict(pairs) if tree.kind == "dict" else NamedOutput(pairs)
