"""Image transformers on packed tokens: the descendants of Flux, and the single-stream models that followed."""

from __future__ import annotations

from typing import Any

import torch

from .entry import Call, Draw, Entry, call, from_diffusers
from .image_transformers import FLUX, grid_ids, padding_mask


def _packed(d: Draw, scale: float = 1e-3, **more: Any) -> Call:
    return call(
        hidden_states=d(2, 16, 16),
        timestep=d.float_t(scale=scale),
        encoder_hidden_states=d(2, 7, 24),
        txt_ids=torch.zeros(7, 3),
        img_ids=grid_ids(4, 4),
        **more,
    )


def _bria(d: Draw) -> Call:
    return _packed(d, 1.0, attention_kwargs=None)


def _bria_fibo(d: Draw) -> Call:
    mask = padding_mask(23, 21, size=23).float()
    bias = torch.where(mask[:, None, :] * mask[:, :, None] > 0, 0.0, -1e4)[:, None]
    layers = [d(2, 7, 20) for _ in range(7)]
    return _packed(d, 1.0, text_encoder_layers=layers, joint_attention_kwargs={"attention_mask": bias})


def _bria_fibo2(d: Draw) -> Call:
    return call(
        hidden_states=d(2, 4, 8, 8),
        timestep=1 - d.float_t(scale=1e-3),
        encoder_hidden_states=d(2, 3, 9, 24),
        encoder_attention_mask=padding_mask(9, 6, size=9, dtype=torch.bool),
        context_latents=None,
    )


def _krea2(d: Draw) -> Call:
    positions = torch.cat([torch.zeros(7, 3), grid_ids(4, 4)])
    return call(
        hidden_states=d(2, 16, 16),
        encoder_hidden_states=d(2, 7, 3, 24),
        timestep=d.float_t(scale=1e-3),
        position_ids=positions,
        encoder_attention_mask=padding_mask(7, 5, size=7, dtype=torch.bool),
        attention_kwargs=None,
    )


def _flux3(d: Draw) -> Call:
    image = torch.nn.functional.pad(grid_ids(4, 4), (0, 1))
    text = torch.zeros(7, 4)
    text[:, 3] = torch.arange(7)
    reference = image.clone()
    reference[:, 0] = 10
    return call(
        hidden_states=d(2, 16, 16),
        encoder_hidden_states=d(2, 7, 24),
        timestep=d.float_t(scale=1e-3),
        img_ids=image,
        txt_ids=text,
        image_cond_hidden_states=d(2, 16, 12),
        image_cond_ids=reference,
        attention_kwargs=None,
    )


def _ernie(d: Draw) -> Call:
    return call(hidden_states=d(2, 8, 4, 4), timestep=d.float_t(), text_bth=d(2, 7, 24), text_lens=torch.tensor([7, 5]))


def _flux2(d: Draw) -> Call:
    image_ids = torch.nn.functional.pad(grid_ids(4, 4), (0, 1))[None].repeat(2, 1, 1)
    text_ids = torch.zeros(2, 7, 4)
    text_ids[..., 3] = torch.arange(7)
    return call(
        hidden_states=d(2, 16, 16),
        timestep=d.float_t(scale=1e-3),
        guidance=torch.full((2,), 4.0),
        encoder_hidden_states=d(2, 7, 24),
        txt_ids=text_ids,
        img_ids=image_ids,
        joint_attention_kwargs=None,
    )


def _z_image(d: Draw) -> Call:
    latents = list(d(2, 4, 1, 8, 8).unbind(0))
    return call(latents, 1 - d.float_t(scale=1e-3), [d(9, 24), d(5, 24)])


def _qwen_image(d: Draw) -> Call:
    return call(
        hidden_states=d(2, 16, 16),
        timestep=d.float_t(scale=1e-3),
        guidance=None,
        encoder_hidden_states_mask=padding_mask(7, 5, size=7),
        encoder_hidden_states=d(2, 7, 24),
        img_shapes=[[(1, 4, 4)]] * 2,
        attention_kwargs={},
    )


