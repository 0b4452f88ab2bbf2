"""Draw samples from a conditional denoiser with a diffusers scheduler and classifier-free guidance."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Denoiser = Callable[..., Any]
Progress = Callable[[int, int], None]


def sample_generators(seed: int, first: int, count: int) -> list[torch.Generator]:
    """One CPU generator for each of the samples ``first`` to ``first + count - 1``, set by the seed and the index."""
    return [torch.Generator().manual_seed(seed * 1_000_003 + index) for index in range(first, first + count)]


def initial_noise(generators: Sequence[torch.Generator], shape: tuple[int, int, int]) -> Tensor:
    """Standard normal noise [N, *shape] float32 on the CPU, sample i from generator i alone."""
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


def call_denoiser(
    denoiser: Denoiser, context: str, images: Tensor, timestep: Tensor, condition: Mapping[str, Tensor]
) -> Tensor:
    """One call; inside ``denoiser.cache_context(context)`` where the denoiser has such a method.

    ``images`` [N, C, H, W], ``timestep`` [N], ``condition`` what else it takes, by name; the answer [N, C, H, W] in
    float32, taken from a tensor, a tuple's first element or an output's ``sample``.
    """
    enter = getattr(denoiser, "cache_context", None)
    with enter(context) if enter is not None else contextlib.nullcontext():
        output = denoiser(images, timestep=timestep, **condition)
    if isinstance(output, tuple | list):
        output = output[0]
    if not isinstance(output, Tensor):
        output = output.sample
    return output.float()


def by_class(labels: Tensor) -> dict[str, Tensor]:
    """How a class-conditional denoiser takes its labels."""
    return {"class_labels": labels}


@torch.no_grad()
def generate(
    denoiser: Denoiser,
    scheduler: Any,
    labels: Tensor | Sequence[int],
    *,
    num_steps: int = 50,
    guidance_scale: float = 1.0,
    seed: int = 0,
    batch_size: int = 64,
    progress: Progress | None = None,
    batched_guidance: bool = True,
    null_class: int = 10,
    image_shape: tuple[int, int, int] = (1, 32, 32),
    condition: Callable[[Tensor], dict[str, Tensor]] = by_class,
    first_index: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Sample one image for each label, [N, C, H, W] float32 on the CPU, clamped to [-1, 1].

    Args:
        denoiser: called as ``denoiser(images, timestep=..., **condition(labels))``.
        scheduler: a diffusers scheduler; its timesteps are set anew for each batch.
        labels: the class asked for in each sample, [N] int64.
        num_steps: denoising steps of each sample.
        guidance_scale: 1 calls the denoiser for the class alone; above 1 also for ``null_class``.
        seed: with the sample's index, the only source of the sample's noise, so that sample i starts from the same
            noise and draws the same noise in a stochastic scheduler, whatever the batch size.
        batch_size: samples drawn together; with batched guidance the denoiser sees twice as many.
        progress: called after each step with the steps done and the steps there are, over all batches.
        batched_guidance: call the denoiser once a step with both halves, the class first; otherwise twice a step, in
            the cache contexts ``cond`` and ``uncond`` where the denoiser has them (``cond_uncond`` for one call).
        null_class: the label that means "no class".
        image_shape: channels, height, width.
        condition: what the denoiser takes for labels [N], by name; floating-point tensors are given in ``dtype``.
        first_index: the index of the first label's sample, to draw a part of a longer list.
        device: where the denoiser is.
        dtype: what the denoiser takes; the scheduler's arithmetic is float32.
    """
    if num_steps < 1 or batch_size < 1:
        raise ValueError(f"num_steps and batch_size must be at least 1, not {num_steps} and {batch_size}")
    wanted = torch.as_tensor(labels, dtype=torch.int64)
    if wanted.dim() != 1:
        raise ValueError(f"labels must be one list, not a tensor of {wanted.dim()} dimensions")
    guided = guidance_scale != 1.0
    takes_generator = "generator" in inspect.signature(scheduler.step).parameters
    batches = -(-len(wanted) // batch_size)
    steps_done = 0
    images = []
    for start in range(0, len(wanted), batch_size):
        cond = wanted[start : start + batch_size].to(device)
        uncond = torch.full_like(cond, null_class)
        positive_side, negative_side, both_sides = (
            {name: value.to(device, dtype if value.is_floating_point() else None) for name, value in given.items()}
            for given in (condition(cond), condition(uncond), condition(torch.cat((cond, uncond))))
        )
        generators = sample_generators(seed, first_index + start, len(cond))
        scheduler.set_timesteps(num_steps)
        sigma = float(getattr(scheduler, "init_noise_sigma", 1.0))  # schedulers of flows have none
        latents = initial_noise(generators, image_shape).to(device) * sigma
        extra = {"generator": generators} if takes_generator else {}
        try:
            for step in scheduler.timesteps:
                scale = getattr(scheduler, "scale_model_input", None)
                inputs = (latents if scale is None else scale(latents, step)).to(dtype)
                moment = step.to("cpu").expand(len(cond)).to(device)
                if not guided:
                    output = call_denoiser(denoiser, "cond", inputs, moment, positive_side)
                else:
                    if batched_guidance:
                        both = call_denoiser(
                            denoiser,
                            "cond_uncond",
                            torch.cat((inputs, inputs)),
                            torch.cat((moment, moment)),
                            both_sides,
                        )
                        positive, negative = both.chunk(2)
                    else:
                        positive = call_denoiser(denoiser, "cond", inputs, moment, positive_side)
                        negative = call_denoiser(denoiser, "uncond", inputs, moment, negative_side)
                    output = negative + guidance_scale * (positive - negative)
                latents = scheduler.step(output, step, latents, **extra).prev_sample
                steps_done += 1
                if progress is not None:
                    progress(steps_done, batches * len(scheduler.timesteps))
        finally:
            reset = getattr(denoiser, "_reset_stateful_cache", None)
            if reset is not None:
                reset()
        images.append(latents.float().cpu().clamp(-1.0, 1.0))
    return torch.cat(images) if images else torch.empty(0, *image_shape)


def image_grid(images: Tensor, columns: int = 10, gap: int = 2) -> Tensor:
    """One picture [height, width] uint8 of images [N, 1, H, W] in [-1, 1], row by row with ``gap`` pixels between."""
    count, _, height, width = images.shape
    rows = -(-count // columns)
    canvas = torch.zeros(rows * (height + gap) - gap, columns * (width + gap) - gap, dtype=torch.uint8)
    pixels = ((images[:, 0].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    for index in range(count):
        top, left = index // columns * (height + gap), index % columns * (width + gap)
        canvas[top : top + height, left : left + width] = pixels[index]
    return canvas
