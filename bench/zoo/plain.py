"""Denoisers written directly in PyTorch, which diffusers has never seen."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .entry import Call, Draw, Entry, call, seeded


class TimeEmbedding(nn.Module):
    """Sinusoids of the timestep followed by a small MLP."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.waves = dim // 2
        self.mlp = nn.Sequential(nn.Linear(2 * self.waves, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        """Embed timesteps of shape [batch]."""
        rates = torch.exp(-math.log(10000.0) * torch.arange(self.waves, device=t.device) / self.waves)
        angles = t[:, None].float() * rates
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


class EncoderDenoiser(nn.Module):
    """Patches of an image through stock encoder layers, the timestep as one more token."""

    def __init__(self, dim: int = 48, heads: int = 3, depth: int = 6, channels: int = 3) -> None:
        super().__init__()
        self.patchify = nn.Conv2d(channels, dim, kernel_size=2, stride=2)
        self.position = nn.Parameter(torch.zeros(1, 65, dim))
        self.time = TimeEmbedding(dim)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(dim, heads, 2 * dim, 0.0, F.gelu, batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 4 * channels)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Predict the noise of images of shape [batch, 3, 16, 16]."""
        tokens = self.patchify(x)
        height, width = tokens.shape[-2:]
        tokens = torch.cat([self.time(t)[:, None], tokens.flatten(2).transpose(1, 2)], dim=1) + self.position
        for layer in self.layers:
            tokens = layer(tokens)
        tokens = self.head(self.norm(tokens[:, 1:]))
        return F.pixel_shuffle(tokens.transpose(1, 2).reshape(x.shape[0], -1, height, width), 2)


class ResidualMlp(nn.Module):
    """A residual MLP on vectors with a shift from the timestep in every block."""

    def __init__(self, dim: int = 64, depth: int = 6, features: int = 12) -> None:
        super().__init__()
        self.enter = nn.Linear(features, dim)
        self.time = TimeEmbedding(dim)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(depth))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)) for _ in range(depth)
        )
        self.leave = nn.Linear(dim, features)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Predict the noise of vectors of shape [batch, features]."""
        x, shift = self.enter(x), self.time(t)
        for norm, block in zip(self.norms, self.blocks, strict=True):
            x = x + block(norm(x) + shift)
        return self.leave(x)


class ResidualConv(nn.Module):
    """Two convolutions around a shift from the embedding, with a residual."""

    def __init__(self, before: int, after: int, embedding: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(4, before), nn.Conv2d(before, after, 3, padding=1)
        self.shift = nn.Linear(embedding, after)
        self.norm2, self.conv2 = nn.GroupNorm(4, after), nn.Conv2d(after, after, 3, padding=1)
        self.skip = nn.Conv2d(before, after, 1) if before != after else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Apply the block."""
        h = self.conv1(F.silu(self.norm1(x))) + self.shift(embedding)[:, :, None, None]
        return self.skip(x) + self.conv2(F.silu(self.norm2(h)))


class SmallUNet(nn.Module):
    """Three levels of two residual blocks down and up; the skips are concatenated."""

    def __init__(self, widths: tuple[int, ...] = (16, 24, 32), channels: int = 3, classes: int = 5) -> None:
        super().__init__()
        emb = 32
        self.time, self.label = TimeEmbedding(emb), nn.Embedding(classes, emb)
        self.enter = nn.Conv2d(channels, widths[0], 3, padding=1)
        self.down, self.up, skips, current = nn.ModuleList(), nn.ModuleList(), [], widths[0]
        for width in widths:
            for _ in range(2):
                self.down.append(ResidualConv(current, width, emb))
                skips.append(width)
                current = width
        self.middle = ResidualConv(current, current, emb)
        for width in reversed(widths):
            for _ in range(2):
                self.up.append(ResidualConv(current + skips.pop(), width, emb))
                current = width
        self.norm, self.leave = nn.GroupNorm(4, current), nn.Conv2d(current, channels, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict the noise of images of shape [batch, 3, 16, 16] with class labels ``y``."""
        embedding, skips = self.time(t) + self.label(y), []
        x = self.enter(x)
        for i, block in enumerate(self.down):
            if i in (2, 4):
                x = F.avg_pool2d(x, 2)
            x = block(x, embedding)
            skips.append(x)
        x = self.middle(x, embedding)
        for i, block in enumerate(self.up):
            if i in (2, 4):
                x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            x = block(torch.cat([x, skips.pop()], dim=1), embedding)
        return self.leave(F.silu(self.norm(x)))


class SharedAdaBlock(nn.Module):
    """Attention and MLP, modulated by a shared vector plus a table of its own."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.table = nn.Parameter(torch.zeros(6, dim))
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim))

    def attend(self, x: Tensor) -> Tensor:
        """Self-attention over tokens [batch, tokens, dim]."""
        batch, tokens, dim = x.shape
        q, k, v = self.qkv(x).reshape(batch, tokens, 3, self.heads, dim // self.heads).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, dim))

    def forward(self, x: Tensor, modulation: Tensor) -> Tensor:
        """Apply the block; ``modulation`` is [batch, 6, dim]."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (modulation + self.table)[:, :, None].unbind(1)
        x = x + gate_a * self.attend(F.layer_norm(x, x.shape[-1:]) * (1 + scale_a) + shift_a)
        return x + gate_m * self.mlp(F.layer_norm(x, x.shape[-1:]) * (1 + scale_m) + shift_m)


class SharedAdaDiT(nn.Module):
    """A transformer on latents whose blocks share one adaptive modulation."""

    def __init__(self, dim: int = 48, heads: int = 4, depth: int = 6, channels: int = 4, classes: int = 5) -> None:
        super().__init__()
        self.dim = dim
        self.patchify = nn.Conv2d(channels, dim, kernel_size=2, stride=2)
        self.position = nn.Parameter(torch.zeros(1, 64, dim))
        self.time, self.label = TimeEmbedding(dim), nn.Embedding(classes, dim)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(SharedAdaBlock(dim, heads) for _ in range(depth))
        self.last = nn.Linear(dim, 2 * dim)
        self.head = nn.Linear(dim, 4 * channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict the velocity of latents of shape [batch, 4, 16, 16] with class labels ``y``."""
        embedding = self.time(t) + self.label(y)
        modulation = self.modulation(embedding).reshape(-1, 6, self.dim)
        tokens = self.patchify(x)
        height, width = tokens.shape[-2:]
        tokens = tokens.flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            tokens = block(tokens, modulation)
        shift, scale = self.last(F.silu(embedding))[:, None].chunk(2, dim=-1)
        tokens = self.head(F.layer_norm(tokens, (self.dim,)) * (1 + scale) + shift)
        return F.pixel_shuffle(tokens.transpose(1, 2).reshape(x.shape[0], -1, height, width), 2)


def _image(d: Draw) -> Call:
    return call(d(2, 3, 16, 16), d.long_t())


def _vector(d: Draw) -> Call:
    return call(d(2, 12), d.float_t())


def _labelled(channels: int, d: Draw) -> Call:
    return call(d(2, channels, 16, 16), d.float_t(), d.ints(5, 2))


_FUSED = "captured, but equal to rounding only: eager takes the fused fast path of the layer, tracing does not"

ENTRIES: tuple[Entry, ...] = (
    # an odd number of heads keeps eager off the fused fast path, so that eager and export run the same kernels
    Entry("plain-vit", "plain", lambda: seeded(EncoderDenoiser), lambda s: _image(Draw(s)), 0, 1),
    Entry(
        "plain-vit-fused",
        "plain",
        lambda: seeded(lambda: EncoderDenoiser(heads=4)),
        lambda s: _image(Draw(s)),
        0,
        1,
        _FUSED,
    ),
    Entry("plain-mlp", "plain", lambda: seeded(ResidualMlp), lambda s: _vector(Draw(s)), 0, 1),
    Entry("plain-unet", "plain", lambda: seeded(SmallUNet), lambda s: _labelled(3, Draw(s)), 0, 1),
    Entry("plain-dit-shared-adaln", "plain", lambda: seeded(SharedAdaDiT), lambda s: _labelled(4, Draw(s)), 0, 1),
)
