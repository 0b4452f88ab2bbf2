"""Methods that decide step by step from what they measure (the survey's dynamic reuse, arXiv 2510.19755)."""

from __future__ import annotations

from collections.abc import Sequence

from ..adaptive import DraftError, OutputChange, ProbeChange, RelativeChange
from ..errors import ScheduleError, nearest
from ..forecasts import Forecast, Hold, ProbeRatio, Taylor
from ..guards import Magnitude
from ..references import BlocksOutput, ModulatedInput
from ..schedule import CacheSchedule, Rule
from ..selection import Blocks, Selection, Trunk, Whole
from .coefficients import MAG_RATIOS, TEA_POLYNOMIALS


def first_block_cache(
    threshold: float = 0.08, *, forecast: Forecast | None = None, warm_up: int = 1, longest_reuse: int | None = None
) -> CacheSchedule:
    """First-block cache (Cheng, ParaAttention, 2024): the first block is computed at every step; while its residual has
    changed by less than `threshold` (mean absolute, relative) since the last refresh, the residual of all other blocks
    is reused. Default 0.08, as for FLUX (Hunyuan 0.06, diffusers 0.05)."""
    rule = Rule(Trunk(first=1), RelativeChange(BlocksOutput(1), threshold), forecast or Hold(), "residual")
    return CacheSchedule("first_block_cache", (rule,), warm_up, longest_reuse=longest_reuse)


def db_cache(
    first: int = 8,
    last: int = 0,
    threshold: float = 0.08,
    *,
    forecast: Forecast | None = None,
    warm_up: int = 8,
    longest_reuse: int | None = None,
    most_reuses: int | None = None,
) -> CacheSchedule:
    """DBCache (cache-dit, vipshop, 2025): the first `first` blocks are the probe, the last `last` are always computed
    and correct the result; what lies between is reused while the probe's residual has changed by less than `threshold`
    since the last refresh. Defaults F8 B0, 0.08, warm-up 8 (its S, M and F tables: F4 B0 0.12, F1 0.24, F1 0.8)."""
    guard = RelativeChange(BlocksOutput(first), threshold)
    rule = Rule(Trunk(first=first, last=last), guard, forecast or Hold(), "residual")
    return CacheSchedule("db_cache", (rule,), warm_up, longest_reuse=longest_reuse, most_reuses=most_reuses)


def tea_cache(
    threshold: float = 0.25,
    coefficients: str | Sequence[float] = (),
    *,
    forecast: Forecast | None = None,
    warm_up: int = 1,
    cool_down: int = 1,
) -> CacheSchedule:
    """TeaCache (Liu et al., CVPR 2025, arXiv 2411.19108): the relative change of the first block's timestep-modulated
    input, from step to step, goes through a polynomial fitted to the model and is added up; below `threshold` the
    residual of all blocks is reused. First and last step always compute.

    coefficients: highest power first, or the key of a published set (`"flux"`, `"hunyuan_video"`, `"wan2.1_1.3b"`,
    ...); without any, the change itself. Default threshold 0.25, as for FLUX (1.5x there; 0.4 1.8x, 0.6 2x).
    """
    if isinstance(coefficients, str):
        if coefficients not in TEA_POLYNOMIALS:
            raise ScheduleError(
                f"no coefficients are known as {coefficients!r}{nearest(coefficients, TEA_POLYNOMIALS)}"
            )
        coefficients = TEA_POLYNOMIALS[coefficients]
    guard = RelativeChange(ModulatedInput(), threshold, "step", True, coefficients)  # type: ignore[arg-type]
    if len(guard.coefficients) not in (0, 5):
        raise ScheduleError(
            "TeaCache's polynomial is of degree 4: give 5 coefficients, highest power first, "
            f"not {len(guard.coefficients)}"
        )
    rule = Rule(Trunk(first=0), guard, forecast or Hold(), "residual")
    return CacheSchedule("tea_cache", (rule,), warm_up, cool_down)


