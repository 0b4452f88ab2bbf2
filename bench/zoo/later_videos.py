"""Later video transformers, each with a layout of its own."""

from __future__ import annotations

import torch

from .entry import Call, Draw, Entry, call, from_diffusers
from .image_transformers import padding_mask
from .video_transformers import COGVIDEOX, HUNYUAN_VIDEO, cogvideox_rope


def _resized(d: Draw) -> Call:
    return call(
        hidden_states=d(2, 3, 4, 8, 12),
        encoder_hidden_states=d(2, 7, 24),
        timestep=d.long_t(),
        image_rotary_emb=None,
        attention_kwargs=None,
    )


def _consis_id(d: Draw) -> Call:
    return call(
        hidden_states=d(2, 3, 4, 8, 8),
        encoder_hidden_states=d(2, 7, 24),
        timestep=d.long_t(),
        image_rotary_emb=cogvideox_rope(),
        attention_kwargs=None,
        id_vit_hidden=[d(2, 3, 16) for _ in range(2)],
        id_cond=d(2, 20),
    )


def _cosmos(d: Draw) -> Call:
    return call(hidden_states=d(2, 4, 3, 8, 8), timestep=d.float_t(), encoder_hidden_states=d(2, 7, 24), fps=30)


def _easy_animate(d: Draw) -> Call:
    return call(d(2, 4, 3, 8, 8), d.float_t(), encoder_hidden_states=d(2, 7, 24))


def _hunyuan_video15(d: Draw) -> Call:
    return call(
        hidden_states=d(2, 9, 3, 4, 4),
        image_embeds=torch.zeros(2, 3, 16),
        timestep=d.float_t(),
        attention_kwargs=None,
        encoder_hidden_states=d(2, 7, 24),
        encoder_attention_mask=padding_mask(7, 5, size=7),
        encoder_hidden_states_2=d(2, 4, 20),
        encoder_attention_mask_2=padding_mask(4, 2, size=4),
    )


def _framepack(d: Draw) -> Call:
    first, far, mid, last, now = torch.arange(11).split([1, 4, 2, 1, 3])
    return call(
        hidden_states=d(2, 4, 3, 8, 8),
        timestep=d.float_t(),
        encoder_hidden_states=d(2, 7, 24),
        encoder_attention_mask=padding_mask(7, 5, size=7),
        pooled_projections=d(2, 20),
        image_embeds=d(2, 3, 16),
        indices_latents=now,
        guidance=torch.full((2,), 6000.0),
        latents_clean=d(2, 4, 2, 8, 8),
        indices_latents_clean=torch.cat([first, last]),
        latents_history_2x=d(2, 4, 2, 8, 8),
        indices_latents_history_2x=mid,
        latents_history_4x=d(2, 4, 4, 8, 8),
        indices_latents_history_4x=far,
        attention_kwargs=None,
    )


def _motif(d: Draw) -> Call:
    return call(
        hidden_states=d(2, 9, 3, 8, 8),
        timestep=d.float_t(),
        attention_kwargs=None,
        encoder_hidden_states=d(2, 7, 24),
        encoder_attention_mask=padding_mask(7, 5, size=7),
    )


_HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}

ENTRIES: tuple[Entry, ...] = (
    from_diffusers(
        "CogVideoXTransformer3DModel-resized",
        COGVIDEOX,
        _resized,
        known_limits="a positional embedding built in the forward under fake tensors ends up as a constant",
    ),
    from_diffusers(
        "ConsisIDTransformer3DModel",
        {
            **COGVIDEOX,
            "num_attention_heads": 3,
            "use_rotary_positional_embeddings": True,
            "is_train_face": True,
            "cross_attn_dim_head": 8,
            "cross_attn_num_heads": 2,
            "LFE_id_dim": 20,
            "LFE_vit_dim": 16,
            "LFE_depth": 4,
            "LFE_dim_head": 8,
            "LFE_num_heads": 2,
            "LFE_num_id_token": 2,
            "LFE_num_querie": 4,
            "LFE_output_dim": 32,
            "LFE_ff_mult": 2,
            "LFE_num_scale": 2,
        },
        _consis_id,
    ),
    from_diffusers(
        "CosmosTransformer3DModel",
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 6,
            "mlp_ratio": 2.0,
            "text_embed_dim": 24,
            "adaln_lora_dim": 8,
            "max_size": (4, 16, 16),
            "concat_padding_mask": False,  # with it, forward wants torchvision
        },
        _cosmos,
    ),
    from_diffusers(
        "EasyAnimateTransformer3DModel",
        {
            **_HEADS,
            "in_channels": 4,
            "out_channels": 4,
            "patch_size": 2,
            "sample_width": 8,
            "sample_height": 8,
            "num_layers": 6,
            "mmdit_layers": 4,
            "time_embed_dim": 32,
            "add_norm_text_encoder": True,
            "text_embed_dim": 24,
        },
        _easy_animate,
        latent=0,
        timestep=1,
    ),
    from_diffusers(
        "HunyuanVideo15Transformer3DModel",
        {
            **_HEADS,
            "in_channels": 9,
            "out_channels": 4,
            "num_layers": 6,
            "num_refiner_layers": 2,
            "mlp_ratio": 2.0,
            "text_embed_dim": 24,
            "text_embed_2_dim": 20,
            "image_embed_dim": 16,
            "rope_axes_dim": (4, 6, 6),
            "target_size": 64,
            "task_type": "t2v",
        },
        _hunyuan_video15,
        known_limits="branches on whether the image embedding is zero, then reorders tokens by their masks",
    ),
    from_diffusers(
        "HunyuanVideoFramepackTransformer3DModel",
        {**HUNYUAN_VIDEO, "has_image_proj": True, "image_proj_dim": 16, "has_clean_x_embedder": True},
        _framepack,
        known_limits="slices a mask at the length of the text, read back from another mask",
    ),
    from_diffusers(
        "MotifVideoTransformer3DModel",
        {
            **_HEADS,
            "in_channels": 9,
            "out_channels": 4,
            "num_layers": 3,
            "num_single_layers": 6,
            "num_decoder_layers": 2,
            "mlp_ratio": 2.0,
            "text_embed_dim": 24,
            "rope_axes_dim": (4, 6, 6),
        },
        _motif,
    ),
)
