"""Other U-Nets, on images, video and vectors, and the U-shaped transformers."""

from __future__ import annotations

import torch

from .entry import Call, Draw, Entry, call, denoiser_class, from_diffusers, seeded


def _scalar(d: Draw) -> torch.Tensor:
    return torch.tensor(d.step())


def _audio(d: Draw) -> Call:
    return call(d(2, 2, 64), torch.tensor(d.step() / 1000))


def _video(d: Draw) -> Call:
    return call(d(2, 4, 3, 8, 8), _scalar(d), encoder_hidden_states=d(2, 7, 32), cross_attention_kwargs=None)


def _i2vgen(d: Draw) -> Call:
    return call(
        d(2, 4, 3, 8, 8),
        _scalar(d),
        encoder_hidden_states=d(2, 7, 32),
        fps=torch.tensor([16, 16]),
        image_latents=d(2, 4, 3, 8, 8),
        image_embeddings=d(2, 32),
        cross_attention_kwargs=None,
    )


def _motion(d: Draw) -> Call:
    text = d(2, 7, 32).repeat_interleave(3, dim=0)  # once per frame
    return call(d(2, 4, 3, 8, 8), _scalar(d), encoder_hidden_states=text, added_cond_kwargs=None)


def _kandinsky2(d: Draw) -> Call:
    return call(
        sample=d(2, 4, 8, 8),
        timestep=_scalar(d),
        encoder_hidden_states=None,
        added_cond_kwargs={"image_embeds": d(2, 20)},
    )


def _kandinsky3(d: Draw) -> Call:
    mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
    return call(d(2, 4, 16, 16), _scalar(d), encoder_hidden_states=d(2, 7, 24), encoder_attention_mask=mask)


def _dream_lite(d: Draw) -> Call:
    mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
    return call(
        d(2, 4, 8, 16),
        timestep=d.float_t(),
        encoder_hidden_states=d(2, 7, 32),
        encoder_attention_mask=mask,
        added_cond_kwargs={"time_ids": torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]]).repeat(2, 1)},
    )


def _controlled(d: Draw) -> Call:
    return call(
        sample=d(2, 4, 8, 8),
        timestep=_scalar(d),
        encoder_hidden_states=d(2, 7, 32),
        controlnet_cond=d(2, 3, 64, 64),
        conditioning_scale=1.0,
        cross_attention_kwargs=None,
        apply_control=True,
    )


def _audio_ldm2(d: Draw) -> Call:
    return call(
        d(2, 4, 16, 8),
        _scalar(d),
        encoder_hidden_states=d(2, 6, 24),
        encoder_hidden_states_1=d(2, 7, 32),
        encoder_attention_mask_1=torch.tensor([[1] * 7, [1] * 5 + [0] * 2]),
    )


def _levels(down: str, up: str, kind: str) -> dict[str, tuple[str, ...]]:
    """Three levels, the lowest without cross-attention, of blocks whose names end in ``kind``."""
    return {
        "down_block_types": (f"CrossAttn{down}{kind}", f"CrossAttn{down}{kind}", f"{down}{kind}"),
        "up_block_types": (f"{up}{kind}", f"CrossAttn{up}{kind}", f"CrossAttn{up}{kind}"),
    }


_VIDEO = {
    **_levels("DownBlock", "UpBlock", "3D"),
    "sample_size": 8,
    "block_out_channels": (16, 16, 32),
    "norm_num_groups": 8,
    "cross_attention_dim": 32,
    "attention_head_dim": 8,
}
_XS = {
    **_levels("DownBlock", "UpBlock", "2D"),
    "sample_size": 8,
    "block_out_channels": (16, 16, 32),
    "norm_num_groups": 8,
    "cross_attention_dim": 32,
    "num_attention_heads": 2,
    "ctrl_conditioning_embedding_out_channels": (4, 8, 8, 8),
    "ctrl_block_out_channels": (8, 8, 16),
    "ctrl_num_attention_heads": 2,
    "ctrl_max_norm_num_groups": 4,
    "ctrl_learn_time_embedding": True,
}

