"""What all references share: wrapped submodules, the count of steps, and spans of blocks held by their residual.

Nothing here knows of diffcache_fx. A reference replaces `forward` of the submodules it names and asks, at every call,
whether they run; `remove()` gives the model back as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

Arguments = tuple[Any, ...]
Keywords = Mapping[str, Any]


class Reference:
    """A model, called as before, of which some parts are not computed at every step.

    `warm_up`: the first steps always refresh. `cool_down`: so do the last ones, out of `num_steps`. `longest`: so many
    reuses in a row at the most. Step 0 always refreshes.

    Attributes:
        step: how many calls there were since `reset`.
        decisions: one entry for each call, True where everything the method holds was refreshed; methods that decide
            for several parts keep such a list for each part by its name.
        signals: what was compared with the threshold at each call, None where nothing was.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        warm_up: int = 1,
        cool_down: int = 0,
        longest: int | None = None,
        num_steps: int | None = None,
    ) -> None:
        if cool_down and num_steps is None:
            raise ValueError("cool_down needs num_steps")
        self.model = model
        self.warm_up, self.cool_down, self.longest, self.num_steps = warm_up, cool_down, longest, num_steps
        self.originals: dict[str, Callable[..., Any]] = {}
        self._before: list[tuple[nn.Module, Callable[..., Any] | None]] = []
        self.reset()

    def reset(self) -> None:
        """Begin another generation."""
        self.step = 0
        self.decisions: Any = []
        self.signals: list[float | None] = []

    def remove(self) -> None:
        """Give the submodules their own `forward` back."""
        for module, before in reversed(self._before):
            del module.forward
            if before is not None:
                module.forward = before
        self._before.clear()

    def wrap(self, path: str, function: Callable[..., Any]) -> None:
        """Let ``function(original, *args, **kwargs)`` stand in for the forward of the submodule at ``path``."""
        module = self.model.get_submodule(path)
        self._before.append((module, vars(module).get("forward")))
        self.originals[path] = module.forward
        module.forward = partial(function, module.forward)

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.run(args, kwargs)
        self.step += 1
        return output

    def run(self, args: Arguments, kwargs: Keywords) -> Any:
        return self.model(*args, **kwargs)

    @property
    def at_an_end(self) -> bool:
        """Whether this step is among the first or the last ones that always refresh."""
        early = self.step < max(self.warm_up, 1)
        return early or (self.num_steps is not None and self.step >= self.num_steps - self.cool_down)

    def must_refresh(self, decisions: list[bool]) -> bool:
        """Whether this step refreshes whatever the method says, after these decisions."""
        return self.at_an_end or (self.longest is not None and run_length(decisions) >= self.longest)

    @property
    def forced(self) -> bool:
        """`must_refresh` of a method with one list of decisions."""
        return self.must_refresh(self.decisions)

    def record(self, refresh: bool, signal: float | None = None) -> None:
        self.decisions.append(refresh)
        self.signals.append(signal)


class Span:
    """Consecutive blocks, each called with the hidden states first, replaced by their input plus a residual.

    `fill` is asked when the first block is reached, with that block's arguments: a residual to add, or None to compute.
    `keep` is given the residual of the blocks, output minus input, when they were computed.
    """

    def __init__(
        self,
        reference: Reference,
        paths: Sequence[str],
        fill: Callable[..., Tensor | None],
        keep: Callable[[Tensor], None],
    ) -> None:
        self.fill, self.keep, self.last = fill, keep, len(paths) - 1
        for i, path in enumerate(paths):
            reference.wrap(path, partial(self._forward, i))

    def _forward(self, i: int, original: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        hidden = args[0]
        if i == 0:
            self.entry = hidden
            self.filled = self.fill(*args, **kwargs)
            if self.filled is not None:
                return hidden + self.filled
        if self.filled is not None:
            return hidden
        output = original(*args, **kwargs)
        if i == self.last:
            self.keep(output - self.entry)
        return output


def run_length(decisions: Sequence[bool]) -> int:
    """How many reuses in a row come last."""
    return next((i for i, refreshed in enumerate(reversed(decisions)) if refreshed), len(decisions))


def latent(args: Arguments, kwargs: Keywords) -> Tensor:
    """The model's noisy input."""
    return args[0] if args else kwargs["hidden_states" if "hidden_states" in kwargs else "sample"]


def timestep(args: Arguments, kwargs: Keywords) -> float:
    """The timestep of a call; the first sample's where there is one for each."""
    value = kwargs["timestep"] if "timestep" in kwargs else args[1]
    return float(torch.as_tensor(value).reshape(-1)[0])


def sample(output: Any) -> Tensor:
    """The tensor of a model's output."""
    return output if isinstance(output, Tensor) else output[0]


def with_sample(like: Any, value: Tensor) -> Any:
    """An output of the same type as ``like``, with another tensor in it."""
    if isinstance(like, Tensor):
        return value
    return (value, *like[1:]) if isinstance(like, tuple) else type(like)(sample=value)


def change(now: Tensor, before: Tensor) -> float:
    """mean|now - before| / mean|before|"""
    return float((now - before).abs().mean() / before.abs().mean())
