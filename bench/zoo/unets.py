"""U-Nets: residual and attention levels joined by skip connections."""

from __future__ import annotations

import torch

from .entry import Call, Draw, Entry, call, from_diffusers


def _step(d: Draw) -> torch.Tensor:
    """A scheduler's timestep, as U-Net pipelines pass it: a zero-dimensional tensor."""
    return torch.tensor(d.step())


def _ddpm(d: Draw) -> Call:
    return call(d(2, 3, 16, 16), _step(d))


def _sd15(d: Draw) -> Call:
    return call(d(2, 4, 16, 16), _step(d), encoder_hidden_states=d(2, 7, 32))


def _sdxl(d: Draw) -> Call:
    time_ids = torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]]).repeat(2, 1)
    added = {"text_embeds": d(2, 16), "time_ids": time_ids}
    return call(d(2, 4, 16, 16), _step(d).float(), encoder_hidden_states=d(2, 7, 32), added_cond_kwargs=added)


def _svd(d: Draw) -> Call:
    added_time_ids = torch.tensor([[6.0, 127.0, 0.02]]).repeat(2, 1)
    latents = d(2, 3, 8, 8, 8)
    # 0.25 log(sigma) of the continuous Euler schedule
    return call(latents, torch.tensor(0.9), encoder_hidden_states=d(2, 1, 32), added_time_ids=added_time_ids)


_ST = "BlockSpatioTemporal"

ENTRIES: tuple[Entry, ...] = (
    from_diffusers(
        "UNet2DModel",
        {
            "sample_size": 16,
            "block_out_channels": (16, 32, 32),
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            "norm_num_groups": 8,
        },
        _ddpm,
        latent=0,
        timestep=1,
        family="unet",
    ),
    from_diffusers(
        "UNet2DConditionModel",
        {
            "sample_size": 16,
            "block_out_channels": (16, 16, 32, 32),
            "norm_num_groups": 8,
            "cross_attention_dim": 32,
            "attention_head_dim": 4,
        },
        _sd15,
        latent=0,
        timestep=1,
        family="unet",
    ),
    from_diffusers(
        "UNet2DConditionModel-sdxl",
        {
            "sample_size": 16,
            "block_out_channels": (16, 32, 64),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 3),
            "attention_head_dim": (2, 4, 8),
            "norm_num_groups": 8,
            "cross_attention_dim": 32,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 16 + 6 * 8,
        },
        _sdxl,
        latent=0,
        timestep=1,
        family="unet",
    ),
    from_diffusers(
        "UNetSpatioTemporalConditionModel",
        {
            "sample_size": 8,
            "block_out_channels": (32, 32, 64),
            "down_block_types": (f"CrossAttnDown{_ST}", f"CrossAttnDown{_ST}", f"Down{_ST}"),
            "up_block_types": (f"Up{_ST}", f"CrossAttnUp{_ST}", f"CrossAttnUp{_ST}"),
            "num_attention_heads": (2, 2, 4),
            "cross_attention_dim": 32,
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 24,
            "num_frames": 3,
        },
        _svd,
        latent=0,
        timestep=1,
        family="unet",
    ),
)
