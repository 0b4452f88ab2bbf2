"""Arithmetic that runs on Python floats on the host and on 0-d tensors inside a graph.

Nothing here branches on what a tensor holds or makes a tensor of a Python number: traced, each function is a few ATen
operations without constants. Python numbers and tensors may be mixed; two Python numbers give a Python number.
"""

from __future__ import annotations

import torch

# A Python number, or a 0-d float32 tensor.
Number = float | torch.Tensor
# What a comparison gives: a bool, or a 0-d bool tensor.
Truth = bool | torch.Tensor


def at_least(a: Number, b: Number) -> Truth:
    """Not a < b: what cannot be compared (NaN) counts as reaching any bound."""
    below = a < b
    return torch.logical_not(below) if isinstance(below, torch.Tensor) else not below


def differs(a: Number, b: Number) -> Truth:
    """a != b."""
    return a != b


def negation(a: Number | bool) -> Truth:
    """not a."""
    return torch.logical_not(a) if isinstance(a, torch.Tensor) else not a


def both(a: Number | bool, b: Number | bool) -> Truth:
    """a and b."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.logical_and(a, b)
    if isinstance(a, torch.Tensor):
        return a if b else False
    return (b if isinstance(b, torch.Tensor) else bool(b)) if a else False


def either(a: Number | bool, b: Number | bool) -> Truth:
    """a or b."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.logical_or(a, b)
    if isinstance(a, torch.Tensor):
        return True if b else a
    return True if a else (b if isinstance(b, torch.Tensor) else bool(b))


def where(condition: Number | bool, a: Number, b: Number) -> Number:
    """a where the condition holds, else b. What is not chosen may be NaN."""
    if not isinstance(condition, torch.Tensor):
        return a if condition else b
    # torch.where would make a tensor of a Python number; filling takes it as it is.
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.where(condition, a, b)
    if isinstance(a, torch.Tensor):
        return a.masked_fill(torch.logical_not(condition), b)
    other = b if isinstance(b, torch.Tensor) else torch.full_like(condition, b, dtype=torch.float32)
    return other.masked_fill(condition, a)


def divide(a: Number, b: Number) -> Number:
    """a / b, and 0 where b is 0."""
    zero = b == 0
    return where(zero, 0.0, a / where(zero, 1.0, b))


def minimum(x: Number, high: float) -> Number:
    """The smaller of a number and a Python number."""
    return torch.clamp(x, max=high) if isinstance(x, torch.Tensor) else min(x, high)


def clip(x: Number, low: float, high: float) -> Number:
    """x held between two Python numbers."""
    return torch.clamp(x, low, high) if isinstance(x, torch.Tensor) else min(max(x, low), high)