def _chroma(d: Draw) -> Call:
    return call(
        hidden_states=d(2, 16, 16),
        timestep=d.float_t(scale=1e-3),
        encoder_hidden_states=d(2, 7, 24),
        txt_ids=torch.zeros(7, 3),
        img_ids=grid_ids(4, 4),
        attention_mask=padding_mask(23, 23, size=23, dtype=torch.bool),
        joint_attention_kwargs=None,
    )


_ROPE = {"axes_dims_rope": (4, 6, 6)}


ENTRIES: tuple[Entry, ...] = (
    from_diffusers("BriaTransformer2DModel", {**FLUX, "axes_dims_rope": [4, 6, 6]}, _bria),
    from_diffusers(
        "BriaFiboTransformer2DModel", {**FLUX, "axes_dims_rope": [4, 6, 6], "text_encoder_dim": 20}, _bria_fibo
    ),
    from_diffusers(
        "BriaFibo2Transformer2DModel",
        {
            "in_channels": 4,
            "dim": 32,
            "n_layers": 6,
            "n_refiner_layers": 2,
            "n_heads": 2,
            "cap_feat_dim": 24,
            "injection_layer_ids": (1, 4),
            "perceiver_num_layers": 2,
            "min_num_gist_tokens": 4,
            "max_num_gist_tokens": 8,
            "gist_step": 2,
            "gist_min_text_len": 4,
            "gist_max_text_len": 16,
            "axes_dims": (4, 6, 6),
            "axes_lens": (64, 16, 16),
        },
        _bria_fibo2,
        known_limits="reads the length of the text back from its mask (.tolist()) and sizes a tensor with it",
    ),
    from_diffusers(
        "LongCatImageTransformer2DModel",
        {**FLUX, **_ROPE, "pooled_projection_dim": 24},
        lambda d: _packed(d, guidance=None),
    ),
    from_diffusers(
        "OvisImageTransformer2DModel",
        {**FLUX, **_ROPE, "out_channels": 16},
        lambda d: _packed(d, joint_attention_kwargs=None),
    ),
    from_diffusers(
        "Krea2Transformer2DModel",
        {
            "in_channels": 16,
            "num_layers": 6,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "intermediate_size": 48,
            "timestep_embed_dim": 32,
            "text_hidden_dim": 24,
            "num_text_layers": 3,
            "text_num_attention_heads": 2,
            "text_num_key_value_heads": 2,
            "text_intermediate_size": 32,
            "num_layerwise_text_blocks": 2,
            "num_refiner_text_blocks": 2,
            "axes_dims_rope": (4, 6, 6),
        },
        _krea2,
    ),
    from_diffusers(
        "Flux3Transformer2DModel",
        {**FLUX, "cond_in_channels": 12, "timestep_channels": 32, "axes_dims_rope": (4, 4, 4, 4)},
        _flux3,
    ),
    from_diffusers(
        "ErnieImageTransformer2DModel",
        {
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_layers": 6,
            "ffn_hidden_size": 48,
            "in_channels": 8,
            "out_channels": 8,
            "text_in_dim": 24,
            "rope_axes_dim": (4, 6, 6),
        },
        _ernie,
    ),
    from_diffusers(
        "Flux2Transformer2DModel",
        {**FLUX, "timestep_guidance_channels": 32, "axes_dims_rope": (4, 4, 4, 4)},
        _flux2,
    ),
    from_diffusers(
        "ZImageTransformer2DModel",
        {
            "in_channels": 4,
            "dim": 32,
            "n_layers": 6,
            "n_refiner_layers": 2,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 24,
            "axes_dims": [4, 6, 6],
            "axes_lens": [128, 32, 32],
        },
        _z_image,
        latent=0,
        timestep=1,
    ),
    from_diffusers(
        "QwenImageTransformer2DModel",
        {
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 6,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "joint_attention_dim": 24,
            "axes_dims_rope": (4, 6, 6),
        },
        _qwen_image,
    ),
    from_diffusers(
        "ChromaTransformer2DModel",
        {
            **FLUX,
            "axes_dims_rope": (4, 6, 6),
            "approximator_num_channels": 16,
            "approximator_hidden_dim": 32,
            "approximator_layers": 2,
        },
        _chroma,
    ),
)
