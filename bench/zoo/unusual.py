"""Denoisers whose call carries packed sequences, caches, cameras or molecules."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from .entry import Call, Draw, Entry, call, denoiser_class, from_diffusers
from .image_transformers import padding_mask
from .video_transformers import WAN


def _cosmos3(d: Draw) -> Call:
    # one packed sequence, as the pipeline calls it: 6 text tokens and 3 frames of 4 x 4 tokens
    text, frames, tokens = 6, 3, 48
    index = torch.arange(text + tokens)
    image = torch.stack(torch.meshgrid(torch.arange(3), torch.arange(4), torch.arange(4), indexing="ij")).flatten(1)
    return call(
        input_ids=d.ints(32, text),
        text_indexes=index[:text],
        position_ids=torch.cat([index[:text].repeat(3, 1), image + text], dim=1),
        und_len=text,
        sequence_length=text + tokens,
        vision_tokens=[d(1, 4, frames, 8, 8)],
        vision_token_shapes=[(frames, 4, 4)],
        vision_sequence_indexes=index[text:],
        vision_mse_loss_indexes=index[text:],
        vision_timesteps=torch.full((tokens,), float(d.step())),
        vision_noisy_frame_indexes=[torch.arange(frames)],
    )


def _sana_wm(d: Draw) -> Call:
    frames, size = 3, 4
    pose = torch.eye(4).repeat(2, frames, 1, 1)
    pose[..., :3, 3] = 0.1 * d(2, frames, 3)
    lens = torch.tensor([3.0, 3.0, 2.0, 2.0]).repeat(2, frames, 1)
    t = d.float_t()[:, None, None].repeat(1, 1, frames)
    t[..., 0] = 0
    return call(
        d(2, 8, frames, size, size),
        t,
        d(2, 1, 7, 24),
        data_info={"img_hw": torch.tensor([[128.0, 128.0]])},
        mask=padding_mask(7, 5, size=7),
        camera_conditions=torch.cat([pose.flatten(2), lens], dim=-1),
        chunk_plucker=d(2, 12, frames, size, size),
    )


def _sana_wm_refiner(d: Draw) -> Call:
    model: Any = denoiser_class("SanaWMLTX2RefinerTransformer3DModel")(**_REFINER)
    rope = model.build_rotary_emb_for_absolute_positions(2, [0, 1, 2], 4, 4, torch.device("cpu"), 24.0)
    return call(
        hidden_states=d(2, 48, 8),
        encoder_hidden_states=d(2, 7, 24),
        timestep=d.float_t()[:, None].repeat(1, 48),
        video_rotary_emb=rope,
        encoder_attention_mask=padding_mask(7, 5, size=7),
    )


def _protein(d: Draw) -> Call:
    tokens = 10
    return call(
        bb_ca=d(2, tokens, 3),
        local_latents=d(2, tokens, 4),
        bb_ca_time=d.float_t(scale=1e-3),
        local_latents_time=d.float_t(scale=1e-3),
        padding_mask=padding_mask(10, 8, size=tokens, dtype=torch.bool),
        token_type=d.ints(7, 2, tokens),
        conditioning={
            "is_in_context_conditioning": torch.zeros(2, tokens, dtype=torch.bool),
            "supports_local_latent": torch.ones(2, tokens, dtype=torch.bool),
        },
        recycle_depth=2,
    )


def _anyflow_far(d: Draw) -> Call:
    # the second chunk of a video: one frame of keys and values is cached
    frames, tokens, heads, head_dim = 3, 16, 2, 12
    t = d.float_t()[:, None].repeat(1, frames)
    cache = {
        layer: {
            "compressed_cache": torch.zeros(2, 2, heads, 4, head_dim),
            "full_cache": d(2, 2, heads, 2 * tokens, head_dim),
        }
        for layer in range(6)
    }
    return call(
        hidden_states=d(2, frames, 4, 8, 8),
        timestep=t,
        r_timestep=0.8 * t,
        encoder_hidden_states=d(2, 7, 24),
        chunk_partition=[1, 3],
        kv_cache=cache,
        kv_cache_flag={"num_cached_chunks": 1, "is_cache_step": False},
    )


def _wan_animate2(d: Draw) -> Call:
    # the denoising pass: two frames of reference keys and values are cached, per layer
    module = importlib.import_module("diffusers.models.transformers.transformer_wan_animate_2")
    cache = module.WanAnimate2KVCache(6)
    for layer in range(6):
        cache.get(layer).store(d(2, 32, 2, 12), d(2, 32, 2, 12))
    return call(
        hidden_states=[d(4, 3, 8, 8), d(4, 3, 8, 8)],
        timestep=d.float_t(),
        encoder_hidden_states=[d(7, 24), d(5, 24)],
        condition_latents=[d(5, 3, 8, 8), d(5, 3, 8, 8)],
        kv_cache=cache,
        kv_cache_mode="cached",
        seq_len=48,
        encoder_hidden_states_image=d(2, 5, 1280),
        reference_grid_sizes=torch.tensor([[2, 4, 4], [2, 4, 4]]),
        origin_len=5,
        origin_area=[64, 64],
    )


_REFINER = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 8,
    "out_channels": 8,
    "cross_attention_dim": 32,
    "audio_in_channels": 8,
    "audio_out_channels": 8,
    "audio_num_attention_heads": 2,
    "audio_attention_head_dim": 8,
    "audio_cross_attention_dim": 16,
    "num_layers": 5,
    "caption_channels": 24,
}
_FAR = {key: value for key, value in WAN.items() if key != "qk_norm"}

ENTRIES: tuple[Entry, ...] = (
    from_diffusers(
        "Cosmos3OmniTransformer",
        {
            "head_dim": 16,
            "hidden_size": 32,
            "intermediate_size": 48,
            "latent_channel": 4,
            "num_attention_heads": 2,
            "num_hidden_layers": 5,
            "num_key_value_heads": 1,
            "patch_latent_dim": 16,
            "rope_axes_dim": [4, 2, 2],
            "vocab_size": 32,
        },
        _cosmos3,
        latent="vision_tokens",
        timestep="vision_timesteps",
    ),
    from_diffusers(
        "SanaWMTransformer3DModel",
        {
            "in_channels": 8,
            "num_layers": 5,
            "hidden_size": 48,
            "num_attention_heads": 2,
            "softmax_every_n": 3,
            "linear_head_dim": 24,
            "chunk_plucker_channels": 12,
            "image_size": 128,
            "caption_channels": 24,
            "mlp_ratio": 2.0,
        },
        _sana_wm,
        latent=0,
        timestep=1,
    ),
    from_diffusers("SanaWMLTX2RefinerTransformer3DModel", _REFINER, _sana_wm_refiner),
    from_diffusers(
        "RFD4ProteinaTransformer",
        {
            "nlayers": 5,
            "token_dim": 32,
            "nheads": 2,
            "dim_cond": 16,
            "pair_repr_dim": 16,
            "latent_dim": 4,
            "token_type_emb_dim": 8,
            "t_emb_dim": 16,
            "xt_pair_dist_dim": 8,
            "feats_seq": ("xt_bb_ca", "xt_local_latents", "token_type"),
            "feats_cond_seq": ("time_emb_bb_ca", "time_emb_local_latents", "recycle_remaining"),
            "feats_pair_repr": ("xt_bb_ca_pair_dists",),
            "tri_mult_c": 8,
            "num_sequence_classes": 12,
        },
        _protein,
        latent="bb_ca",
        timestep="bb_ca_time",
    ),
    from_diffusers(
        "AnyFlowFARTransformer3DModel",
        {**_FAR, "full_chunk_limit": 3, "chunk_partition": (1, 3)},
        _anyflow_far,
        known_limits="the forward adds keys to kv_cache_flag: a fresh call does not fit the exported signature",
    ),
    from_diffusers(
        "WanAnimate2Transformer3DModel",
        {
            "text_len": 7,
            "in_dim": 9,
            "dim": 24,
            "ffn_dim": 48,
            "freq_dim": 32,
            "text_dim": 24,
            "out_dim": 4,
            "num_heads": 2,
            "num_layers": 6,
        },
        _wan_animate2,
        known_limits="takes a cache object of its own class as an input, which is no pytree node",
    ),
)
