"""Methods whose every decision is known before the run (the survey's static reuse, arXiv 2510.19755)."""

from __future__ import annotations

import builtins
import math
from collections.abc import Sequence
from typing import Any

from ..errors import ScheduleError
from ..forecasts import Forecast, Hold, Linear
from ..guards import Always, Interval, Mask, Steps
from ..schedule import CacheSchedule, Rule
from ..selection import Blocks, Count, Scale, Selection, Sublayers, Trunk


def always() -> CacheSchedule:
    """Refresh everything at every step: the uncached model through the same machinery, for comparisons."""
    return CacheSchedule(name="always", rules=(Rule(guard=Always(), storage="value"),))


def default() -> CacheSchedule:
    """The schedule `compile_with_cache` takes when none is given.

    The trunk but its first block (a U-Net: its outermost scale) is computed at every second step, after three warm-up
    steps, and continued in a straight line in between.
    """
    return CacheSchedule(name="default", rules=(Rule(Trunk(first=1), Interval(every=2), Linear(), "auto"),), warm_up=3)


def interval(
    every: int = 2,
    *,
    regions: Selection | None = None,
    forecast: Forecast | None = None,
    storage: str = "auto",
    warm_up: int = 1,
    cool_down: int = 0,
    longest_reuse: int | None = None,
) -> CacheSchedule:
    """Refresh every `every`-th step. regions: the trunk by default; forecast: hold by default."""
    rule = Rule(regions or Trunk(), Interval(every=every), forecast or Hold(), storage)
    return CacheSchedule("interval", (rule,), warm_up, cool_down, longest_reuse)


def mask(
    bits: Sequence[Any],
    *,
    regions: Selection | None = None,
    forecast: Forecast | None = None,
    storage: str = "auto",
    warm_up: int = 1,
) -> CacheSchedule:
    """An explicit plan: `bits[step]` is 1 to refresh and 0 to reuse, or a row of them with one for each region."""
    rule = Rule(regions or Trunk(), Mask(rows(bits)), forecast or Hold(), storage)
    return CacheSchedule("mask", (rule,), warm_up)


def rows(bits: Sequence[Any]) -> tuple[tuple[Any, ...], ...]:
    """Bits by step, or by step and region, as rows."""
    return tuple(tuple(row) if isinstance(row, (tuple, builtins.list)) else (row,) for row in bits)


