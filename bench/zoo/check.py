"""Checks that an entry is worth testing with: finite, repeatable, and with no part that the output ignores."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .entry import Call, Entry, stacks, tensors


def same(left: Any, right: Any) -> bool:
    """Whether two outputs agree bit for bit."""
    a, b = tensors(left), tensors(right)
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@torch.no_grad()
def idle_blocks(model: nn.Module, arguments: Call, reference: Any) -> list[str]:
    """Return the blocks whose parameters do not reach the output."""
    idle = []
    args, kwargs = arguments
    for path, blocks in stacks(model).items():
        for index, block in enumerate(blocks):
            saved = {name: p.clone() for name, p in block.named_parameters()}
            for p in block.parameters():
                p.mul_(1.1).add_(0.01)
            if same(model(*args, **kwargs), reference):
                idle.append(f"{path}.{index}")
            for name, p in block.named_parameters():
                p.copy_(saved[name])
    return idle


def replaced(arguments: Call, key: str | int, value: Any) -> Call:
    """Return the call with one argument, by position or by keyword, replaced."""
    args, kwargs = arguments
    if isinstance(key, int):
        return (*args[:key], value, *args[key + 1 :]), kwargs
    if key not in kwargs:
        raise KeyError(key)
    return args, {**kwargs, key: value}


def argument(arguments: Call, key: str | int) -> Any:
    """Return one argument of the call."""
    args, kwargs = arguments
    return args[key] if isinstance(key, int) else kwargs[key]


def shifted(value: Any) -> Any:
    """Return an input moved a little: tensors by a tenth, integer tensors by one, lists item by item."""
    if isinstance(value, Tensor):
        return value * 0.9 + 0.1 if value.is_floating_point() else value + 1
    if isinstance(value, (list, tuple)):
        return type(value)(shifted(item) for item in value)
    return math.nextafter(value, math.inf) if isinstance(value, float) else value + 1


@torch.no_grad()
def problems(entry: Entry, model: nn.Module, arguments: Call) -> list[str]:
    """Return what is wrong with an entry, in words; nothing when it is sound."""
    args, kwargs = arguments
    found = []
    reference = model(*args, **kwargs)
    if not tensors(reference) or not all(bool(torch.isfinite(t).all()) for t in tensors(reference)):
        found.append("its output is not finite")
    if not same(reference, model(*args, **kwargs)):
        found.append("it is not deterministic")
    for role, key in (("latent", entry.latent), ("timestep", entry.timestep)):
        if key == "":
            continue
        moved_args, moved_kwargs = replaced(arguments, key, shifted(argument(arguments, key)))
        if same(reference, model(*moved_args, **moved_kwargs)):
            found.append(f"its output ignores the {role}")
    if not stacks(model):
        found.append("it has no stack of blocks")
    if idle := idle_blocks(model, arguments, reference):
        found.append("its output ignores " + ", ".join(idle))
    return found
