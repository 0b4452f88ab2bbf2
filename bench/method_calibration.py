"""What some methods need to know of a model beforehand, measured on one uncached generation of the demo model."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffcache_fx.demo.demo import Demo

SEED = 1  # not the seed of the images that are scored
LOOKAHEAD = 3
DEGREE = 4
TYPES = {"attention": "attn1", "mlp": "ff"}
Table = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Calibration:
    """Changes are mean |now - before| / mean |now|.

    ratios: of MagCache, the mean over the tokens of |residual of all blocks| over that of the step before; one for each
    step, 1 for the first. coefficients: of TeaCache, highest power first, of the polynomial that gives the output's
    change from that of the first block's modulated input. layers: of SmoothCache, by type of layer [step][k - 1], the
    change of the layers' outputs over the last k steps, mean over the layers. blocks: of Block Caching [step][block],
    the change of a block's residual since the step before. Changes over steps that are not there yet are infinite.
    """

    ratios: Sequence[float]
    coefficients: Sequence[float]
    layers: dict[str, Table]
    blocks: Table

    def smooth_plan(self, alpha: float) -> dict[str, list[int]]:
        """SmoothCache: from each computed step on, as many reuses (3 at most) as keep the change at `alpha` or less."""
        plans = {}
        for kind, changes in self.layers.items():
            bits, step = [0] * len(changes), 0
            while step < len(bits):
                bits[step] = 1
                reuses = [
                    k for k in range(1, LOOKAHEAD + 1) if step + k < len(bits) and changes[step + k][k - 1] <= alpha
                ]
                step += max(reuses, default=0) + 1
            plans[kind] = bits
        return plans

    def block_plan(self, delta: float) -> list[list[int]]:
        """Block Caching: each block is held while its changes since it was computed add up to `delta` at the most."""
        bits, total = [], np.zeros(len(self.blocks[0]))
        for changes in self.blocks:
            total = total + np.array(changes)
            computed = total > delta
            total[computed] = 0.0
            bits.append([int(bit) for bit in computed])
        return bits


def change(now: Tensor, before: Tensor, over: Tensor | None = None) -> float:
    """mean |now - before| / mean |over|, over `now` by default; no unit."""
    return float((now - before).abs().mean() / (now if over is None else over).abs().mean())


class _Recorder:
    """Hooks on the blocks of the demo's denoiser, and what they saw."""

    def __init__(self, model: nn.Module) -> None:
        blocks: Any = model.get_submodule("transformer_blocks")
        count = len(blocks)
        self.stack: list[tuple[Tensor, Tensor]] = []  # of each step: into the first block, out of the last
        self.modulated: list[Tensor] = []
        self.answers: list[Tensor] = []
        self.blocks: list[list[float]] = []
        self.layers: dict[str, list[list[list[float]]]] = {kind: [] for kind in TYPES}  # [step][layer][k - 1]
        self._into: Tensor = torch.empty(0)
        self._first: Tensor = torch.empty(0)
        self._residuals: list[Tensor | None] = [None] * count
        self._past: dict[tuple[str, int], deque[Tensor]] = {}
        self.handles = [
            blocks[0].norm1.register_forward_hook(
                lambda module, args, output: self.modulated.append(output[0].float())
            ),
            model.register_forward_hook(lambda module, args, output: self.answers.append(output.sample.float())),
        ]
        for index, block in enumerate(blocks):
            self.handles += [
                block.register_forward_pre_hook(self._enter(index), with_kwargs=True),
                block.register_forward_hook(self._leave(index, index == count - 1)),
                *(
                    block.get_submodule(name).register_forward_hook(self._layer(kind, index))
                    for kind, name in TYPES.items()
                ),
            ]

    def _enter(self, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._into = (args[0] if args else kwargs["hidden_states"]).float()
            if index == 0:
                self._first = self._into
                self.blocks.append([])
                for kind in self.layers:
                    self.layers[kind].append([])

        return hook

    def _leave(self, index: int, last: bool) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            residual, before = output.float() - self._into, self._residuals[index]
            self.blocks[-1].append(np.inf if before is None else change(residual, before))
            self._residuals[index] = residual
            if last:
                self.stack.append((self._first, output.float()))

        return hook

    def _layer(self, kind: str, index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> None:
            past = self._past.setdefault((kind, index), deque(maxlen=LOOKAHEAD))
            known = [change(output.float(), before) for before in reversed(past)]
            self.layers[kind][-1].append(known + [np.inf] * (LOOKAHEAD - len(known)))
            past.append(output.float())

        return hook


def calibrate(demo: Demo, steps: int, images: int = 20) -> Calibration:
    """Run the uncached model with hooks, in `steps` steps, on a few images of each class."""
    recorder = _Recorder(demo.model)
    try:
        demo.draw(
            demo.model,
            torch.arange(images) % demo.num_classes,
            num_steps=steps,
            seed=SEED,
            batch_size=images,
            dtype=next(demo.model.parameters()).dtype,
        )
    finally:
        for handle in recorder.handles:
            handle.remove()
    norms = [(out - into).norm(dim=-1) for into, out in recorder.stack]
    ratios = [1.0] + [float((now / before).mean()) for before, now in itertools.pairwise(norms)]
    x, y = (
        [change(now, before, over=before) for before, now in itertools.pairwise(seen)]
        for seen in (recorder.modulated, recorder.answers)
    )
    fitted = np.polyfit(x, y, min(DEGREE, len(x) - 1))
    coefficients = [0.0] * (DEGREE + 1 - len(fitted)) + [float(c) for c in fitted]
    layers = {kind: [np.mean(step, axis=0).tolist() for step in found] for kind, found in recorder.layers.items()}
    return Calibration(ratios, coefficients, layers, recorder.blocks)
