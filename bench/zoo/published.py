"""Published full-size configurations, never materialised, and one mid-size model that is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .entry import Call, Draw, Entry, Published, call, denoiser_class, seeded
from .image_transformers import padding_mask

BF16, FP16 = torch.bfloat16, torch.float16


def _full_size(name: str, dtype: torch.dtype, config: dict[str, Any]) -> nn.Module:
    # the default type rather than .to(): fake parameters cannot be swapped
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return denoiser_class(name)(**config).eval()
    finally:
        torch.set_default_dtype(before)


def _zeros(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def _flux() -> Call:
    """1024 x 1024 pixels: 4096 packed image tokens, 512 text tokens."""
    return call(
        hidden_states=_zeros(1, 4096, 64),
        timestep=_zeros(1),
        guidance=_zeros(1, dtype=torch.float32),
        pooled_projections=_zeros(1, 768),
        encoder_hidden_states=_zeros(1, 512, 4096),
        txt_ids=_zeros(512, 3),
        img_ids=_zeros(4096, 3),
        joint_attention_kwargs=None,
    )


def _sd15() -> Call:
    """512 x 512 pixels with both halves of guidance."""
    text = _zeros(2, 77, 768, dtype=FP16)
    return call(_zeros(2, 4, 64, 64, dtype=FP16), torch.zeros((), dtype=torch.int64), encoder_hidden_states=text)


def _sdxl() -> Call:
    """1024 x 1024 pixels with both halves of guidance."""
    return call(
        _zeros(2, 4, 128, 128, dtype=FP16),
        torch.zeros(()),
        encoder_hidden_states=_zeros(2, 77, 2048, dtype=FP16),
        added_cond_kwargs={"text_embeds": _zeros(2, 1280, dtype=FP16), "time_ids": _zeros(2, 6, dtype=FP16)},
    )


def _sd3() -> Call:
    """1024 x 1024 pixels with both halves of guidance; 77 CLIP and 256 T5 tokens."""
    return call(
        hidden_states=_zeros(2, 16, 128, 128),
        timestep=_zeros(2, dtype=torch.float32),
        encoder_hidden_states=_zeros(2, 333, 4096),
        pooled_projections=_zeros(2, 2048),
        joint_attention_kwargs=None,
    )


def _wan() -> Call:
    """480 x 832 pixels, 81 frames."""
    return call(
        hidden_states=_zeros(1, 16, 21, 60, 104),
        timestep=torch.zeros(1, dtype=torch.int64),
        encoder_hidden_states=_zeros(1, 512, 4096),
        attention_kwargs=None,
    )


def _hunyuan_video() -> Call:
    """720 x 1280 pixels, 65 frames."""
    return call(
        hidden_states=_zeros(1, 16, 17, 90, 160),
        timestep=_zeros(1),
        encoder_hidden_states=_zeros(1, 256, 4096),
        encoder_attention_mask=torch.ones(1, 256, dtype=torch.int64),
        pooled_projections=_zeros(1, 768),
        guidance=_zeros(1),
        attention_kwargs=None,
    )


_SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
_SD3 = {
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 192,
}


def published() -> dict[str, Published]:
    """Return the full-size models by name; call ``build`` and ``inputs`` on the meta device or under fake tensors."""
    models = (
        Published("FLUX.1-dev", lambda: _full_size("FluxTransformer2DModel", BF16, {"guidance_embeds": True}), _flux),
        Published(
            "SD-1.5",
            lambda: _full_size("UNet2DConditionModel", FP16, {"sample_size": 64, "cross_attention_dim": 768}),
            _sd15,
        ),
        Published("SDXL", lambda: _full_size("UNet2DConditionModel", FP16, _SDXL), _sdxl),
        Published("SD3-medium", lambda: _full_size("SD3Transformer2DModel", BF16, _SD3), _sd3),
        Published("Wan2.1-T2V-14B", lambda: _full_size("WanTransformer3DModel", BF16, {}), _wan),
        Published("HunyuanVideo", lambda: _full_size("HunyuanVideoTransformer3DModel", BF16, {}), _hunyuan_video),
    )
    return {model.name: model for model in models}


def block_28() -> Entry:
    """Return a PixArt model of 28 blocks, 16 heads of 24 (width 384), 68 M parameters, on 256 image tokens."""
    config = {
        "num_attention_heads": 16,
        "attention_head_dim": 24,
        "num_layers": 28,
        "sample_size": 32,
        "cross_attention_dim": 384,
        "caption_channels": 1024,
        "use_additional_conditions": False,
    }

    def inputs(seed: int) -> Call:
        d = Draw(seed)
        return call(
            d(2, 4, 32, 32),
            encoder_hidden_states=d(2, 32, 1024),
            encoder_attention_mask=padding_mask(32, 20, size=32),
            timestep=d.long_t(),
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        )

    def build() -> nn.Module:
        return seeded(lambda: denoiser_class("PixArtTransformer2DModel")(**config))

    return Entry("block-28", "transformer", build, inputs, 0, "timestep")
