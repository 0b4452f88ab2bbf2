"""Image transformers that put text and reference images into one sequence."""

from __future__ import annotations

import torch

from .entry import Call, Draw, Entry, call, from_diffusers
from .image_transformers import padding_mask


def _glm_image(d: Draw) -> Call:
    return call(
        hidden_states=d(2, 4, 8, 8),
        encoder_hidden_states=d(2, 7, 24),
        prior_token_id=d.ints(32, 2, 16),
        prior_token_drop=torch.tensor([[False], [True]]).repeat(1, 16),
        timestep=d.float_t() - 1,
        **{key: value.clone() for key, value in _SIZES.items()},
        attention_kwargs=None,
    )


def _joy_image(d: Draw) -> Call:
    return call(hidden_states=d(2, 2, 4, 1, 8, 8), timestep=d.float_t(), encoder_hidden_states=d(2, 7, 24))


def _joy_image_plus(d: Draw) -> Call:
    return call(
        hidden_states=d(2, 20, 4, 1, 2, 2),
        timestep=d.float_t(),
        encoder_hidden_states=d(2, 7, 24),
        encoder_hidden_states_mask=padding_mask(7, 5, size=7),
        shape_list=[[(1, 4, 4), (1, 2, 2)], [(1, 4, 4)]],
    )


def _omnigen(d: Draw) -> Call:
    text, image = 6, 16
    length = text + 1 + image
    mask = torch.ones(length, length).tril()
    mask[-image - 1 :, -image - 1 :] = 1
    return call(
        hidden_states=d(2, 4, 8, 8),
        timestep=1 - d.float_t(scale=1e-3),
        input_ids=d.ints(32, 2, text),
        input_img_latents=[],
        input_image_sizes={},
        attention_mask=mask[None].repeat(2, 1, 1),
        position_ids=torch.arange(length)[None].repeat(2, 1),
    )


def _qwen_image21(d: Draw) -> Call:
    # 16 target tokens stand in 4 slots of the text model's sequence
    return call(
        hidden_states=d(2, 16, 16),
        timestep=d.float_t(scale=1e-3),
        encoder_hidden_states=d(2, 7, 24),
        encoder_hidden_states_mask=padding_mask(7, 5, size=7),
        img_shapes=[[(1, 4, 4)]] * 2,
        img_mask=torch.tensor([[False] * 7 + [True] * 4]).repeat(2, 1),
        attention_kwargs=None,
    )


_SIZES = {
    "target_size": torch.full((2, 2), 64.0),
    "crop_coords": torch.zeros(2, 2),
}
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
_JOY = {
    "in_channels": 4,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "text_dim": 24,
    "num_layers": 6,
    "mlp_width_ratio": 2.0,
    "rope_dim_list": [4, 6, 6],
}

ENTRIES: tuple[Entry, ...] = (
    from_diffusers("GlmImageTransformer2DModel", {**_COGVIEW, "prior_vq_quantizer_codebook_size": 32}, _glm_image),
    from_diffusers("JoyImageEditTransformer3DModel", _JOY, _joy_image),
    from_diffusers("JoyImageEditPlusTransformer3DModel", _JOY, _joy_image_plus),
    from_diffusers(
        "OmniGenTransformer2DModel",
        {
            "in_channels": 4,
            "hidden_size": 32,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "intermediate_size": 48,
            "num_layers": 6,
            "pad_token_id": 0,
            "vocab_size": 32,
            "rope_scaling": {"short_factor": [1.0] * 8, "long_factor": [1.5] * 8},
            "pos_embed_max_size": 8,
            "time_step_dim": 32,
        },
        _omnigen,
        known_limits="the rotary embedding branches on the largest position id",
    ),
    from_diffusers(
        "QwenImage21Transformer2DModel",
        {
            **_HEADS,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 6,
            "context_in_dim": 24,
            "axes_dims_rope": (4, 6, 6),
        },
        _qwen_image21,
        known_limits="finds the places of text and image tokens from a mask: sizes that depend on data",
    ),
)
