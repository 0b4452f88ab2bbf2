"""A compiler for the denoising step of diffusion models.

It traces a denoiser to one graph, finds what need not be recomputed at every step, rewrites the graph into
cache-guarded subgraphs, and lowers the result.

    from diffcache_fx import compile_with_cache, schedules

    pipe.transformer = compile_with_cache(pipe.transformer, schedules.interval(3))
"""

from . import schedules
from .compile import compile_with_cache
from .denoiser import CachedDenoiser
from .errors import (
    CacheError,
    CacheWarning,
    CallError,
    CaptureError,
    RegionError,
    ScheduleError,
    StaleProgramError,
    VerificationError,
)
from .forecasts import Hold, Linear
from .guards import Always, Interval, Mask
from .schedule import CacheSchedule, Rule
from .selection import Blocks, Listed, Modules, Scale, Sublayers, Trunk
from .version import __version__

__all__ = [
    "Always",
    "Blocks",
    "CacheError",
    "CacheSchedule",
    "CacheWarning",
    "CachedDenoiser",
    "CallError",
    "CaptureError",
    "Hold",
    "Interval",
    "Linear",
    "Listed",
    "Mask",
    "Modules",
    "RegionError",
    "Rule",
    "Scale",
    "ScheduleError",
    "StaleProgramError",
    "Sublayers",
    "Trunk",
    "VerificationError",
    "__version__",
    "compile_with_cache",
    "schedules",
]
