"""Methods that hold the residual of the whole stack of blocks and decide when its first block is reached."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from torch import Tensor, nn

from .hooks import Reference, Span, change


class Stack(Reference):
    """The residual of the whole stack of blocks is held; `reuse` decides when the first block is reached."""

    def __init__(self, model: nn.Module, blocks: Sequence[str], **limits: Any) -> None:
        self.blocks = blocks
        super().__init__(model, **limits)
        Span(self, blocks, self.fill, self.keep)

    def fill(self, *args: Any, **kwargs: Any) -> Tensor | None:
        return self.residual if self.reuse(*args, **kwargs) else None

    def keep(self, residual: Tensor) -> None:
        self.residual = residual

    def reuse(self, *args: Any, **kwargs: Any) -> bool:
        raise NotImplementedError


def ada_norm_zero(block: nn.Module, hidden: Tensor, *_: Any, **kwargs: Any) -> Tensor:
    """What the attention of a DiT block of diffusers takes in."""
    return block.norm1(hidden, kwargs["timestep"], kwargs["class_labels"], hidden_dtype=hidden.dtype)[0]


def ada_norm_single(block: nn.Module, hidden: Tensor, *_: Any, **kwargs: Any) -> Tensor:
    """What the self-attention of a PixArt block of diffusers takes in."""
    table = block.scale_shift_table[None] + kwargs["timestep"].reshape(hidden.shape[0], 6, -1)
    shift, scale, *_ = table.chunk(6, dim=1)
    return block.norm1(hidden) * (1 + scale) + shift


class TeaCache(Stack):
    """The accumulated, rescaled change of the modulated input of the first block (arXiv 2411.19108).

    acc += polynomial(mean|m - m'| / mean|m'|), m' of the step before, refreshed or not; reuse if acc < threshold, else
    refresh with acc = 0. The first and the last step refresh with acc = 0. `coefficients`: highest power first.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[str],
        coefficients: Sequence[float],
        threshold: float,
        num_steps: int,
        modulated: Callable[..., Tensor] = ada_norm_zero,
        cool_down: int = 1,
        **limits: Any,
    ) -> None:
        self.coefficients, self.threshold, self.modulated = coefficients, threshold, modulated
        super().__init__(model, blocks, num_steps=num_steps, cool_down=cool_down, **limits)

    def reset(self) -> None:
        super().reset()
        self.total = 0.0

    def reuse(self, *args: Any, **kwargs: Any) -> bool:
        value = self.modulated(self.model.get_submodule(self.blocks[0]), *args, **kwargs)
        signal = None
        if not self.forced:
            x, rescaled = change(value, self.before), 0.0
            for coefficient in self.coefficients:
                rescaled = rescaled * x + coefficient
            signal = self.total + rescaled
        self.before = value
        reuse = signal is not None and signal < self.threshold
        self.total = signal if reuse else 0.0
        self.record(not reuse, signal)
        return reuse


class MagCache(Stack):
    """Errors accumulated from the known ratios of the residual's magnitude from step to step (arXiv 2506.09045).

    From step int(retention * num_steps + 0.5) on: R *= ratio of the step, err += |1 - R|, one more in the run; reuse if
    err <= threshold and run <= longest, both allowing equality, and the step is not among `never`; else refresh with
    R = 1, err = 0, run = 0. Before, nothing accumulates. Ratios of another number of steps: the nearest ones.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[str],
        ratios: Sequence[float],
        threshold: float,
        longest: int,
        retention: float,
        num_steps: int,
        never: Collection[int] = (),
        **limits: Any,
    ) -> None:
        if len(ratios) != num_steps:
            scale = (len(ratios) - 1) / (num_steps - 1)
            ratios = [ratios[round(i * scale)] for i in range(num_steps)]
        self.ratios, self.threshold, self.run_length, self.never = ratios, threshold, longest, never
        self.retained = int(retention * num_steps + 0.5)
        super().__init__(model, blocks, num_steps=num_steps, **limits)

    def reset(self) -> None:
        super().reset()
        self.ratio, self.error, self.count = 1.0, 0.0, 0

    def reuse(self, *_: Any, **__: Any) -> bool:
        if self.step < self.retained:
            self.record(True)
            return False
        self.ratio *= self.ratios[self.step]
        self.error += abs(1 - self.ratio)
        self.count += 1
        reuse = self.error <= self.threshold and self.count <= self.run_length and self.step not in self.never
        reuse = reuse and not self.forced
        self.record(not reuse, self.error)
        if not reuse:
            self.ratio, self.error, self.count = 1.0, 0.0, 0
        return reuse


class DiCache(Stack):
    """The first blocks as a probe of how far the stack has moved (arXiv 2508.17356).

    p = output of the first `depth` blocks. The steps up to and including int(ret * num_steps), and the last one,
    refresh with acc = 0. Else acc += mean|p - p'| / mean|p'|, p' of the step before, refreshed or not; reuse if
    acc < threshold, else refresh with acc = 0. A reuse adds r2 + g (r1 - r2), r1 and r2 the residuals of the stack at
    the last two refreshed steps, g = mean|q - q2| / mean|q1 - q2| between 1 and 1.5, q the residual of the probe, q1
    and q2 those at the two refreshed steps; with one refreshed step it adds r1. `minus_input`: what accumulates is
    |change of p - change of x| instead.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[str],
        threshold: float,
        ret: float,
        num_steps: int,
        depth: int = 1,
        minus_input: bool = False,
        cool_down: int = 1,
        **limits: Any,
    ) -> None:
        self.threshold, self.depth, self.minus_input = threshold, depth, minus_input
        warm_up = int(ret * num_steps) + 1
        super().__init__(model, blocks, warm_up=warm_up, num_steps=num_steps, cool_down=cool_down, **limits)

    def reset(self) -> None:
        super().reset()
        self.total = 0.0
        self.window: list[tuple[Tensor, Tensor]] = []

    def keep(self, residual: Tensor) -> None:
        self.window.append((residual, self.indicator))

    def fill(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
        probe = hidden
        for path in self.blocks[: self.depth]:
            probe = self.originals[path](probe, *args, **kwargs)
        signal = None
        if not self.forced:
            x, p = self.before
            moved = change(probe, p)
            signal = self.total + (abs(moved - change(hidden, x)) if self.minus_input else moved)
        reuse = signal is not None and signal < self.threshold
        self.total = signal if reuse else 0.0
        self.record(not reuse, signal)
        self.before, self.indicator = (hidden, probe), probe - hidden
        if not reuse:
            return None
        newer, q1 = self.window[-1]
        if len(self.window) < 2:
            return newer
        older, q2 = self.window[-2]
        g = ((self.indicator - q2).abs().mean() / (q1 - q2).abs().mean()).clip(1, 1.5)
        return older + g * (newer - older)
