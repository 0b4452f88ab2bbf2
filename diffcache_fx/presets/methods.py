"""The table of methods: what each is in the terms of the survey of diffusion caching (Liu et al., arXiv 2510.19755)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..schedule import CacheSchedule
from . import adaptive, guidance, predictive, static


@dataclass(frozen=True)
class Method:
    """One factory. family: class in the survey's taxonomy. guard: when it refreshes. forecast: what fills the cache's
    place at a reuse step. granularity: what is cached. source: the paper or the repository."""

    factory: Callable[..., CacheSchedule]
    family: str
    guard: str
    forecast: str
    granularity: str
    source: str

    @property
    def name(self) -> str:
        return self.factory.__name__


_LAYERS = "every attention and feed-forward output"
_BLOCKS = "residual of all blocks"
METHODS: tuple[Method, ...] = (
    Method(static.always, "-", "every step", "-", "nothing", "-"),
    Method(static.default, "static", "every 2nd step after 3", "straight line", "trunk but its first block", "-"),
    Method(static.interval, "static", "every n-th step", "any", "any", "-"),
    Method(static.mask, "static", "a given plan", "any", "any", "-"),
    Method(
        static.deep_cache, "static", "every n-th step, or uneven", "hold", "U-Net below a skip", "Ma et al., CVPR 2024"
    ),
    Method(static.fora, "static", "every n-th step", "hold", _LAYERS, "Selvaraju et al., 2024"),
    Method(static.delta_dit, "static", "every n-th step", "hold", "residual of a block range", "Chen et al., 2024"),
    Method(
        static.pab, "static", "every n-th step, by layer type", "hold", "attention outputs", "Zhao et al., ICLR 2025"
    ),
    Method(
        static.t_gate,
        "static",
        "until a gate / after it",
        "hold, mean of branches",
        "attention outputs",
        "Liu et al., 2024",
    ),
    Method(
        static.smooth_cache,
        "layer-adaptive, offline",
        "a plan per layer type",
        "hold",
        "layer types",
        "Liu et al., 2024",
    ),
    Method(
        static.block_cache,
        "layer-adaptive, offline",
        "a plan per block",
        "hold",
        "block residuals",
        "Wimbauer et al., CVPR 2024",
    ),
    Method(
        adaptive.first_block_cache,
        "timestep-adaptive",
        "change of block 0's residual",
        "any",
        "residual of the other blocks",
        "ParaAttention, 2024",
    ),
    Method(
        adaptive.db_cache,
        "layer-adaptive",
        "change of the first blocks' residual",
        "any",
        "residual of the middle blocks",
        "cache-dit, 2025",
    ),
    Method(
        adaptive.tea_cache,
        "timestep-adaptive",
        "accumulated change of the modulated input",
        "any",
        _BLOCKS,
        "Liu et al., CVPR 2025",
    ),
    Method(adaptive.mag_cache, "timestep-adaptive", "calibrated magnitude ratios", "any", _BLOCKS, "Ma et al., 2025"),
    Method(
        adaptive.easy_cache,
        "timestep-adaptive",
        "predicted change of the output",
        "hold",
        "model output",
        "Zhou et al., 2025",
    ),
    Method(
        adaptive.di_cache,
        "timestep-adaptive",
        "accumulated change of a probe",
        "line scaled by the probe",
        _BLOCKS,
        "Bu et al., 2025",
    ),
    Method(
        adaptive.speca, "hybrid", "draft, verified by the last block", "Taylor", "block residuals", "Liu et al., 2025"
    ),
    Method(predictive.taylor_seer, "predictive", "every n-th step", "Taylor", _LAYERS, "Liu et al., 2025"),
    Method(predictive.hi_cache, "predictive", "every n-th step", "scaled Hermite", _LAYERS, "HiCache, 2025"),
    Method(predictive.foca, "predictive", "every n-th step", "BDF2 and Heun", _LAYERS, "Zheng et al., 2025"),
    Method(predictive.ab_cache, "predictive", "every n-th step", "binomial difference", _LAYERS, "Yu et al., 2025"),
    Method(predictive.cheb_booster, "predictive", "every n-th step", "barycentric", _LAYERS, "ChebBooster, 2025"),
    Method(predictive.l2p, "predictive", "every n-th step", "given rows", _LAYERS, "L2P, 2026"),
    Method(
        guidance.faster_cache,
        "static",
        "every n-th step, by timestep",
        "extrapolation; branch from branch",
        "attention outputs, guidance branch",
        "Lv et al., ICLR 2025",
    ),
)


def table() -> str:
    """The methods as a Markdown table, for the README."""
    head = ("schedule", "class", "refreshes", "fills with", "of what", "source")
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for entry in METHODS:
        cells = (f"`{entry.name}`", entry.family, entry.guard, entry.forecast, entry.granularity, entry.source)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