ENTRIES: tuple[Entry, ...] = (
    from_diffusers(
        "UNet1DModel",
        {
            "sample_size": 64,
            "extra_in_channels": 64,
            "block_out_channels": (32, 32, 64, 64),
            "down_block_types": ("DownBlock1DNoSkip", "DownBlock1D", "AttnDownBlock1D", "AttnDownBlock1D"),
            "up_block_types": ("AttnUpBlock1D", "AttnUpBlock1D", "UpBlock1D", "UpBlock1DNoSkip"),
            "flip_sin_to_cos": True,
            "layers_per_block": 2,
        },
        _audio,
        latent=0,
        timestep=1,
        family="unet",
    ),
    from_diffusers("UNet3DConditionModel", _VIDEO, _video, latent=0, timestep=1, family="unet"),
    from_diffusers("I2VGenXLUNet", {**_VIDEO, "num_attention_heads": 2}, _i2vgen, latent=0, timestep=1, family="unet"),
    from_diffusers(
        "UNetMotionModel",
        {
            "sample_size": 8,
            "block_out_channels": (16, 16, 32),
            **_levels("DownBlock", "UpBlock", "Motion"),
            "norm_num_groups": 8,
            "cross_attention_dim": 32,
            "num_attention_heads": 2,
            "motion_num_attention_heads": 2,
        },
        _motion,
        latent=0,
        timestep=1,
        family="unet",
    ),
    from_diffusers(
        "UNet2DConditionModel-kandinsky2",
        {
            "sample_size": 8,
            "out_channels": 8,
            "block_out_channels": (16, 32, 32),
            "down_block_types": ("ResnetDownsampleBlock2D", *["SimpleCrossAttnDownBlock2D"] * 2),
            "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
            "up_block_types": (*["SimpleCrossAttnUpBlock2D"] * 2, "ResnetUpsampleBlock2D"),
            "norm_num_groups": 8,
            "cross_attention_dim": 24,
            "attention_head_dim": 8,
            "resnet_time_scale_shift": "scale_shift",
            "addition_embed_type": "image",
            "encoder_hid_dim": 20,
            "encoder_hid_dim_type": "image_proj",
        },
        _kandinsky2,
        latent="sample",
        family="unet",
    ),
    from_diffusers(
        "Kandinsky3UNet",
        {
            "time_embedding_dim": 16,
            "groups": 4,
            "attention_head_dim": 4,
            "layers_per_block": 2,
            "block_out_channels": (16, 16, 32, 32),
            "cross_attention_dim": 16,
            "encoder_hid_dim": 24,
        },
        _kandinsky3,
        latent=0,
        timestep=1,
        family="unet",
    ),
    from_diffusers(
        "DreamLiteUNetModel",
        {
            "sample_size": 8,
            "block_out_channels": (16, 16, 32),
            "norm_num_groups": 8,
            "cross_attention_dim": 32,
            "attention_head_dim": 8,
            "use_linear_projection": True,
        },
        _dream_lite,
        latent=0,
        family="unet",
    ),
    from_diffusers("UNetControlNetXSModel", _XS, _controlled, latent="sample", family="unet"),
    Entry(
        "AudioLDM2UNet2DConditionModel",
        "unet",
        lambda: seeded(
            lambda: denoiser_class("AudioLDM2UNet2DConditionModel")(
                sample_size=16,
                block_out_channels=(16, 16, 32),
                **_levels("DownBlock", "UpBlock", "2D"),
                norm_num_groups=8,
                cross_attention_dim=((None, 24, 32),) * 3,
                attention_head_dim=4,
            )
        ),
        lambda seed: _audio_ldm2(Draw(seed)),
        0,
        1,
    ),
)
