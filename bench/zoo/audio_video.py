"""Video transformers that denoise audio along, and their video-only siblings."""

from __future__ import annotations

import torch

from .entry import Call, Draw, Entry, call, from_diffusers
from .image_transformers import padding_mask


def _kandinsky5(d: Draw) -> Call:
    return call(
        hidden_states=d(2, 3, 8, 8, 4),
        encoder_hidden_states=d(2, 7, 24),
        timestep=d.float_t(),
        pooled_projections=d(2, 20),
        visual_rope_pos=[torch.arange(3), torch.arange(4), torch.arange(4)],
        text_rope_pos=torch.arange(7),
        scale_factor=(1.0, 2.0, 2.0),
        sparse_params=None,
    )


def _kandinsky6(d: Draw) -> Call:
    return call(
        hidden_states=d(2, 3, 8, 8, 9),
        audio_hidden_states=d(2, 5, 6),
        encoder_hidden_states=d(2, 7, 24),
        pooled_projections=d(2, 20),
        timestep=d.float_t(),
        visual_rope_pos=(torch.arange(3), torch.arange(4), torch.arange(4)),
        encoder_attention_mask=None,
        visual_token_type_ids=None,
    )


def _kandinsky6_sr(d: Draw) -> Call:
    return call(hidden_states=d(2, 2, 8, 8, 9), timestep=d.float_t())


def _ltx2(d: Draw) -> Call:
    t = d.float_t()
    return call(
        hidden_states=d(2, 3 * 4 * 4, 8),
        audio_hidden_states=d(2, 6, 8),
        encoder_hidden_states=d(2, 7, 24),
        audio_encoder_hidden_states=d(2, 7, 24),
        timestep=t,
        sigma=t,
        encoder_attention_mask=padding_mask(7, 5, size=7),
        audio_encoder_attention_mask=padding_mask(7, 5, size=7),
        num_frames=3,
        height=4,
        width=4,
        fps=24.0,
        audio_num_frames=6,
        video_coords=None,
        audio_coords=None,
        isolate_modalities=False,
        spatio_temporal_guidance_blocks=None,
        perturbation_mask=None,
        use_cross_timestep=False,
        attention_kwargs=None,
    )


def _minimax_h3(d: Draw) -> Call:
    text, audio, video = 5, 4, 12
    length = text + audio + video
    index = torch.arange(length)
    where = {"text_indices": index[:text], "audio_indices": index[text:-video], "video_indices": index[-video:]}
    tags = torch.tensor([0] * video + [2] * text + [1] * audio).roll(text + audio)
    return call(
        hidden_states=d(2, video, 16),
        audio_hidden_states=d(2, audio, 6),
        encoder_hidden_states=d(2, text, 24),
        timestep=torch.tensor([float(d.step()), 0.0]),
        timestep_indices=torch.tensor([1] * text + [0] * (audio + video)),
        token_tags=tags,
        position_ids=torch.stack([index, index % 4, index % 3], dim=-1),
        attention_kwargs=None,
        **where,
    )


_HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
_KANDINSKY = {
    "in_visual_dim": 4,
    "out_visual_dim": 4,
    "in_text_dim": 24,
    "in_text_dim2": 20,
    "time_dim": 32,
    "model_dim": 32,
    "ff_dim": 48,
    "num_text_blocks": 2,
    "num_visual_blocks": 5,
    "axes_dims": (4, 6, 6),
}

ENTRIES: tuple[Entry, ...] = (
    from_diffusers("Kandinsky5Transformer3DModel", _KANDINSKY, _kandinsky5),
    from_diffusers("Kandinsky6Transformer3DModel", {**_KANDINSKY, "in_audio_dim": 6, "out_audio_dim": 6}, _kandinsky6),
    from_diffusers(
        "Kandinsky6SRTransformer3DModel",
        {
            "in_visual_dim": 4,
            "out_visual_dim": 4,
            "time_dim": 32,
            "model_dim": 32,
            "ff_dim": 48,
            "num_visual_blocks": 5,
            "axes_dims": (4, 6, 6),
            "nabla_window": (3, 3, 3),
        },
        _kandinsky6_sr,
    ),
    from_diffusers(
        "LTX2VideoTransformer3DModel",
        {
            **_HEADS,
            "in_channels": 8,
            "out_channels": 8,
            "cross_attention_dim": 32,
            "audio_in_channels": 8,
            "audio_out_channels": 8,
            "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 8,
            "audio_cross_attention_dim": 16,
            "num_layers": 4,
            "caption_channels": 24,
        },
        _ltx2,
    ),
    from_diffusers(
        "MiniMaxH3Transformer3DModel",
        {
            **_HEADS,
            "hidden_size": 32,
            "num_layers": 5,
            "num_refiner_layers": 2,
            "ffn_dim": 48,
            "in_channels": 4,
            "audio_in_channels": 6,
            "text_dim": 24,
            "freq_dim": 32,
            "time_embed_hidden_dim": 32,
            "time_embed_dim": 16,
            "rope_freq_dim": 2,
        },
        _minimax_h3,
    ),
)
