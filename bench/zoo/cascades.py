"""Priors, cascades and the masked-token transformer."""

from __future__ import annotations

import torch

from .entry import Call, Draw, Entry, call, from_diffusers


def _scalar(d: Draw) -> torch.Tensor:
    return torch.tensor(d.step())


def _stable_cascade(d: Draw) -> Call:
    return call(
        sample=d(2, 4, 16, 16),
        timestep_ratio=d.float_t(scale=1e-3),
        clip_text_pooled=d(2, 1, 16),
        clip_text=d(2, 7, 24),
        clip_img=d(2, 1, 20),
    )


def _uvit(d: Draw) -> Call:
    return call(
        d.ints(31, 2, 8, 8),
        micro_conds=torch.tensor([[64.0, 64.0, 0.0, 0.0, 6.0]]).repeat(2, 1),
        pooled_text_emb=d(2, 16),
        encoder_hidden_states=d(2, 7, 24),
        cross_attention_kwargs=None,
    )


def _wuerstchen(d: Draw) -> Call:
    return call(d(2, 4, 16, 16), r=d.float_t(scale=1e-3), effnet=d(2, 8, 4, 4), clip=d(2, 7, 24))


def _wuerstchen_prior(d: Draw) -> Call:
    return call(d(2, 8, 6, 6), r=d.float_t(scale=1e-3), c=d(2, 7, 24))


def _prior(d: Draw) -> Call:
    return call(
        d(2, 24),
        timestep=_scalar(d),
        proj_embedding=d(2, 24),
        encoder_hidden_states=d(2, 7, 24),
        attention_mask=torch.tensor([[True] * 7, [True] * 5 + [False] * 2]),
    )


_CASCADE_BLOCKS = ("SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock")

ENTRIES: tuple[Entry, ...] = (
    from_diffusers(
        "StableCascadeUNet",
        {
            "in_channels": 4,
            "out_channels": 4,
            "timestep_ratio_embedding_dim": 16,
            "conditioning_dim": 32,
            "block_out_channels": (16, 16, 32),
            "num_attention_heads": (2, 2, 4),
            "down_num_layers_per_block": (2, 2, 2),
            "up_num_layers_per_block": (2, 2, 2),
            "down_blocks_repeat_mappers": (1, 1, 1),
            "up_blocks_repeat_mappers": (1, 1, 2),
            "block_types_per_layer": (_CASCADE_BLOCKS,) * 3,
            "clip_text_in_channels": 24,
            "clip_text_pooled_in_channels": 16,
            "clip_image_in_channels": 20,
            "dropout": 0.1,
        },
        _stable_cascade,
        latent="sample",
        timestep="timestep_ratio",
        family="unet",
    ),
    from_diffusers(
        "UVit2DModel",
        {
            "hidden_size": 32,
            "cond_embed_dim": 16,
            "micro_cond_encode_dim": 8,
            "micro_cond_embed_dim": 40,
            "encoder_hidden_size": 24,
            "vocab_size": 32,
            "codebook_size": 31,
            "in_channels": 16,
            "block_out_channels": 16,
            "num_res_blocks": 2,
            "block_num_heads": 2,
            "num_hidden_layers": 5,
            "num_attention_heads": 2,
            "intermediate_size": 48,
            "sample_size": 8,
        },
        _uvit,
        latent=0,
        timestep="",
    ),
    from_diffusers(
        "PriorTransformer",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 6,
            "embedding_dim": 24,
            "num_embeddings": 7,
            "additional_embeddings": 4,
        },
        _prior,
        latent=0,
    ),
    from_diffusers(
        "WuerstchenDiffNeXt",
        {
            "c_r": 16,
            "c_cond": 32,
            "c_hidden": [16, 16, 32],
            "nhead": [-1, 2, 2],
            "blocks": [2, 2, 2],
            "level_config": ["CT", "CTA", "CTA"],
            "inject_effnet": [False, True, True],
            "effnet_embd": 8,
            "clip_embd": 24,
        },
        _wuerstchen,
        latent=0,
        timestep="r",
        family="unet",
    ),
    from_diffusers(
        "WuerstchenPrior",
        {"c_in": 8, "c": 32, "c_cond": 24, "c_r": 16, "depth": 4, "nhead": 2},
        _wuerstchen_prior,
        latent=0,
        timestep="r",
    ),
)
