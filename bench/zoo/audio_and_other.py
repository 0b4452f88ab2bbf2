"""Transformers on audio, and denoisers of other things."""

from __future__ import annotations

import torch
from diffusers.models import embeddings

from .entry import Call, Draw, Entry, call, from_diffusers


def _stable_audio(d: Draw) -> Call:
    # the sequence is one global token and the latent frames
    rope = embeddings.get_1d_rotary_pos_embed(8, 17, use_real=True, repeat_interleave_real=False)
    return call(
        d(2, 8, 16),
        torch.tensor([0.1 * d.step() / 100]),
        encoder_hidden_states=d(2, 7, 24),
        global_hidden_states=d(2, 1, 48),
        rotary_embedding=rope,
    )


ENTRIES: tuple[Entry, ...] = (
    from_diffusers(
        "StableAudioDiTModel",
        {
            "sample_size": 16,
            "in_channels": 8,
            "out_channels": 8,
            "num_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_attention_heads": 2,
            "attention_head_dim": 16,
            "cross_attention_dim": 32,
            "cross_attention_input_dim": 24,
            "time_proj_dim": 32,
            "global_states_input_dim": 48,
        },
        _stable_audio,
        latent=0,
        timestep=1,
    ),
)
