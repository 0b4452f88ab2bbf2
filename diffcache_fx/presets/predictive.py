"""Methods that continue features instead of holding them (the survey's predictive caching, arXiv 2510.19755)."""

from __future__ import annotations

from collections.abc import Sequence

from ..errors import ScheduleError
from ..forecasts import Barycentric, Binomial, FoCa, Forecast, Hermite, Rows, Taylor
from ..guards import Interval
from ..schedule import CacheSchedule, Rule
from ..selection import Selection, Sublayers


def _forecasting(
    name: str, interval: int, forecast: Forecast, warm_up: int, regions: Selection | None
) -> CacheSchedule:
    rule = Rule(regions or Sublayers(), Interval(every=interval), forecast, "value")
    return CacheSchedule(name, (rule,), warm_up)


def taylor_seer(
    interval: int = 4, order: int = 1, *, warm_up: int = 3, regions: Selection | None = None
) -> CacheSchedule:
    """TaylorSeer (Liu et al., 2025): every attention and feed-forward output is computed every `interval`-th step and
    continued by a Taylor series of its differences in between.

    regions: what is forecast; `Trunk(first=0)` keeps the last block's output only, at a fraction of the memory.
    Defaults: interval 4, order 1, three full steps first (DiT: order 4 and 2 full steps; FLUX: interval 6, order 1).
    """
    return _forecasting("taylor_seer", interval, Taylor(order), warm_up, regions)


def hi_cache(
    interval: int = 7, order: int = 2, sigma: float = 0.5, *, warm_up: int = 3, regions: Selection | None = None
) -> CacheSchedule:
    """HiCache (2025): TaylorSeer with scaled Hermite polynomials in place of the powers. Defaults: interval 7, order 2,
    sigma 0.5. Its first-order term is Taylor's with the slope halved: compare with `Damped`."""
    return _forecasting("hi_cache", interval, Hermite(order, sigma), warm_up, regions)


def foca(interval: int = 4, *, warm_up: int = 3, regions: Selection | None = None) -> CacheSchedule:
    """FoCa (Zheng et al., 2025, arXiv 2508.16211): forecast by the second-order backward differentiation formula,
    calibrated by Heun's rule."""
    return _forecasting("foca", interval, FoCa(), warm_up, regions)


def ab_cache(interval: int = 6, order: int = 3, *, warm_up: int = 2, regions: Selection | None = None) -> CacheSchedule:
    """AB-Cache (Yu et al., 2025, arXiv 2504.10540): the binomial difference of the given order is set to zero, 3 F_1 -
    3 F_2 + F_3 for order 3, over the refreshed values. Defaults: interval 6, warm-up 2."""
    return _forecasting("ab_cache", interval, Binomial(order), warm_up, regions)


def cheb_booster(
    interval: int = 4, history: int = 3, *, warm_up: int = 3, regions: Selection | None = None
) -> CacheSchedule:
    """ChebBooster (2025): barycentric rational interpolation through the last `history` refreshed values, evaluated
    ahead of them. Default history 3 (DiT; FLUX 2)."""
    return _forecasting("cheb_booster", interval, Barycentric(history), warm_up, regions)


def l2p(
    rows: Sequence[Sequence[float]], interval: int = 5, *, warm_up: int = 1, regions: Selection | None = None
) -> CacheSchedule:
    """L2P (2026, arXiv 2604.26365): learned linear prediction. rows[step]: the weights of the refreshed values, newest
    first. Here the rows are given. Default interval 5."""
    if any(not isinstance(row, (tuple, list)) for row in rows):
        raise ScheduleError(f"rows must hold a row of weights for each step, not {rows!r}")
    forecast = Rows(tuple(tuple(row) for row in rows))
    return _forecasting("l2p", interval, forecast, warm_up, regions)
