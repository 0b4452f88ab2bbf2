"""Forecasts that the model's last block verifies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from .forecasting import taylor
from .hooks import Arguments, Keywords, Reference, Span, change, run_length


def elementwise(draft: Tensor, computed: Tensor) -> float:
    """mean(|draft - computed| / (|computed| + 1e-10)), the error of the authors' code."""
    return float(((draft - computed).abs() / (computed.abs() + 1e-10)).mean())


ratio = change
"""mean|draft - computed| / mean|computed|"""


class SpeCa(Reference):
    """Taylor drafts, checked against the last block (arXiv 2509.11628).

    Two pieces are forecast at a draft step: the residual of all blocks but the last, and that of the last. From draft
    number min_taylor + 1 of a run on, the last block also runs on its forecast input, and e = error(forecast output,
    computed output) is stored; the output is the forecast. The next step is full if e > tau, or after `max_taylor`
    drafts; tau = max(tau0 * decay ** ((step + 1) / num_steps), floor), step the one that would be full.

    A full step forgets e and is followed by a draft, in the warm-up too, unless `plain_warm_up`: with warm_up 3 the
    steps are full, draft, full. ``signals[step]`` is the e measured at that step, None where the block did not run.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[str],
        num_steps: int,
        tau0: float = 0.1,
        decay: float = 0.01,
        min_taylor: int = 2,
        max_taylor: int = 5,
        order: int = 4,
        warm_up: int = 3,
        floor: float = 0.01,
        error: Callable[[Tensor, Tensor], float] = elementwise,
        plain_warm_up: bool = False,
        **limits: Any,
    ) -> None:
        self.tau0, self.decay, self.floor, self.error = tau0, decay, floor, error
        self.min_taylor, self.max_taylor = min_taylor, max_taylor
        self.plain_warm_up, self.last_block = plain_warm_up, blocks[-1]
        self.rule = taylor(order, first=0 if plain_warm_up else warm_up - 1)
        super().__init__(model, warm_up=warm_up, num_steps=num_steps, **limits)
        for i, paths in enumerate((blocks[:-1], blocks[-1:])):
            Span(self, paths, partial(self.fill, i), partial(self.keep, i))

    def reset(self) -> None:
        super().reset()
        self.history: tuple[list[tuple[int, Tensor]], ...] = ([], [])
        self.measured: float | None = None

    @property
    def tau(self) -> float:
        return max(self.tau0 * self.decay ** ((self.step + 1) / self.num_steps), self.floor)

    def run(self, args: Arguments, kwargs: Keywords) -> Any:
        drafts = run_length(self.decisions)
        after_full = drafts == 0 and self.step > 0
        if after_full and not (self.plain_warm_up and self.forced):
            full = False
        else:
            failed = self.measured is not None and self.measured > self.tau
            full = self.forced or drafts >= self.max_taylor or failed
        self.measured = None
        self.verify = not full and drafts >= max(self.min_taylor, 1)
        self.record(full)
        return super().run(args, kwargs)

    def keep(self, i: int, residual: Tensor) -> None:
        self.history[i].insert(0, (self.step, residual))

    def fill(self, i: int, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        if self.decisions[-1]:
            return None
        residual = self.rule(self.history[i], self.step)
        if i == 1 and self.verify:
            computed = self.originals[self.last_block](hidden, *args, **kwargs)
            self.measured = self.signals[-1] = self.error(hidden + residual, computed)
        return residual
