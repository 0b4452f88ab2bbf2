"""What a contender of `bench.peers` is, and the uncached one.

A contender has the glue that a user of its library writes for this model (counted, see `adapter_lines`), the forcing
that only this comparison needs, and what it is asked afterwards.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import textwrap
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

MODES = ("eager", "compiled")
CONTEXT = "cond_uncond"  # both halves of guidance in one call
_HOLDERS = ("diffusers.hooks", "cache_dit.")  # the packages whose objects are searched for tensors


class NotRun(Exception):  # noqa: N818 - a reason to leave a contender out, not an error
    """Why a contender takes no part; one sentence."""


@dataclass(frozen=True)
class Plan:
    """The decisions all contenders take: refresh at the first `warm_up` steps, then at every `every`-th from there."""

    steps: int
    every: int = 3
    warm_up: int = 3

    @property
    def bits(self) -> tuple[int, ...]:
        """1 to refresh and 0 to reuse, for each step."""
        anchor = self.warm_up - 1
        return tuple(int(step <= anchor or (step - anchor) % self.every == 0) for step in range(self.steps))


class Contender:
    """One way of running a denoiser, eager or compiled.

    method: contenders of one method cache the same values and are compared with each other. how: how its decisions are
    made those of the plan. unequal: what differs from the others nevertheless. recompile_limit: what the library's
    documentation sets for torch.compile, None for its default.
    """

    name: ClassVar[str]
    library: ClassVar[str]
    method: ClassVar[str]
    how: ClassVar[str] = ""
    unequal: ClassVar[str] = ""
    glue: ClassVar[tuple[str, ...]] = ()
    recompile_limit: ClassVar[int | None] = None

    def __init__(self, model: nn.Module, plan: Plan, mode: str = "eager", example: Any = None) -> None:
        self.model, self.plan, self.mode, self.example = model, plan, mode, example
        self.denoiser: Callable[..., Any] = model

    def install(self) -> None:
        """Put the cache on the model. Raises ImportError or NotRun where that cannot be done."""

    def compile(self) -> None:
        """torch.compile of what was installed: the cache first, the compiler second (cache-dit's COMPILE.md; diffusers
        names no order for its caches)."""
        options: dict[str, Any] = {"backend": "inductor"}
        if self.recompile_limit is not None:
            options["recompile_limit"] = self.recompile_limit
        self.denoiser = torch.compile(self.model, **options)

    def begin(self) -> None:
        """Forget what the last generation left behind."""

    def context(self) -> AbstractContextManager[Any]:
        """What each call is made in."""
        return contextlib.nullcontext()

    def force(self, step: int) -> None:
        """See to it that this step follows the plan."""

    def refreshed(self) -> bool:
        """Whether the call just made was a refresh, from the contender's own state."""
        return True

    def roots(self) -> Iterable[Any]:
        """The objects that hold what is cached."""
        return ()

    def cache_bytes(self) -> int:
        """Bytes of all tensors now reachable from `roots`, by storage, without the model's own."""
        own = {tensor.untyped_storage().data_ptr() for tensor in (*self.model.parameters(), *self.model.buffers())}
        return held_bytes(self.roots(), own)

    def unseen_reads(self) -> int:
        """Reads of tensors in the last generation that no operator shows, as the library itself counts them."""
        return 0

    def adapter_lines(self) -> int:
        """Statements of the glue, imports included: the methods that `glue` names, without what forces decisions."""
        return sum(statements(getattr(type(self), name)) for name in self.glue)


def statements(function: Callable[..., Any]) -> int:
    """Statements in the body of a function, docstrings left out."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.stmt) and not isinstance(node, ast.FunctionDef)]
    return sum(not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)) for node in found)


def held_bytes(roots: Iterable[Any], exclude: Iterable[int] = ()) -> int:
    """Bytes of the tensors reachable from `roots` through containers and the peers' own objects, each storage once.

    Modules are not entered; exclude: addresses of storages that do not count.
    """
    storages: dict[int, int] = {}
    left, seen = list(roots), set()
    while left:
        value = left.pop()
        if id(value) in seen or isinstance(value, nn.Module):
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            storages[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        elif isinstance(value, dict):
            left.extend(value.values())
        elif isinstance(value, (list, tuple)):
            left.extend(value)
        elif type(value).__module__.startswith(_HOLDERS):
            left.extend(vars(value).values())
    return sum(size for address, size in storages.items() if address not in set(exclude))


class Uncached(Contender):
    """The model itself."""

    name, library, method = "uncached", "-", "none"
