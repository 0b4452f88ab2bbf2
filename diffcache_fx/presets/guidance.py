"""Methods that use what guidance branches have in common."""

from __future__ import annotations

from ..forecasts import Extrapolate
from ..guards import Interval
from ..guidance import Reconstruct
from ..schedule import CacheSchedule, Rule
from ..selection import Sublayers


def faster_cache(
    interval: int = 2,
    window: tuple[float, float] = (-1.0, 681.0),
    *,
    weight: float = 0.5,
    branch_interval: int = 5,
    branch_window: tuple[float, float] = (-1.0, 641.0),
    low_window: tuple[float, float] = (99.0, 901.0),
    high_window: tuple[float, float] = (-1.0, 301.0),
    alpha: float = 1.1,
    second: bool = False,
) -> CacheSchedule:
    """FasterCache (Lv et al., ICLR 2025, arXiv 2410.19355): attention outputs are computed every `interval`-th step and
    extrapolated by `weight` times their last change in between, while the timestep lies inside `window`; the
    unconditional branch is computed every `branch_interval`-th step inside `branch_window`, else rebuilt from the
    conditional one of the same step and the low and high frequencies of their last difference, enhanced by `alpha`
    inside `low_window` and `high_window`.

    Defaults as in diffusers' `FasterCacheConfig` for CogVideoX. The branches must be two calls, the conditional one
    first, named by `cache_context` ("cond", "uncond"); second=True takes the second unnamed call for the unconditional
    one.
    """
    rule = Rule(
        Sublayers(("attention", "cross_attention")),
        Interval(every=interval, window=window),
        Extrapolate(weight),
        "value",
    )
    branch = Reconstruct(branch_interval, branch_window, low_window, high_window, alpha, second=second)
    return CacheSchedule("faster_cache", (rule,), branch=branch)