def mag_cache(
    threshold: float = 0.24,
    ratios: str | Sequence[float] = "flux",
    *,
    longest: int = 5,
    retention: float = 0.1,
    never: Sequence[int] = (),
    forecast: Forecast | None = None,
) -> CacheSchedule:
    """MagCache (Ma et al., 2025): the ratio of the residual's magnitude between neighbouring steps, measured on one
    prompt, tells how far a reused residual drifts; below `threshold`, and at most `longest` steps in a row, the
    residual of all blocks is reused.

    ratios: by step of the calibration run, or the key of a published set; stretched to other step counts. retention:
    share of the run that computes at its start. Defaults as for FLUX (0.24, 5, 0.1; diffusers 0.06, 3, 0.2).
    """
    if isinstance(ratios, str):
        if ratios not in MAG_RATIOS:
            raise ScheduleError(f"no magnitude ratios are known as {ratios!r}{nearest(ratios, MAG_RATIOS)}")
        never = never or ((11,) if ratios == "flux" else ())
        ratios = MAG_RATIOS[ratios]
    guard = Magnitude(ratios, threshold, longest, retention, tuple(never))  # type: ignore[arg-type]
    return CacheSchedule("mag_cache", (Rule(Trunk(first=0), guard, forecast or Hold(), "residual"),))


def easy_cache(
    threshold: float = 0.05, *, warm_up: int = 10, cool_down: int = 1, together: bool = True
) -> CacheSchedule:
    """EasyCache (Zhou et al., 2025): the output's change is predicted from the latents' and added up; below `threshold`
    the model is not run at all, and output minus input is reused.

    together: the guidance branch called first at a step decides for the others, as in the authors' code. Defaults as
    for Wan 2.1 (0.05, 10 steps at the start; HunyuanVideo 0.025 and 5). Applies to any model whose output has the
    shape of its latents.
    """
    rule = Rule(Whole(), OutputChange(threshold), Hold(), "residual")
    guidance = "together" if together else "apart"
    return CacheSchedule("easy_cache", (rule,), warm_up, cool_down, guidance=guidance)


def di_cache(
    threshold: float = 0.4, *, depth: int = 1, minus_input: bool = False, warm_up: int = 1, cool_down: int = 1
) -> CacheSchedule:
    """DiCache (Bu et al., 2025): the first `depth` blocks probe; the relative change of their output is added up, and
    below `threshold` the residual of all blocks is taken from the last two refreshed steps, by as much as the probe's
    own residual has moved between them (1 to 1.5 times).

    warm_up: steps that compute at the start (0.2 of the run in the paper). Defaults as for FLUX (0.4; Hunyuan 0.1).
    """
    guard = ProbeChange(threshold, depth, minus_input)
    rule = Rule(Trunk(first=0), guard, ProbeRatio(), "residual")
    return CacheSchedule("di_cache", (rule,), warm_up, cool_down)


def speca(
    threshold: float = 0.1,
    *,
    decay: float = 0.01,
    floor: float = 0.01,
    order: int = 2,
    least: int = 2,
    longest_reuse: int = 5,
    warm_up: int = 3,
) -> CacheSchedule:
    """SpeCa (Liu et al., 2025, arXiv 2509.11628): all blocks are drafted by Taylor forecast; the last one is also
    computed on its forecast input, and a relative error of tau or more makes the next step a full one.

    tau falls from `threshold` by `decay` over the run, never below `floor` (0.01 DiT, 0.1 FLUX). least: drafts in a row
    before the verdict counts; longest_reuse: after so many, a full step. Defaults: 0.1, 0.01, order 2 (DiT 4), 2 and 5.
    """
    guard = DraftError(threshold, decay, floor, least)
    rule = Rule(Blocks(first=0, tail=1), guard, Taylor(order), "residual")
    return CacheSchedule("speca", (rule,), warm_up, longest_reuse=longest_reuse)


__all__ = ["Selection", "db_cache", "di_cache", "easy_cache", "first_block_cache", "mag_cache", "speca", "tea_cache"]
