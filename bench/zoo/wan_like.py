"""Video transformers derived from Wan."""

from __future__ import annotations

import torch

from .entry import Call, Draw, Entry, call, from_diffusers
from .image_transformers import padding_mask
from .video_transformers import WAN


def _wan_image(d: Draw) -> Call:
    return call(
        hidden_states=d(2, 8, 3, 8, 8),
        timestep=d.long_t(),
        encoder_hidden_states=d(2, 7, 24),
        encoder_hidden_states_image=d(2, 5, 20),
        attention_kwargs=None,
    )


def _wan_vace(d: Draw) -> Call:
    return call(
        hidden_states=d(2, 4, 3, 8, 8),
        timestep=d.long_t(),
        encoder_hidden_states=d(2, 7, 24),
        control_hidden_states=d(2, 12, 3, 8, 8),
        control_hidden_states_scale=torch.ones(3),
        attention_kwargs=None,
    )


def _wan_animate(d: Draw) -> Call:
    return call(
        hidden_states=d(2, 12, 3, 8, 8),
        timestep=d.long_t(),
        encoder_hidden_states=d(2, 7, 24),
        encoder_hidden_states_image=d(2, 5, 20),
        pose_hidden_states=d(2, 4, 2, 8, 8),
        face_pixel_values=d(2, 3, 5, 16, 16),
        motion_encode_batch_size=8,
        attention_kwargs=None,
    )


def _chrono_edit(d: Draw) -> Call:
    args, kwargs = _wan_image(d)
    return args, {**kwargs, "hidden_states": d(2, 8, 2, 8, 8)}


def _skyreels(d: Draw) -> Call:
    return call(
        hidden_states=d(2, 4, 3, 8, 8), timestep=d.long_t(), encoder_hidden_states=d(2, 7, 24), attention_kwargs=None
    )


def _skyreels_forcing(d: Draw) -> Call:
    return call(
        hidden_states=d(2, 4, 3, 8, 8),
        timestep=d.long_t()[:, None].repeat(1, 3),
        encoder_hidden_states=d(2, 7, 24),
        enable_diffusion_forcing=True,
        attention_kwargs=None,
    )


def _anyflow(d: Draw) -> Call:
    t = d.float_t()[:, None].repeat(1, 3)
    return call(
        hidden_states=d(2, 3, 4, 8, 8),
        timestep=t,
        r_timestep=0.8 * t,
        encoder_hidden_states=d(2, 7, 24),
        attention_kwargs=None,
    )


def _helios(d: Draw) -> Call:
    frames = torch.arange(3 + 2 + 4 + 4)[None].repeat(2, 1)
    far, mid, short, now = frames.split([4, 4, 2, 3], dim=1)
    return call(
        hidden_states=d(2, 4, 3, 8, 8),
        timestep=d.long_t(),
        encoder_hidden_states=d(2, 7, 24),
        indices_hidden_states=now,
        indices_latents_history_short=short,
        indices_latents_history_mid=mid,
        indices_latents_history_long=far,
        latents_history_short=d(2, 4, 2, 8, 8),
        latents_history_mid=d(2, 4, 4, 8, 8),
        latents_history_long=d(2, 4, 4, 8, 8),
        attention_kwargs=None,
    )


def _sana_video(d: Draw) -> Call:
    return call(
        d(2, 4, 3, 8, 8),
        encoder_hidden_states=d(2, 7, 24),
        encoder_attention_mask=padding_mask(7, 5, size=7),
        timestep=d.float_t(),
        attention_kwargs=None,
    )


_IMAGE = {**WAN, "in_channels": 8, "image_dim": 20, "added_kv_proj_dim": 24}
_PLAIN = {key: value for key, value in WAN.items() if key != "qk_norm"}

ENTRIES: tuple[Entry, ...] = (
    from_diffusers("WanTransformer3DModel-i2v", _IMAGE, _wan_image),
    from_diffusers("WanVACETransformer3DModel", {**WAN, "vace_layers": [0, 2, 4], "vace_in_channels": 12}, _wan_vace),
    from_diffusers(
        "WanAnimateTransformer3DModel",
        {
            **_IMAGE,
            "in_channels": 12,
            "latent_channels": 4,
            "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8},
            "motion_encoder_size": 16,
            "motion_style_dim": 16,
            "motion_dim": 4,
            "motion_encoder_dim": 16,
            "face_encoder_hidden_dim": 16,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 2,
        },
        _wan_animate,
    ),
    from_diffusers("ChronoEditTransformer3DModel", _IMAGE, _chrono_edit),
    from_diffusers("SkyReelsV2Transformer3DModel", WAN, _skyreels),
    # with inject_sample_info this class takes a batch of one only
    from_diffusers("SkyReelsV2Transformer3DModel-forcing", WAN, _skyreels_forcing),
    from_diffusers("AnyFlowTransformer3DModel", _PLAIN, _anyflow),
    from_diffusers(
        "HeliosTransformer3DModel",
        {**{key: value for key, value in WAN.items() if key != "rope_max_seq_len"}, "rope_dim": (4, 4, 4)},
        _helios,
    ),
    from_diffusers(
        "SanaVideoTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 6,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 12,
            "cross_attention_dim": 24,
            "caption_channels": 24,
            "sample_size": 8,
            "rope_max_seq_len": 32,
        },
        _sana_video,
        latent=0,
    ),
)
