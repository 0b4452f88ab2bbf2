"""Which generation, which guidance branch and which step a call belongs to: from what the pipeline says where it says
it (`cache_context`, `reset`), else from the identity of the arguments. In doubt the answer is "compute".

Nothing here reads a tensor on an accelerator, except, where neither contexts nor the number of steps are known, the
timestep, once per step (counted in `syncs`).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .errors import CacheWarning

Key = tuple[Any, ...]
# Conditioning on the CPU is compared by value up to this size where its identity changed.
_COMPARED = 1 << 22
_TWICE = "the same timestep twice"
_BACK = "the timestep went back"


@dataclass
class Context:
    """One independent sequence of steps: a named guidance branch, or one told apart by its conditioning."""

    name: str
    step: int = -1  # of the last call; -1 before the first
    key: Key | None = None
    first_timestep: float | None = None
    last_timestep: float | None = None
    direction: int = 0
    unsettled: str = ""  # what was odd about the last timestep: the step after it is computed too
    stable: bool = False  # the conditioning was the same at two calls of this generation
    conditioning: tuple[Any, ...] = ()
    num_steps: int | None = None
    payload: Any = None  # the driver's cache state
    # Where a sampler refines: the timesteps of this generation in the order they first came, and the last states there.
    places: dict[float, int] = field(default_factory=dict)
    visited: dict[int, Any] = field(default_factory=dict)

    def restart(self) -> None:
        """Forget everything of the generation that went before."""
        name, num_steps = self.name, self.num_steps
        self.__init__(name, num_steps=num_steps)  # type: ignore[misc]


@dataclass
class Place:
    """Where a call belongs. doubt: why it must be computed although the schedule might reuse; empty if it need not.
    position: where it lies on the axis of forecasts: the step, or where a sampler refines, the number of the timestep
    among those of the generation. refining: a sampler may come back to a timestep.
    """

    context: Context
    step: int
    new_generation: bool
    doubt: str = ""
    timestep: float | None = None  # where it could be read without a sync, or had to be
    position: int = 0
    refining: bool = False


@dataclass
class Arguments:
    """What recognition looks at: the latents, the timestep, and all other leaves of a call."""

    latents: torch.Tensor
    timestep: torch.Tensor | float | None
    conditioning: tuple[Any, ...]


@dataclass
class Hints:
    """What a pipeline said through `cache_context(name, **hints)`."""

    name: str
    step_index: int | None = None
    num_steps: int | None = None
    timestep: Any = None
    refinement: bool = False


@dataclass
class Recognizer:
    """Keeps the contexts of one thread and finds each call's place among them."""

    num_steps: int | None = None
    refinement: bool = False
    needs_timestep: bool = False  # a guard looks at it, wherever it lies
    contexts: dict[str, Context] = field(default_factory=dict)
    syncs: int = 0
    _last: Arguments | None = None
    _called: list[str] = field(default_factory=list)  # implicit branches called in the step under way
    _warned: set[str] = field(default_factory=set)

    def reset(self, name: str | None = None) -> None:
        """Forget one context, or all of them."""
        if name is None:
            self.contexts.clear()
            self._last = None
            self._called.clear()
        elif name in self.contexts:
            self.contexts[name].restart()

    def locate(self, arguments: Arguments, key: Key, hints: Hints | None) -> Place:
        """Find the context and step of a call, and start a new generation where one begins."""
        doubt = ""
        if hints is not None:
            context = self.contexts.setdefault(hints.name, Context(hints.name))
            if hints.num_steps is not None:
                context.num_steps = hints.num_steps
        else:
            context, doubt = self._branch(arguments)
        timestep = self._timestep(arguments, context, hints)
        place = self._advance(context, timestep, key, hints, self._same_prompt(context, arguments, doubt))
        context.conditioning = arguments.conditioning
        self._last = arguments
        return place

    def _branch(self, arguments: Arguments) -> tuple[Context, str]:
        """Which unnamed guidance branch: same latents or timestep mean the same step, equal conditioning the branch."""
        unnamed = [context for name, context in self.contexts.items() if name.startswith("#")]
        last = self._last
        same_step = last is not None and (
            arguments.latents is last.latents or _same_value(arguments.timestep, last.timestep)
        )
        matching = [context for context in unnamed if _same_conditioning(arguments.conditioning, context.conditioning)]
        if matching:
            waiting = [context for context in matching if same_step and context.name not in self._called]
            chosen = (waiting or matching)[0]
            if not same_step or chosen.name in self._called:
                self._called.clear()
            self._called.append(chosen.name)
            return chosen, ""
        if same_step:
            context = Context(f"#{len(unnamed)}")
            self.contexts[context.name] = context
            self._called.append(context.name)
            return context, ""
        # Other latents, other timestep, conditioning never seen: nothing ties this call to the generation before.
        for context in unnamed:
            context.restart()
        context = self.contexts.setdefault("#0", Context("#0"))
        for name in [name for name in self.contexts if name.startswith("#") and name != "#0"]:
            del self.contexts[name]
        self._called = ["#0"]
        return context, "conditioning not seen before" if unnamed else ""

    @staticmethod
    def _same_prompt(context: Context, arguments: Arguments, doubt: str) -> str:
        """Watch a context's conditioning: where it stayed the same so far, other conditioning is another generation."""
        if context.step < 0 or doubt:
            return doubt
        if _same_conditioning(arguments.conditioning, context.conditioning):
            context.stable = True
            return doubt
        if context.stable:
            context.restart()
            return doubt
        return "conditioning changed" if context.step == 0 else doubt

    def _timestep(self, arguments: Arguments, context: Context, hints: Hints | None) -> float | None:
        value = arguments.timestep
        if value is None or isinstance(value, (int, float)):
            return None if value is None else float(value)
        if value.numel() == 0:
            return None
        if value.device.type != "cpu":
            steps = context.num_steps or self.num_steps
            known = steps is not None or (hints is not None and hints.step_index is not None)
            refining = self.refinement or (hints is not None and hints.refinement)
            if known and not self.needs_timestep and not refining:
                return None
            if hints is not None and isinstance(hints.timestep, (int, float)):
                return float(hints.timestep)
            self.syncs += 1
        return float(value.detach().amax())

    def _advance(self, context: Context, t: float | None, key: Key, hints: Hints | None, doubt: str) -> Place:
        refining = self.refinement or (hints is not None and hints.refinement)
        step = context.step + 1
        fresh = step == 0
        steps = context.num_steps if context.num_steps is not None else self.num_steps
        if hints is not None and hints.step_index is not None:
            fresh = fresh or hints.step_index == 0 or (hints.step_index < context.step and not refining)
            step = hints.step_index
            if not fresh and step > context.step + 1:
                doubt = doubt or "steps were left out"
        elif steps is not None and step >= steps:
            self._check_overrun(context, t, steps)
            fresh = True
        elif not fresh and t is not None and not refining:
            fresh, doubt = self._by_timestep(context, t, doubt)
        elif not fresh and t is not None and not (hints is not None and hints.refinement):
            fresh = t == context.first_timestep and t != context.last_timestep
        if not fresh and context.key is not None and key != context.key:
            self._warn(
                "shapes",
                f"shapes, dtypes or devices changed in the middle of a generation (context {context.name!r}, step "
                f"{step}): the cache was dropped and this step computed. Call reset() before a new generation, or use "
                "cache_context for each sequence of calls",
            )
            fresh, doubt = True, "shapes changed in the middle of a generation"
        if fresh:
            explicit = hints.step_index if hints is not None else None
            num_steps = context.num_steps
            context.restart()
            context.num_steps = num_steps
            context.unsettled = _TWICE if doubt == _TWICE else ""
            step = explicit or 0
        self._remember(context, t)
        context.step, context.key = step, key
        refining = refining and t is not None
        position = context.places.setdefault(t, len(context.places)) if refining and t is not None else step
        return Place(context, step, fresh, doubt, t, position, refining)

    def _by_timestep(self, context: Context, t: float, doubt: str) -> tuple[bool, str]:
        """What the timestep says: a new generation, or a reason to compute."""
        last, first = context.last_timestep, context.first_timestep
        if last is None or first is None:
            return False, doubt
        if t == last:
            if context.unsettled == _TWICE or context.step > 0:
                self._warn(
                    "repeated",
                    f"timestep {t:g} came twice in a row with the same conditioning (context {context.name!r}): two "
                    "generations without contexts, or a sampler that refines. Each such step is computed; use "
                    "cache_context for each generation, or refinement=True",
                )
            context.unsettled = _TWICE
            return t == first, _TWICE
        if t == first:
            return True, doubt
        direction = 1 if t > last else -1
        if context.direction and direction != context.direction:
            context.unsettled = _BACK
            return False, _BACK
        odd, context.unsettled = context.unsettled, ""
        return False, f"{odd} just before" if odd else doubt

    def _check_overrun(self, context: Context, t: float | None, steps: int) -> None:
        """A generation that begins goes back to the first timestep."""
        if t is None or context.last_timestep is None or (t - context.last_timestep) * context.direction <= 0:
            return
        self._warn(
            "overrun",
            f"a run of {steps} steps (context {context.name!r}) is over, and its timesteps go on, at {t:g}: this call "
            "began a new generation. Compile with the num_steps of the run, or give cache_context(step_index=, "
            "num_inference_steps=)",
        )

    @staticmethod
    def _remember(context: Context, t: float | None) -> None:
        if t is None:
            return
        if context.first_timestep is None:
            context.first_timestep = t
        elif context.last_timestep is not None and t != context.last_timestep and not context.direction:
            context.direction = 1 if t > context.last_timestep else -1
        context.last_timestep = t

    def _warn(self, kind: str, text: str) -> None:
        if kind not in self._warned:
            self._warned.add(kind)
            warnings.warn(text, CacheWarning, stacklevel=6)


def _same_value(a: Any, b: Any) -> bool:
    """Equal timesteps, told without a device sync (two tensors on an accelerator count as equal only if identical)."""
    if a is b:
        return a is not None
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.device.type == "cpu" and b.device.type == "cpu" and a.shape == b.shape and torch.equal(a, b)
    return isinstance(a, (int, float)) and isinstance(b, (int, float)) and a == b


def _same_conditioning(now: Sequence[Any], before: Sequence[Any]) -> bool:
    return len(now) == len(before) and all(_same(a, b) for a, b in zip(now, before, strict=True))


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
        return type(a) is type(b) and not isinstance(a, torch.Tensor) and bool(a == b)
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    if a.device.type == "meta":
        return False
    if a.numel() and a.data_ptr() == b.data_ptr() and a.stride() == b.stride():
        return True
    return a.device.type == "cpu" and a.numel() <= _COMPARED and torch.equal(a, b)
