"""Transformers on audio, and denoisers of other things."""

from __future__ import annotations

import torch
from diffusers.models import embeddings

from .entry import Call, Draw, Entry, call, from_diffusers
from .image_transformers import padding_mask


def _stable_audio(d: Draw) -> Call:
    # the sequence is one global token and the latent frames
    rope = embeddings.get_1d_rotary_pos_embed(8, 17, use_real=True, repeat_interleave_real=False)
    return call(
        d(2, 8, 16),
        torch.tensor([d.step() / 1000]),
        encoder_hidden_states=d(2, 7, 24),
        global_hidden_states=d(2, 1, 48),
        rotary_embedding=rope,
    )


def _stable_audio3(d: Draw) -> Call:
    return call(
        d(2, 8, 16),
        d.float_t(scale=1e-3),
        encoder_hidden_states=d(2, 7, 24),
        global_hidden_states=d(2, 20),
        encoder_attention_mask=padding_mask(7, 5, size=7),
        local_add_cond=d(2, 9, 16),
    )


def _ace_step(d: Draw) -> Call:
    t = d.float_t(scale=1e-3)
    return call(
        hidden_states=d(2, 16, 8),
        timestep=t,
        timestep_r=t.clone(),
        encoder_hidden_states=d(2, 7, 24),
        context_latents=d(2, 16, 16),
        attention_kwargs=None,
    )


def _longcat_audio(d: Draw) -> Call:
    return call(
        hidden_states=d(2, 16, 8),
        encoder_hidden_states=d(2, 7, 24),
        encoder_attention_mask=padding_mask(7, 5, size=7, dtype=torch.bool),
        timestep=d.float_t(scale=1e-3),
        attention_mask=padding_mask(16, 14, size=16, dtype=torch.bool),
        latent_cond=d(2, 16, 8),
    )


def _minimax_music(d: Draw) -> Call:
    return call(hidden_states=d(2, 8, 16), timestep=d.float_t(scale=1e-3), encoder_hidden_states=d(2, 16, 24))


def _spectrogram(d: Draw) -> Call:
    encodings = [(d(2, 7, 32), padding_mask(7, 5, size=7)), (d(2, 6, 32), padding_mask(6, 6, size=6))]
    return call(
        encodings_and_masks=encodings, decoder_input_tokens=d(2, 16, 8), decoder_noise_time=d.float_t(scale=1e-3)
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
    from_diffusers(
        "StableAudio3DiTModel",
        {
            "io_channels": 8,
            "embed_dim": 64,
            "depth": 5,
            "num_heads": 2,
            "cond_token_dim": 24,
            "global_cond_dim": 20,
            "local_add_cond_dim": 9,
            "timestep_features_dim": 32,
            "ff_mult": 2.0,
            "num_memory_tokens": 4,
        },
        _stable_audio3,
        latent=0,
        timestep=1,
    ),
    from_diffusers(
        "AceStepTransformer1DModel",
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 6,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 16,
            "in_channels": 24,
            "audio_acoustic_hidden_dim": 8,
            "sliding_window": 3,
            "encoder_hidden_size": 24,
        },
        _ace_step,
    ),
    from_diffusers(
        "LongCatAudioDiTTransformer",
        {
            "dit_dim": 32,
            "dit_depth": 6,
            "dit_heads": 2,
            "dit_text_dim": 24,
            "latent_dim": 8,
            "ff_mult": 2.0,
        },
        _longcat_audio,
    ),
    from_diffusers(
        "MiniMaxMusic3Transformer1DModel",
        {
            "in_channels": 8,
            "condition_dim": 24,
            "num_layers": 6,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "ff_inner_dim": 48,
            "rotary_dim": 8,
            "fourier_embedding_dim": 32,
        },
        _minimax_music,
    ),
    from_diffusers(
        "T5FilmDecoder",
        {
            "input_dims": 8,
            "targets_length": 16,
            "d_model": 32,
            "num_layers": 6,
            "num_heads": 2,
            "d_kv": 16,
            "d_ff": 48,
        },
        _spectrogram,
        latent="decoder_input_tokens",
        timestep="decoder_noise_time",
    ),
)
