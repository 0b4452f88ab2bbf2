"""Real diffusers pipelines from tiny random components; prompt embeddings take the place of text encoders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    ChromaPipeline,
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    LTXPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    WanPipeline,
)
from torch import Tensor

from bench.zoo import corpus
from bench.zoo.entry import Draw, seeded

Callback = Callable[..., dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """A pipeline, how to run it, and what its runs look like to the denoiser.

    prompt: the prompt's arguments by seed. contexts: the guidance branches, as the denoiser's statistics name them.
    callback: whether the pipeline has `callback_on_step_end`.
    """

    name: str
    component: str
    build: Callable[[], DiffusionPipeline]
    prompt: Callable[[Draw], dict[str, Any]]
    options: dict[str, Any] = field(default_factory=dict)
    contexts: tuple[str, ...] = ("#0",)
    callback: bool = True

    def run(self, pipe: DiffusionPipeline, prompt: int, steps: int, stop_at: int | None = None) -> Tensor:
        """One generation; with `stop_at` it raises AbortedError after that many steps."""
        arguments: dict[str, Any] = {
            **self.prompt(Draw(prompt)),
            **self.options,
            "num_inference_steps": steps,
            "generator": torch.Generator().manual_seed(100 + prompt),
        }
        pipe.set_progress_bar_config(disable=True)
        if stop_at is None:
            return _tensor(pipe(**arguments))
        if self.callback:

            def stop(_: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
                if step + 1 == stop_at:
                    raise AbortedError
                return values

            return _tensor(pipe(**arguments, callback_on_step_end=stop))
        scheduler, count = pipe.scheduler, 0
        take = scheduler.step

        def step(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == stop_at:
                raise AbortedError
            return take(*args, **kwargs)

        scheduler.step = step
        try:
            return _tensor(pipe(**arguments))
        finally:
            del scheduler.step

    def denoiser(self, pipe: DiffusionPipeline) -> Any:
        return getattr(pipe, self.component)


class AbortedError(Exception):
    """Raised in the middle of a run."""


def _tensor(output: Any) -> Tensor:
    images = output.images if hasattr(output, "images") else output.frames
    return images if isinstance(images, Tensor) else torch.as_tensor(images)


def _vae() -> AutoencoderKL:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return seeded(
        lambda: AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, **blocks)  # type: ignore[arg-type]
    )


def _dit() -> DiffusionPipeline:
    transformer = seeded(
        lambda: DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=16, num_layers=4, sample_size=8, out_channels=8, norm_num_groups=8
        )
    )
    return DiTPipeline(transformer=transformer, vae=_vae(), scheduler=DDIMScheduler())


def _stable_diffusion() -> DiffusionPipeline:
    parts = {"unet": corpus()["UNet2DConditionModel"].build(), "vae": _vae(), "scheduler": DDIMScheduler()}
    absent = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    return StableDiffusionPipeline(**parts, **absent, requires_safety_checker=False)


def _stable_diffusion_xl() -> DiffusionPipeline:
    parts = {"unet": corpus()["UNet2DConditionModel-sdxl"].build(), "vae": _vae()}
    absent = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    return StableDiffusionXLPipeline(
        **parts, **absent, scheduler=EulerDiscreteScheduler(), add_watermarker=False, force_zeros_for_empty_prompt=False
    )


def _flow(pipeline: type, entry: str, absent: tuple[str, ...]) -> Callable[[], DiffusionPipeline]:
    def build() -> DiffusionPipeline:
        return pipeline(
            transformer=corpus()[entry].build(), scheduler=FlowMatchEulerDiscreteScheduler(), **dict.fromkeys(absent)
        )

    return build


def _text(width: int, tokens: int = 7) -> Callable[[Draw], dict[str, Any]]:
    return lambda d: {"prompt_embeds": d(1, tokens, width), "negative_prompt_embeds": d(1, tokens, width)}


def _pooled(width: int, pooled: int) -> Callable[[Draw], dict[str, Any]]:
    return lambda d: {
        **_text(width)(d),
        "pooled_prompt_embeds": d(1, pooled),
        "negative_pooled_prompt_embeds": d(1, pooled),
    }


def _masked(width: int, kind: torch.dtype) -> Callable[[Draw], dict[str, Any]]:
    def prompt(d: Draw) -> dict[str, Any]:
        mask, other = torch.ones(1, 7, dtype=kind), torch.ones(1, 7, dtype=kind)
        mask[:, 6:], other[:, 3:] = 0, 0
        return {**_text(width)(d), "prompt_attention_mask": mask, "negative_prompt_attention_mask": other}

    return prompt


_ENCODER = ("vae", "text_encoder", "tokenizer")
_LATENT = {"output_type": "latent", "guidance_scale": 4.0}
_VIDEO = {**_LATENT, "num_frames": 9}

CASES: tuple[Case, ...] = (
    Case(
        "DiTPipeline",
        "transformer",
        _dit,
        lambda d: {"class_labels": d.ints(1000, 1).tolist()},
        {"guidance_scale": 4.0, "output_type": "pt"},
        callback=False,
    ),
    Case("StableDiffusionPipeline", "unet", _stable_diffusion, _text(32), {"output_type": "pt", "guidance_scale": 5.0}),
    Case("StableDiffusionXLPipeline", "unet", _stable_diffusion_xl, _pooled(32, 16), _LATENT),
    Case(
        "FluxPipeline",
        "transformer",
        _flow(FluxPipeline, "FluxTransformer2DModel", (*_ENCODER, "text_encoder_2", "tokenizer_2")),
        _pooled(24, 20),
        {**_LATENT, "true_cfg_scale": 3.0, "height": 64, "width": 64},
        ("cond", "uncond"),
    ),
    Case(
        "WanPipeline",
        "transformer",
        _flow(WanPipeline, "WanTransformer3DModel", _ENCODER),
        _text(24),
        {**_VIDEO, "height": 64, "width": 64},
        ("cond", "uncond"),
    ),
    Case(
        "LTXPipeline",
        "transformer",
        _flow(LTXPipeline, "LTXVideoTransformer3DModel", _ENCODER),
        _masked(24, torch.int64),
        {**_VIDEO, "height": 128, "width": 128},
        ("cond_uncond",),
    ),
    Case(
        "ChromaPipeline",  # calls its transformer twice a step, without contexts
        "transformer",
        _flow(ChromaPipeline, "ChromaTransformer2DModel", _ENCODER),
        _masked(24, torch.bool),
        {**_LATENT, "height": 64, "width": 64},
        ("#0", "#1"),
    ),
)
