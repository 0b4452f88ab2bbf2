"""A corpus of tiny denoisers with random weights: every denoiser of diffusers that builds, and plain modules."""

from __future__ import annotations

from functools import cache

from . import (
    audio_and_other,
    audio_video,
    cascades,
    editing,
    flux_like,
    image_transformers,
    later_images,
    later_unets,
    later_videos,
    plain,
    unets,
    unusual,
    video_transformers,
    wan_like,
)
from .entry import Entry, Published, randomize_, stacks, tensors
from .published import block_28, published

__all__ = [
    "CORE",
    "NOT_BUILT",
    "Entry",
    "Published",
    "block_28",
    "corpus",
    "published",
    "randomize_",
    "stacks",
    "tensors",
]

NOT_BUILT: dict[str, str] = {
    "DreamLiteTransformer2DModel": "the attention level inside DreamLiteUNetModel, not a denoiser of its own",
    "DualTransformer2DModel": "an attention level of a deprecated U-Net, not a denoiser of its own",
    "MiniMaxMusic3RVQDepthDecoder": "an autoregressive decoder of audio codes, it takes neither latent nor timestep",
    "MotionAdapter": "weights that UNetMotionModel takes in; its forward does nothing",
    "Transformer2DModel": "the attention level inside the U-Nets; as a denoiser, DiT and PixArt took its place",
    "TransformerTemporalModel": "the temporal level inside the video U-Nets, not a denoiser of its own",
    "UNetFlatConditionModel": "the text half of a deprecated pipeline, which merges it with an image U-Net at run time",
    "UniDiffuserModel": "of a deprecated pipeline: three latents and two timesteps in one call",
}

CORE: tuple[str, ...] = (
    "UNet2DModel",
    "UNet2DConditionModel",
    "UNet2DConditionModel-sdxl",
    "UNetSpatioTemporalConditionModel",
    "DiTTransformer2DModel",
    "PixArtTransformer2DModel",
    "SD3Transformer2DModel",
    "FluxTransformer2DModel",
    "Flux2Transformer2DModel",
    "AuraFlowTransformer2DModel",
    "HunyuanDiT2DModel",
    "SanaTransformer2DModel",
    "LuminaNextDiT2DModel",
    "ZImageTransformer2DModel",
    "QwenImageTransformer2DModel",
    "ChromaTransformer2DModel",
    "WanTransformer3DModel",
    "LTXVideoTransformer3DModel",
    "HunyuanVideoTransformer3DModel",
    "CogVideoXTransformer3DModel",
    "MochiTransformer3DModel",
    "StableAudioDiTModel",
    "LatteTransformer3DModel",
    "AllegroTransformer3DModel",
    "plain-vit",
    "plain-mlp",
    "plain-unet",
    "plain-dit-shared-adaln",
)


@cache
def _entries() -> dict[str, Entry]:
    modules = (
        unets,
        later_unets,
        cascades,
        image_transformers,
        flux_like,
        later_images,
        editing,
        video_transformers,
        wan_like,
        later_videos,
        audio_video,
        unusual,
        audio_and_other,
        plain,
    )
    entries = [entry for module in modules for entry in module.ENTRIES]
    named = {entry.name: entry for entry in entries}
    if len(named) != len(entries):
        raise ValueError("two entries of the corpus share a name")
    return named


def corpus() -> dict[str, Entry]:
    """Return every entry by name."""
    return dict(_entries())
