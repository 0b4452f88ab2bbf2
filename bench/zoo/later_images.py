"""Later image transformers, each with a layout of its own."""

from __future__ import annotations

import torch

from .entry import Call, Draw, Entry, call, from_diffusers
from .image_transformers import grid_ids, padding_mask

_SIZES = {
    "target_size": torch.full((2, 2), 64.0),
    "crop_coords": torch.zeros(2, 2),
}


def _cogview(d: Draw) -> Call:
    return call(
        hidden_states=d(2, 4, 8, 8),
        encoder_hidden_states=d(2, 7, 24),
        timestep=d.float_t(),
        original_size=torch.full((2, 2), 64.0),
        **{key: value.clone() for key, value in _SIZES.items()},
    )


def _hidream(d: Draw) -> Call:
    return call(
        hidden_states=d(2, 4, 8, 8),
        timesteps=d.float_t(),
        encoder_hidden_states_t5=d(2, 5, 24),
        encoder_hidden_states_llama3=d(3, 2, 5, 20),
        pooled_embeds=d(2, 16),
        attention_kwargs=None,
    )


def _hunyuan_image(d: Draw) -> Call:
    return call(
        hidden_states=d(2, 8, 4, 4),
        timestep=d.float_t(),
        timestep_r=None,
        guidance=None,
        encoder_hidden_states=d(2, 7, 24),
        encoder_attention_mask=padding_mask(7, 5, size=7),
        attention_kwargs=None,
    )


def _hunyuan_image_glyphs(d: Draw) -> Call:
    args, kwargs = _hunyuan_image(d)
    glyphs = {"encoder_hidden_states_2": d(2, 4, 20), "encoder_attention_mask_2": padding_mask(4, 2, size=4)}
    return args, {**kwargs, **glyphs}


def _ideogram4(d: Draw) -> Call:
    text, image = torch.zeros(7, 3), grid_ids(4, 4)
    text[:] = torch.arange(7)[:, None]
    indicator = torch.tensor([3] * 7 + [2] * 16)
    segments = torch.ones(2, 23, dtype=torch.int64)
    segments[1, :2] = -1
    return call(
        hidden_states=torch.cat([torch.zeros(2, 7, 16), d(2, 16, 16)], dim=1),
        timestep=1 - d.float_t(scale=1e-3),
        encoder_hidden_states=torch.cat([d(2, 7, 24), torch.zeros(2, 16, 24)], dim=1),
        position_ids=torch.cat([text, image]).long()[None].repeat(2, 1, 1),
        segment_ids=segments,
        indicator=indicator[None].repeat(2, 1),
        attention_kwargs=None,
    )


def _lumina2(d: Draw) -> Call:
    return call(
        hidden_states=d(2, 4, 8, 8),
        timestep=1 - d.float_t(scale=1e-3),
        encoder_hidden_states=d(2, 7, 24),
        encoder_attention_mask=padding_mask(7, 5, size=7, dtype=torch.bool),
        attention_kwargs=None,
    )


def _nucleus(d: Draw) -> Call:
    return call(
        hidden_states=d(2, 16, 16),
        timestep=d.float_t(scale=1e-3),
        encoder_hidden_states=d(2, 7, 24),
        encoder_hidden_states_mask=padding_mask(7, 5, size=7),
        img_shapes=[(1, 4, 4)] * 2,
        attention_kwargs=None,
    )


def _prx(d: Draw) -> Call:
    return call(
        hidden_states=d(2, 4, 8, 8),
        timestep=d.float_t(scale=1e-3),
        encoder_hidden_states=d(2, 7, 24),
        attention_mask=padding_mask(7, 5, size=7, dtype=torch.bool),
    )


_HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
_COGVIEW = {
    **_HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 6,
    "text_embed_dim": 24,
    "time_embed_dim": 32,
    "condition_dim": 8,
}
_HUNYUAN_IMAGE = {
    **_HEADS,
    "in_channels": 8,
    "out_channels": 8,
    "num_layers": 3,
    "num_single_layers": 4,
    "num_refiner_layers": 2,
    "mlp_ratio": 2.0,
    "text_embed_dim": 24,
    "rope_axes_dim": (8, 8),
}

ENTRIES: tuple[Entry, ...] = (
    from_diffusers("CogView3PlusTransformer2DModel", {**_COGVIEW, "pos_embed_max_size": 8, "sample_size": 8}, _cogview),
    from_diffusers(
        "CogView4Transformer2DModel",
        {**_COGVIEW, "pos_embed_max_size": 8, "sample_size": 8, "rope_axes_dim": (16, 16)},
        _cogview,
    ),
    from_diffusers(
        "HiDreamImageTransformer2DModel",
        {
            **_HEADS,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "num_single_layers": 4,
            "caption_channels": [24, 20],
            "text_emb_dim": 16,
            "num_routed_experts": 4,
            "num_activated_experts": 2,
            "axes_dims_rope": (4, 6, 6),
            "max_resolution": (8, 8),
            "llama_layers": [0, 1, 2, 2, 2, 2],
            "force_inference_output": True,
        },
        _hidream,
        timestep="timesteps",
        known_limits="counts the tokens of each expert with .numpy()",
    ),
    from_diffusers("HunyuanImageTransformer2DModel", _HUNYUAN_IMAGE, _hunyuan_image),
    from_diffusers(
        "HunyuanImageTransformer2DModel-glyphs",
        {**_HUNYUAN_IMAGE, "text_embed_2_dim": 20},
        _hunyuan_image_glyphs,
        known_limits="reorders the tokens of both texts by their masks: sizes that depend on data",
    ),
    from_diffusers(
        "Ideogram4Transformer2DModel",
        {
            **_HEADS,
            "in_channels": 16,
            "num_layers": 6,
            "intermediate_size": 48,
            "adaln_dim": 16,
            "llm_features_dim": 24,
            "mrope_section": (4, 2, 2),
        },
        _ideogram4,
    ),
    from_diffusers(
        "Lumina2Transformer2DModel",
        {
            "sample_size": 8,
            "in_channels": 4,
            "hidden_size": 32,
            "num_layers": 6,
            "num_refiner_layers": 2,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 16,
            "axes_dim_rope": (4, 6, 6),
            "axes_lens": (32, 16, 16),
            "cap_feat_dim": 24,
        },
        _lumina2,
        known_limits="reads the lengths of the texts back from the mask and puts them in a set: SymInt does not hash",
    ),
    from_diffusers(
        "NucleusMoEImageTransformer2DModel",
        {
            **_HEADS,
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 6,
            "num_key_value_heads": 1,
            "joint_attention_dim": 24,
            "axes_dims_rope": (4, 6, 6),
            "mlp_ratio": 2.0,
            "num_experts": 4,
            "moe_intermediate_dim": 24,
            "capacity_factors": 2.0,
        },
        _nucleus,
    ),
    from_diffusers(
        "PRXTransformer2DModel",
        {
            "in_channels": 4,
            "context_in_dim": 24,
            "hidden_size": 32,
            "mlp_ratio": 2.0,
            "num_heads": 2,
            "depth": 6,
            "axes_dim": [8, 8],
        },
        _prx,
    ),
)
