"""Transformers on video latents."""

from __future__ import annotations

import torch
from diffusers.models import embeddings
from torch import Tensor

from .entry import Call, Draw, Entry, call, from_diffusers
from .image_transformers import padding_mask


def _wan(d: Draw) -> Call:
    return call(
        hidden_states=d(2, 4, 3, 8, 8), timestep=d.long_t(), encoder_hidden_states=d(2, 7, 24), attention_kwargs=None
    )


def _ltx(d: Draw) -> Call:
    return call(
        hidden_states=d(2, 3 * 4 * 4, 8),
        encoder_hidden_states=d(2, 7, 24),
        timestep=d.float_t(),
        encoder_attention_mask=padding_mask(7, 5, size=7),
        num_frames=3,
        height=4,
        width=4,
        rope_interpolation_scale=(8 / 25, 32, 32),
        attention_kwargs=None,
    )


def _hunyuan_video(d: Draw) -> Call:
    return call(
        hidden_states=d(2, 4, 3, 8, 8),
        timestep=d.float_t(),
        encoder_hidden_states=d(2, 7, 24),
        encoder_attention_mask=padding_mask(7, 5, size=7),
        pooled_projections=d(2, 20),
        guidance=torch.full((2,), 6000.0),
        attention_kwargs=None,
    )


def cogvideox_rope(frames: int = 3, height: int = 4, width: int = 4, head_dim: int = 16) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines that the CogVideoX pipelines compute once."""
    return embeddings.get_3d_rotary_pos_embed(head_dim, ((0, 0), (height, width)), (height, width), frames)


def _cogvideox(d: Draw) -> Call:
    return call(
        hidden_states=d(2, 3, 4, 8, 8),
        encoder_hidden_states=d(2, 7, 24),
        timestep=d.long_t(),
        image_rotary_emb=None,
        attention_kwargs=None,
    )


def _cogvideox_rope(d: Draw) -> Call:
    args, kwargs = _cogvideox(d)
    return args, {**kwargs, "image_rotary_emb": cogvideox_rope()}


def _mochi(d: Draw) -> Call:
    return call(
        hidden_states=d(2, 4, 3, 8, 8),
        encoder_hidden_states=d(2, 7, 24),
        timestep=d.float_t(),
        encoder_attention_mask=padding_mask(7, 5, size=7, dtype=torch.bool),
        attention_kwargs=None,
    )


def _latte(d: Draw) -> Call:
    return call(
        hidden_states=d(2, 4, 3, 8, 8),
        encoder_hidden_states=d(2, 7, 24),
        timestep=d.long_t(),
        enable_temporal_attentions=True,
    )


def _allegro(d: Draw) -> Call:
    frames, size = 3, 4
    *frequencies, grid_t, grid_h, grid_w = embeddings.get_3d_rotary_pos_embed_allegro(
        24, ((0, 0), (size, size)), (size, size), frames, interpolation_scale=(1.0, 1.0, 1.0)
    )
    positions = torch.cartesian_prod(grid_t.long(), grid_h.long(), grid_w.long()).T.reshape(3, 1, -1).contiguous()
    return call(
        hidden_states=d(2, 4, frames, 2 * size, 2 * size),
        encoder_hidden_states=d(2, 7, 24),
        encoder_attention_mask=padding_mask(7, 5, size=7),
        timestep=d.float_t(),
        image_rotary_emb=(tuple(frequencies), tuple(positions)),
    )


_HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 24,
    "freq_dim": 32,
    "ffn_dim": 48,
    "num_layers": 6,
    "rope_max_seq_len": 32,
}
HUNYUAN_VIDEO = {
    **_HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 3,
    "num_single_layers": 4,
    "num_refiner_layers": 2,
    "mlp_ratio": 2.0,
    "text_embed_dim": 24,
    "pooled_projection_dim": 20,
    "rope_axes_dim": (4, 6, 6),
}
COGVIDEOX = {
    **_HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "time_embed_dim": 32,
    "text_embed_dim": 24,
    "num_layers": 6,
    "sample_width": 8,
    "sample_height": 8,
    "sample_frames": 9,
    "max_text_seq_length": 7,
    "spatial_interpolation_scale": 1.0,
}

ENTRIES: tuple[Entry, ...] = (
    from_diffusers("WanTransformer3DModel", WAN, _wan),
    from_diffusers(
        "LTXVideoTransformer3DModel",
        {
            **_HEADS,
            "in_channels": 8,
            "out_channels": 8,
            "cross_attention_dim": 32,
            "caption_channels": 24,
            "num_layers": 6,
        },
        _ltx,
    ),
    from_diffusers("HunyuanVideoTransformer3DModel", HUNYUAN_VIDEO, _hunyuan_video),
    from_diffusers("CogVideoXTransformer3DModel", COGVIDEOX, _cogvideox),
    from_diffusers(
        "CogVideoXTransformer3DModel-rope", {**COGVIDEOX, "use_rotary_positional_embeddings": True}, _cogvideox_rope
    ),
    from_diffusers(
        "MochiTransformer3DModel",
        {
            **_HEADS,
            "num_layers": 6,
            "pooled_projection_dim": 20,
            "in_channels": 4,
            "text_embed_dim": 24,
            "time_embed_dim": 32,
            "max_sequence_length": 7,
        },
        _mochi,
    ),
    from_diffusers(
        "LatteTransformer3DModel",
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 4,
            "cross_attention_dim": 32,
            "attention_bias": True,
            "sample_size": 8,
            "patch_size": 2,
            "activation_fn": "gelu-approximate",
            "num_embeds_ada_norm": 1000,
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "norm_eps": 1e-6,
            "caption_channels": 24,
            "video_length": 3,
        },
        _latte,
    ),
    from_diffusers(
        "AllegroTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 24,
            "num_layers": 6,
            "cross_attention_dim": 48,
            "sample_height": 8,
            "sample_width": 8,
            "sample_frames": 3,
            "caption_channels": 24,
        },
        _allegro,
    ),
)
