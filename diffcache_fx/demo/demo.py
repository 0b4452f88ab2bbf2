"""What a demo is: a trained denoiser, how it is sampled, and what is needed to score its samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .classifier import DigitClassifier
from .sampling import Denoiser, generate


@dataclass(frozen=True)
class Demo:
    """A trained conditional denoiser of handwritten digits.

    Attributes:
        name: the MODEL it goes by.
        model: the denoiser in eval mode, on the CPU; called with images [N, *image_shape] in [-1, 1], ``timestep=`` [N]
            from 0 to 1000, and what ``condition`` makes of the labels.
        scheduler_class: the diffusers scheduler the model was trained for.
        scheduler_config: that scheduler's arguments.
        condition: from labels [N] int64 to the model's other keyword arguments.
        read: from images to the labels seen in them [N] int64, and their features [N, D].
        classifier: reads one digit, float32, in eval mode.
        reference_features: features of 10,000 real images, [10000, D] float32.
        reference_labels: their labels, [10000] int64.
        guidance_scale: the default scale of classifier-free guidance; 1 means none.
        num_classes: how many labels there are, from 0 on.
        null_class: the label that means "none", the unconditional side of the guidance.
        shown: the labels of one picture.
        image_shape: channels, height, width.
        training: how the weights came about.
    """

    name: str
    model: nn.Module
    scheduler_class: type
    scheduler_config: dict[str, Any]
    condition: Callable[[Tensor], dict[str, Tensor]]
    read: Callable[[Tensor], tuple[Tensor, Tensor]]
    classifier: DigitClassifier
    reference_features: Tensor
    reference_labels: Tensor
    guidance_scale: float
    num_classes: int
    null_class: int
    shown: tuple[int, ...]
    image_shape: tuple[int, int, int]
    training: dict[str, Any]

    def scheduler(self) -> Any:
        """A fresh scheduler; each one keeps the state of one generation only."""
        return self.scheduler_class(**self.scheduler_config)

    def draw(
        self,
        denoiser: Denoiser,
        labels: Tensor | Sequence[int],
        *,
        scheduler: Any = None,
        guidance_scale: float | None = None,
        **options: Any,
    ) -> Tensor:
        """Samples for labels, [N, *image_shape] in [-1, 1], through any denoiser that takes this model's calls.

        scheduler: another than its own. options: those of `sampling.generate`.
        """
        return generate(
            denoiser,
            self.scheduler() if scheduler is None else scheduler,
            labels,
            guidance_scale=self.guidance_scale if guidance_scale is None else guidance_scale,
            null_class=self.null_class,
            image_shape=self.image_shape,
            condition=self.condition,
            **options,
        )

    def example(self, step: int = 0) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The call of a step for one picture, with both halves of guidance: noise, and timesteps that go down."""
        halves = 1 if self.guidance_scale == 1.0 else 2
        labels = torch.tensor(self.shown)
        labels = torch.cat((labels, torch.full_like(labels, self.null_class))[:halves])
        images = torch.randn((len(labels), *self.image_shape), generator=torch.Generator().manual_seed(step))
        dtype = self.scheduler().timesteps.dtype
        moment = torch.full((len(labels),), max(999 - 20 * step, 0), dtype=dtype)
        return (images,), {"timestep": moment, **self.condition(labels)}
