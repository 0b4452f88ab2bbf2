"""Methods that decide from the change of what the first blocks add, or of the model's input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from .hooks import Arguments, Keywords, Reference, Span, change, latent, sample, with_sample


class DBCache(Reference):
    """Middle blocks reused while the residual of the first blocks stays near that of the last refresh (cache-dit).

    Reuse if mean|r - r0| / mean|r0| < threshold, r the residual of the first `first` blocks, r0 that of the last
    refreshed step. Held: the residual of the blocks between the first and the last ones; the last always run.
    A threshold of 0 never reuses, one of 1 or more always does. `max_cached`: so many reuses in a generation.
    `plain_longest` False: runs of reuses are counted as cache-dit counts them (see `count`).
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[str],
        threshold: float,
        first: int = 8,
        last: int = 0,
        warm_up: int = 8,
        max_cached: int | None = None,
        plain_longest: bool = True,
        **limits: Any,
    ) -> None:
        self.threshold, self.max_cached, self.plain_longest = threshold, max_cached, plain_longest
        super().__init__(model, warm_up=warm_up, **limits)
        self.wrap(blocks[0], self.enter)
        Span(self, blocks[first : len(blocks) - last], self.fill, lambda residual: setattr(self, "residual", residual))

    def reset(self) -> None:
        super().reset()
        self.before: Tensor | None = None
        self.counter = 0

    def enter(self, original: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        self.entry = args[0]
        return original(*args, **kwargs)

    def fill(self, hidden: Tensor, *_: Any, **__: Any) -> Tensor | None:
        indicator = hidden - self.entry
        signal = None if self.refused() else change(indicator, self.before)
        reuse = signal is not None and self.threshold > 0 and (signal < self.threshold or self.threshold >= 1)
        self.record(not reuse, signal)
        if reuse:
            self.count()
            return self.residual
        self.before = indicator
        return None

    def refused(self) -> bool:
        if self.max_cached is not None and self.decisions.count(False) >= self.max_cached:
            return True
        if self.plain_longest or self.at_an_end:
            return self.forced
        full = self.longest is not None and self.counter >= self.longest
        self.counter = 0 if full else self.counter
        return full

    def count(self) -> None:
        """cache-dit's counter of reuses in a row; only a refusal sets it back to 0, not a refresh by the threshold."""
        cached = [step for step, refreshed in enumerate(self.decisions) if not refreshed]
        if len(cached) == 1:
            self.counter += 1
        elif cached[-1] - cached[-2] == 1:
            self.counter = 2 if self.counter == 0 else self.counter + 1


class FBCache(DBCache):
    """First-block cache (ParaAttention): one block computed first, none last, no warm-up beyond step 0."""

    def __init__(
        self, model: nn.Module, blocks: Sequence[str], threshold: float, warm_up: int = 1, **limits: Any
    ) -> None:
        super().__init__(model, blocks, threshold, first=1, last=0, warm_up=warm_up, **limits)


class EasyCache(Reference):
    """The model's output from its input, while the input has moved little (arXiv 2507.02860).

    k = mean|v - v'| / mean|x - x'| over the last two refreshed steps, known after the second one. From step `ret_steps`
    on: err += k mean|x - x_prev| / mean|v'|, x_prev the input of the step before, v' the output of the last refresh;
    reuse if err < threshold, else refresh with err = 0. The last step refreshes. Held: v - x.
    """

    def __init__(
        self, model: nn.Module, threshold: float, ret_steps: int, num_steps: int, cool_down: int = 1, **limits: Any
    ) -> None:
        self.threshold = threshold
        super().__init__(model, warm_up=ret_steps, num_steps=num_steps, cool_down=cool_down, **limits)

    def reset(self) -> None:
        super().reset()
        self.error = 0.0
        self.rate: float | None = None
        self.refreshed: tuple[Tensor, Tensor] | None = None

    def run(self, args: Arguments, kwargs: Keywords) -> Any:
        x = latent(args, kwargs).clone()
        signal = None
        if not self.forced and self.rate is not None:
            moved = float((x - self.x_before).abs().mean() / self.refreshed[1].abs().mean())
            signal = self.error + self.rate * moved
        reuse = signal is not None and signal < self.threshold
        self.error = signal if reuse else 0.0
        self.record(not reuse, signal)
        self.x_before = x
        if reuse:
            return with_sample(self.like, x + self.residual)
        self.like = self.model(*args, **kwargs)
        v = sample(self.like).clone()
        if self.refreshed is not None:
            x0, v0 = self.refreshed
            self.rate = float((v - v0).abs().mean() / (x - x0).abs().mean())
        self.refreshed, self.residual = (x, v), v - x
        return self.like
