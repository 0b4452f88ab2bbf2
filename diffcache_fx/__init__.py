"""A compiler for the denoising step of diffusion models.

It traces a denoiser to one graph, finds what need not be recomputed at every step, rewrites the graph into
cache-guarded subgraphs, and lowers the result.

    from diffcache_fx import compile_with_cache, schedules

    pipe.transformer = compile_with_cache(pipe.transformer, schedules.first_block_cache(threshold=0.08))
"""

from . import fitting, schedules
from .adaptive import DraftError, OutputChange, ProbeChange, RelativeChange
from .alignment import fit_scale_shift, train_scale_shift
from .calibration import Calibration, calibrate
from .compile import compile_with_cache
from .correction import ScaleShift
from .denoiser import CachedDenoiser
from .errors import (
    CacheError,
    CacheWarning,
    CalibrationError,
    CallError,
    CaptureError,
    RegionError,
    ScheduleError,
    StaleProgramError,
    VerificationError,
)
from .forecasts import (
    Barycentric,
    Binomial,
    Damped,
    Extrapolate,
    FoCa,
    Hermite,
    Hold,
    Lagrange,
    Linear,
    Newton,
    ProbeRatio,
    Rows,
    Taylor,
)
from .guards import Always, Interval, Magnitude, Mask, Steps
from .guidance import Reconstruct
from .lagrange_scheduler import LagrangeScheduler
from .recording import Recording, RecordingDenoiser
from .references import BlocksOutput, Latents, ModelOutput, ModulatedInput, TrunkInput
from .schedule import CacheSchedule, Rule
from .selection import Blocks, Listed, Modules, Scale, Sublayers, Trunk, Whole
from .targets import Latency, Psnr, RelativeL1, Speedup
from .version import __version__

__all__ = [
    "Always",
    "Barycentric",
    "Binomial",
    "Blocks",
    "BlocksOutput",
    "CacheError",
    "CacheSchedule",
    "CacheWarning",
    "CachedDenoiser",
    "Calibration",
    "CalibrationError",
    "CallError",
    "CaptureError",
    "Damped",
    "DraftError",
    "Extrapolate",
    "FoCa",
    "Hermite",
    "Hold",
    "Interval",
    "Lagrange",
    "LagrangeScheduler",
    "Latency",
    "Latents",
    "Linear",
    "Listed",
    "Magnitude",
    "Mask",
    "ModelOutput",
    "ModulatedInput",
    "Modules",
    "Newton",
    "OutputChange",
    "ProbeChange",
    "ProbeRatio",
    "Psnr",
    "Reconstruct",
    "Recording",
    "RecordingDenoiser",
    "RegionError",
    "RelativeChange",
    "RelativeL1",
    "Rows",
    "Rule",
    "Scale",
    "ScaleShift",
    "ScheduleError",
    "Speedup",
    "StaleProgramError",
    "Steps",
    "Sublayers",
    "Taylor",
    "Trunk",
    "TrunkInput",
    "VerificationError",
    "Whole",
    "__version__",
    "calibrate",
    "compile_with_cache",
    "fit_scale_shift",
    "fitting",
    "schedules",
    "train_scale_shift",
]
