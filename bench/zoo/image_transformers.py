"""Transformers on images, as the first release pipelines of each family call them."""

from __future__ import annotations

import torch
from diffusers.models import embeddings
from torch import Tensor

from .entry import Call, Draw, Entry, call, from_diffusers


def grid_ids(height: int, width: int) -> Tensor:
    """Return the [height * width, 3] position ids of packed image tokens."""
    ids = torch.zeros(height, width, 3)
    ids[..., 1] += torch.arange(height)[:, None]
    ids[..., 2] += torch.arange(width)[None]
    return ids.reshape(-1, 3)


def padding_mask(*lengths: int, size: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """Return a [batch, size] mask of ones over the first ``lengths`` tokens."""
    return (torch.arange(size)[None] < torch.tensor(lengths)[:, None]).to(dtype)


def _dit(d: Draw) -> Call:
    return call(d(2, 4, 8, 8), timestep=d.long_t(), class_labels=torch.tensor([3, 10]))


def _pixart(d: Draw) -> Call:
    added = {"resolution": torch.full((2, 2), 64.0), "aspect_ratio": torch.ones(2, 1)}
    return call(
        d(2, 4, 8, 8),
        encoder_hidden_states=d(2, 7, 24),
        encoder_attention_mask=padding_mask(7, 5, size=7),
        timestep=d.long_t(),
        added_cond_kwargs=added,
    )


def _sd3(d: Draw) -> Call:
    return call(
        hidden_states=d(2, 4, 8, 8),
        timestep=d.float_t(),
        encoder_hidden_states=d(2, 7, 24),
        pooled_projections=d(2, 20),
        joint_attention_kwargs=None,
    )


def _flux(d: Draw) -> Call:
    return call(
        hidden_states=d(2, 16, 16),
        timestep=d.float_t(scale=1e-3),
        guidance=torch.full((2,), 3.5),
        pooled_projections=d(2, 20),
        encoder_hidden_states=d(2, 7, 24),
        txt_ids=torch.zeros(7, 3),
        img_ids=grid_ids(4, 4),
        joint_attention_kwargs=None,
    )


def _auraflow(d: Draw) -> Call:
    return call(d(2, 4, 8, 8), encoder_hidden_states=d(2, 7, 24), timestep=d.float_t(scale=1e-3), attention_kwargs=None)


def _hunyuan_dit(d: Draw) -> Call:
    rope = embeddings.get_2d_rotary_pos_embed(8, ((0, 0), (4, 4)), (4, 4), output_type="pt")
    return call(
        d(2, 4, 8, 8),
        d.float_t(),
        encoder_hidden_states=d(2, 5, 24),
        text_embedding_mask=padding_mask(5, 3, size=5),
        encoder_hidden_states_t5=d(2, 6, 16),
        text_embedding_mask_t5=padding_mask(4, 6, size=6),
        image_meta_size=torch.tensor([[64.0, 64.0, 64.0, 64.0, 0.0, 0.0]]).repeat(2, 1),
        style=torch.tensor([0, 0]),
        image_rotary_emb=rope,
    )


def _sana(d: Draw) -> Call:
    return call(
        d(2, 8, 8, 8),
        encoder_hidden_states=d(2, 7, 24),
        encoder_attention_mask=padding_mask(7, 4, size=7),
        timestep=d.float_t(),
        attention_kwargs=None,
    )


def _lumina_next(d: Draw) -> Call:
    return call(
        hidden_states=d(2, 4, 8, 8),
        timestep=1 - d.float_t(scale=1e-3),
        encoder_hidden_states=d(2, 7, 24),
        encoder_mask=padding_mask(7, 5, size=7),
        image_rotary_emb=embeddings.get_2d_rotary_pos_embed_lumina(8, 8, 8, linear_factor=1.0, ntk_factor=1.0),
        cross_attention_kwargs={},
    )


_HEADS = {"num_attention_heads": 4, "attention_head_dim": 8}
_SD3 = {
    **_HEADS,
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 6,
    "joint_attention_dim": 24,
    "caption_projection_dim": 32,
    "pooled_projection_dim": 20,
    "pos_embed_max_size": 8,
}
FLUX = {
    "in_channels": 16,
    "num_layers": 3,
    "num_single_layers": 4,
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "joint_attention_dim": 24,
}

ENTRIES: tuple[Entry, ...] = (
    from_diffusers(
        "DiTTransformer2DModel",
        {
            **_HEADS,
            "num_layers": 6,
            "sample_size": 8,
            "out_channels": 8,
            "num_embeds_ada_norm": 11,
            "norm_num_groups": 8,
        },
        _dit,
        latent=0,
    ),
    from_diffusers(
        "PixArtTransformer2DModel",
        {
            "num_attention_heads": 4,
            "attention_head_dim": 12,
            "num_layers": 6,
            "sample_size": 8,
            "cross_attention_dim": 48,
            "caption_channels": 24,
            "use_additional_conditions": True,
        },
        _pixart,
        latent=0,
    ),
    from_diffusers("SD3Transformer2DModel", _SD3, _sd3),
    from_diffusers(
        "SD3Transformer2DModel-3.5", {**_SD3, "dual_attention_layers": (0, 1, 2), "qk_norm": "rms_norm"}, _sd3
    ),
    from_diffusers(
        "FluxTransformer2DModel",
        {**FLUX, "pooled_projection_dim": 20, "guidance_embeds": True, "axes_dims_rope": (4, 6, 6)},
        _flux,
    ),
    from_diffusers(
        "AuraFlowTransformer2DModel",
        {
            **_HEADS,
            "sample_size": 8,
            "num_mmdit_layers": 3,
            "num_single_dit_layers": 4,
            "joint_attention_dim": 24,
            "caption_projection_dim": 32,
            "pos_embed_max_size": 16,
        },
        _auraflow,
        latent=0,
    ),
    from_diffusers(
        "HunyuanDiT2DModel",
        {
            **_HEADS,
            "in_channels": 4,
            "patch_size": 2,
            "sample_size": 8,
            "hidden_size": 32,
            "num_layers": 8,
            "mlp_ratio": 2.0,
            "cross_attention_dim": 24,
            "cross_attention_dim_t5": 16,
            "pooled_projection_dim": 16,
            "text_len": 5,
            "text_len_t5": 6,
        },
        _hunyuan_dit,
        latent=0,
        timestep=1,
    ),
    from_diffusers(
        "SanaTransformer2DModel",
        {
            **_HEADS,
            "in_channels": 8,
            "out_channels": 8,
            "num_layers": 6,
            "num_cross_attention_heads": 4,
            "cross_attention_head_dim": 8,
            "cross_attention_dim": 32,
            "caption_channels": 24,
            "sample_size": 8,
        },
        _sana,
        latent=0,
    ),
    from_diffusers(
        "LuminaNextDiT2DModel",
        {
            "sample_size": 8,
            "hidden_size": 32,
            "num_layers": 6,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "multiple_of": 16,
            "cross_attention_dim": 24,
        },
        _lumina_next,
    ),
)