def deep_cache(
    interval: int = 3,
    branch: int = 0,
    *,
    num_steps: int | None = None,
    center: int | None = None,
    power: float = 1.2,
) -> CacheSchedule:
    """DeepCache (Ma, Fang, Wang, CVPR 2024): of a U-Net, what lies deeper than skip connection `branch` is computed
    every `interval`-th step and held in between. Defaults: interval 3, branch 0, as in the authors' repository.

    With `num_steps` and `center` the refreshes are not even: as many as an even run would have, denser around step
    `center`, their distances growing with the given power (default 1.2; the paper's 1:N non-uniform strategy).
    """
    even = Interval(every=interval)
    guard: Interval | Steps = even
    if center is not None or num_steps is not None:
        if center is None or num_steps is None:
            raise ScheduleError("a non-uniform deep_cache needs both num_steps and center")
        guard = Steps(uneven_steps(num_steps, -(-num_steps // even.every), center, power))
    return CacheSchedule("deep_cache", (Rule(Scale(branch), guard, Hold(), "value"),))


def uneven_steps(total: int, refreshes: int, center: int, power: float) -> tuple[int, ...]:
    """At most `refreshes` of `total` steps, step 0 among them, denser around `center`: evenly spaced on the axis
    sign(d) |d| ** (1 / power), with d the distance to the centre."""
    if not 0 <= center < total or not power >= 1.0:
        raise ScheduleError(f"center must be a step from 0 to {total - 1} and power at least 1, not {center}, {power}")

    def bend(distance: float, exponent: float) -> float:
        return math.copysign(abs(distance) ** exponent, distance)

    low, high = bend(-center, 1 / power), bend(total - center, 1 / power)
    spread = (low + (high - low) * i / refreshes for i in range(refreshes))
    return tuple(sorted({0, *(min(max(int(bend(x, power)) + center, 0), total - 1) for x in spread)}))


def fora(interval: int = 3) -> CacheSchedule:
    """FORA (Selvaraju et al., 2024): every attention and every feed-forward output is computed every `interval`-th step
    and held in between. Default interval 3."""
    return CacheSchedule("fora", (Rule(Sublayers(), Interval(every=interval), Hold(), "value"),))


def delta_dit(interval: int = 3, gate: Count = 0.5, share: float = 0.5) -> CacheSchedule:
    """Delta-DiT (Chen et al., 2024): the residual of a range of blocks is held: of the rear blocks in the early steps,
    which draw the outline, of the front blocks in the later ones, which draw the detail.

    interval: refresh every so many steps (default 3). gate: step, or fraction of the run, where the roles change.
    share: fraction of the blocks that is cached at a time. The last two have no published default.
    """
    rear = Rule(Blocks(first=1.0 - share), Interval(every=interval, end=gate), Hold(), "residual")
    front = Rule(Blocks(first=0, last=1.0 - share), Interval(every=interval, begin=gate), Hold(), "residual")
    return CacheSchedule("delta_dit", (rear, front))


def pab(
    interval: int = 2,
    cross_interval: int = 6,
    *,
    window: tuple[float, float] = (100.0, 850.0),
    mlp_interval: int | None = None,
    mlp_window: tuple[float, float] | None = None,
) -> CacheSchedule:
    """Pyramid Attention Broadcast (Zhao et al., ICLR 2025): attention outputs are broadcast to the following steps,
    over the longer a range the less they change: self-attention every `interval`-th step, cross-attention every
    `cross_interval`-th, while the timestep lies inside `window`.

    Defaults: 2 and 6 between timesteps 100 and 850, as for Open-Sora-Plan in VideoSys (there 4 for temporal attention).
    mlp_interval, mlp_window: the same for feed-forward layers, off by default. A model without cross-attention takes
    the first rule only: pass cross_interval=0.
    """
    rules = [Rule(Sublayers(("attention",)), Interval(every=interval, window=window), Hold(), "value")]
    if cross_interval:
        guard = Interval(every=cross_interval, window=window)
        rules.append(Rule(Sublayers(("cross_attention",)), guard, Hold(), "value"))
    if mlp_interval is not None:
        guard = Interval(every=mlp_interval, window=mlp_window or window)
        rules.append(Rule(Sublayers(("mlp",)), guard, Hold(), "value"))
    return CacheSchedule("pab", tuple(rules))


def t_gate(gate: int = 10, interval: int = 5, *, warm_up: int = 2, halves: bool = False) -> CacheSchedule:
    """T-GATE (Zhang et al., 2024; Liu et al., 2024): text matters early, self-attention late. Before step `gate`
    cross-attention is computed, and self-attention up to step `warm_up` and at every `interval`-th; from step `gate` on
    cross-attention is held at the mean of the guidance branches, as it was just before, and self-attention computed.

    halves: the branches are the two halves of one batch, rather than two calls. Defaults as in the authors' repository
    for 25 steps: gate 10, interval 5, warm-up 2.
    """
    if not isinstance(gate, int) or isinstance(gate, bool) or gate < 1:
        raise ScheduleError(f"gate must be a step from 1, not {gate!r}")
    cross = Interval(every=_NEVER, begin=gate - 1)
    own = Interval(every=interval, begin=warm_up + 1, end=gate - 1, anchor=0)
    rules = (
        Rule(Sublayers(("cross_attention",)), cross, Hold(), "value", share="halves" if halves else "branches"),
        Rule(Sublayers(("attention",)), own, Hold(), "value"),
    )
    return CacheSchedule("t_gate", rules)


# Longer than any run: a region refreshed at such intervals stays as it was.
_NEVER = 1 << 30


def smooth_cache(
    attention: Sequence[Any] | None = None,
    mlp: Sequence[Any] | None = None,
    cross_attention: Sequence[Any] | None = None,
) -> CacheSchedule:
    """SmoothCache (Liu et al., 2024): one plan per type of layer, found offline from how much each type's outputs
    change from step to step (threshold alpha 0.08 to 0.35, look-ahead 3 in the paper). Here the plans are given: one
    bit per step, 1 to compute. At least one; a type without a plan is computed at every step."""
    given = {"attention": attention, "mlp": mlp, "cross_attention": cross_attention}
    rules = tuple(
        Rule(Sublayers((kind,)), Mask(rows(bits)), Hold(), "value") for kind, bits in given.items() if bits is not None
    )
    if not rules:
        raise ScheduleError(
            "smooth_cache needs the plan of at least one type of layer: attention=, mlp= or cross_attention="
        )
    return CacheSchedule("smooth_cache", rules)


def block_cache(bits: Sequence[Sequence[Any]], *, regions: Selection | None = None) -> CacheSchedule:
    """Block Caching (Wimbauer et al., CVPR 2024): each block's residual is held for as long as its accumulated relative
    change, measured offline, stays below a threshold (0.5 in the paper). Here the plan is given: bits[step][block], 1
    to compute. regions: all blocks of the trunk by default; for a U-Net its transformer blocks, say
    `Modules(("*.attentions.*",))`, as in the paper."""
    rule = Rule(regions or Blocks(first=0, each=True), Mask(rows(bits)), Hold(), "residual")
    return CacheSchedule("block_cache", (rule,))
