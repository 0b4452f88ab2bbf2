"""Methods given bad settings, or models and calls they do not fit: each refused in one clear sentence."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from diffcache_fx import (
    Blocks,
    CacheError,
    CacheSchedule,
    CallError,
    Extrapolate,
    Interval,
    RegionError,
    Rows,
    Rule,
    ScheduleError,
    compile_with_cache,
    schedules,
)
from diffcache_fx.adaptive import DraftError, OutputChange, ProbeChange, RelativeChange
from diffcache_fx.forecasts import ProbeRatio
from diffcache_fx.guards import Magnitude, Steps
from diffcache_fx.guidance import Reconstruct
from diffcache_fx.references import BlocksOutput, ModelOutput

from .conftest import sample
from .deciding import NET

pytestmark = pytest.mark.usefixtures("one_thread")
NAN, INF = float("nan"), float("inf")
X = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))


def says(error: pytest.ExceptionInfo[BaseException], *words: str) -> None:
    for word in words:
        assert word in str(error.value), str(error.value)


def at(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """A call, drifting from step to step."""
    return X * (1 - 0.05 * step), torch.tensor(1.0 - 0.1 * step)


def compiled(schedule: CacheSchedule, **options: Any) -> Any:
    return compile_with_cache(NET, schedule, backend="eager", **{"num_steps": 10, **options})


def run(cached: Any, steps: int) -> None:
    with torch.no_grad():
        for step in range(steps):
            cached(*at(step))


# --- settings ---

WITH_THRESHOLD: dict[str, Callable[[Any], Any]] = {
    "first_block_cache": schedules.first_block_cache,
    "db_cache": lambda value: schedules.db_cache(1, 0, value),
    "tea_cache": schedules.tea_cache,
    "mag_cache": schedules.mag_cache,
    "easy_cache": schedules.easy_cache,
    "di_cache": schedules.di_cache,
    "speca": schedules.speca,
    "RelativeChange": lambda value: RelativeChange(threshold=value),
    "ProbeChange": ProbeChange,
    "OutputChange": OutputChange,
    "DraftError": DraftError,
    "Magnitude": lambda value: Magnitude((1.0, 1.0), value),
}


@pytest.mark.parametrize("value", [-0.1, -INF, INF, NAN, "0.1", None, True])
@pytest.mark.parametrize("name", WITH_THRESHOLD)
def test_a_threshold_that_is_no_threshold(name: str, value: Any) -> None:
    with pytest.raises(ScheduleError) as error:
        WITH_THRESHOLD[name](value)
    says(error, "threshold", "finite number from 0", repr(value))
    assert WITH_THRESHOLD[name](0) is not None


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: schedules.taylor_seer(order=5), ("order", "from 1 to 4", "5")),
        (lambda: schedules.hi_cache(order=9), ("order", "from 1 to 4")),
        (lambda: schedules.hi_cache(sigma=0.0), ("sigma", "above 0")),
        (lambda: schedules.ab_cache(order=6), ("order", "from 1 to 5")),
        (lambda: schedules.cheb_booster(history=9), ("history", "from 1 to 8")),
        (lambda: schedules.speca(order=-1), ("order", "from 1 to 4", "-1")),
        (lambda: schedules.speca(decay=0.0), ("decay", "above 0")),
        (lambda: schedules.speca(decay=NAN), ("decay", "at most 1")),
        (lambda: schedules.speca(floor=-1), ("floor", "from 0")),
        (lambda: schedules.speca(least=1.5), ("least", "whole number", "1.5")),
        (lambda: schedules.speca(longest_reuse=0), ("longest_reuse", "from 1")),
        (lambda: schedules.db_cache(first=0), ("first", "from 1")),
        (lambda: schedules.db_cache(first=0.5), ("first", "whole number of blocks", "0.5")),
        (lambda: schedules.db_cache(most_reuses=0), ("most_reuses", "from 1")),
        (lambda: schedules.di_cache(depth=0), ("first", "from 1")),
        (lambda: RelativeChange(since="steps"), ("since", "'refresh' or 'step'", "'steps'")),
        (lambda: RelativeChange(ModelOutput()), ("output", "only after the decision")),
        (lambda: schedules.l2p([]), ("one row of weights for each step",)),
        (lambda: schedules.l2p([[1.0, NAN]]), ("weight", "finite")),
        (lambda: Extrapolate(INF), ("weight", "finite")),
        (lambda: ProbeRatio(2.0, 1.0), ("low", "above high")),
    ],
)
def test_orders_and_counts(make: Any, words: tuple[str, ...]) -> None:
    with pytest.raises(ScheduleError) as error:
        make()
    says(error, *words)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: schedules.tea_cache(0.1, (1.0, 2.0)), ("degree 4", "5 coefficients", "highest power first", "not 2")),
        (lambda: schedules.tea_cache(0.1, (1.0,) * 6), ("5 coefficients", "not 6")),
        (lambda: schedules.tea_cache(0.1, (1.0, 2.0, 3.0, 4.0, NAN)), ("coefficients", "finite", "nan")),
        (lambda: schedules.tea_cache(0.1, "fluxx"), ("no coefficients", "'fluxx'", "'flux'")),
        (lambda: schedules.tea_cache(0.1, "wan2.1"), ("no coefficients", "'wan2.1'", "'wan2.1_1")),
        (lambda: schedules.mag_cache(0.1, ()), ("ratios", "each step", "positive numbers", "()")),
        (lambda: schedules.mag_cache(0.1, (1.0,)), ("ratios", "each step")),
        (lambda: schedules.mag_cache(0.1, (1.0, 0.0)), ("ratios", "positive")),
        (lambda: schedules.mag_cache(0.1, (1.0, NAN)), ("ratios", "positive")),
        (lambda: schedules.mag_cache(0.1, "flx"), ("no magnitude ratios", "'flx'", "'flux'")),
        (lambda: schedules.mag_cache(longest=0), ("longest", "from 1")),
        (lambda: schedules.mag_cache(retention=1.0), ("retention", "below 1")),
        (lambda: schedules.smooth_cache(), ("at least one type of layer", "attention=")),
        (lambda: schedules.smooth_cache(mlp=[0, 0]), ("never refreshes",)),
        (lambda: schedules.block_cache([[1, 1], [1]]), ("one bit for each region",)),
    ],
)
def test_calibrated_numbers(make: Any, words: tuple[str, ...]) -> None:
    with pytest.raises(ScheduleError) as error:
        make()
    says(error, *words)


@pytest.mark.parametrize(
    "make",
    [
        lambda window: Interval(2, window=window),
        lambda window: schedules.pab(window=window),
        lambda window: schedules.pab(mlp_interval=2, mlp_window=window),
        lambda window: schedules.faster_cache(window=window),
        lambda window: schedules.faster_cache(branch_window=window),
        lambda window: schedules.faster_cache(low_window=window),
        lambda window: Reconstruct(high_window=window),
    ],
)
@pytest.mark.parametrize("window", [(850.0, 100.0), (100, 100), (100,), ("a", "b"), (NAN, 100.0)])
def test_a_window_that_is_reversed_or_no_pair(make: Any, window: Any) -> None:
    with pytest.raises(ScheduleError) as error:
        make(window)
    says(error, "window", "(low, high)", repr(window))


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: schedules.pab(window=100), "window"),
        (lambda: Reconstruct(window=None), "window"),
        (lambda: schedules.faster_cache(high_window=None), "window"),
        (lambda: schedules.faster_cache(alpha=NAN), "alpha"),
        (lambda: schedules.faster_cache(alpha="1.1"), "alpha"),
        (lambda: schedules.tea_cache(0.1, None), "coefficients"),
        (lambda: schedules.tea_cache(0.1, ("a",) * 5), "coefficients"),
        (lambda: RelativeChange(coefficients="flux"), "coefficients"),
        (lambda: RelativeChange(of="blocks_output"), "of"),
        (lambda: schedules.mag_cache(0.1, 3), "ratios"),
        (lambda: schedules.mag_cache(never=("a",)), "never"),
        (lambda: schedules.mag_cache(retention="0.2"), "retention"),
        (lambda: schedules.speca(decay="0.1"), "decay"),
        (lambda: schedules.l2p([1.0, 0.5]), "row"),
        (lambda: Steps(3), "only"),
        (lambda: schedules.deep_cache(num_steps=10, center=5, power=NAN), "power"),
    ],
)
def test_a_setting_of_the_wrong_type(make: Any, word: str) -> None:
    """As a saved schedule that was edited by hand may hold it."""
    with pytest.raises(ScheduleError) as error:
        make()
    says(error, word)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: schedules.t_gate(gate=0), ("gate", "from 1")),
        (lambda: schedules.t_gate(gate=0.5), ("gate", "0.5")),
        (lambda: schedules.t_gate(interval=0), ("every", "from 1")),
        (lambda: schedules.faster_cache(branch_interval=0), ("every", "from 1")),
        (lambda: Reconstruct(radius=0.5), ("radius", "shorter side")),
        (lambda: Rule(share="all"), ("share", "branches, halves", "'all'")),
        (lambda: CacheSchedule(guidance="both"), ("guidance", "apart, together", "'both'")),
        (lambda: CacheSchedule(branch="uncond"), ("branch", "Reconstruct")),  # type: ignore[arg-type]
        (lambda: CacheSchedule(memory_cap=0), ("memory_cap", "from 1")),
        (lambda: schedules.get("tea_cach"), ("'tea_cach'", "'tea_cache'")),
        (lambda: schedules.get("speca", treshold=0.1), ("schedules.speca", "treshold")),
    ],
)
def test_guidance_and_names(make: Any, words: tuple[str, ...]) -> None:
    with pytest.raises(ScheduleError) as error:
        make()
    says(error, *words)


# --- models ---


def on(name: str, schedule: CacheSchedule) -> None:
    model = sample(name)
    compile_with_cache(model.module, schedule, backend="eager", num_steps=20)(*model.args, **model.kwargs)


ANY = ("guards that apply to any model", "easy_cache", "mag_cache", "static schedules")


@pytest.mark.parametrize(
    ("name", "schedule", "words"),
    [
        ("plain-dit-shared-adaln", schedules.deep_cache(), ("no nested scales", "U-Nets", "Trunk or Blocks")),
        ("plain-mlp", schedules.deep_cache(), ("no nested scales", "U-Nets")),
        ("plain-dit-shared-adaln", schedules.pab(), ("no cross_attention layers", "found: attention")),
        ("plain-dit-shared-adaln", schedules.t_gate(), ("no cross_attention layers", "found: attention")),
        ("plain-mlp", schedules.pab(), ("no attention layers", "Modules")),
        ("plain-mlp", schedules.faster_cache(), ("no attention or cross_attention", "Modules")),
        ("plain-unet", schedules.fora(), ("no attention", "mlp")),
        ("plain-unet", schedules.first_block_cache(), ("U-Net", "deep_cache", *ANY)),
        ("plain-unet", schedules.db_cache(1, 1), ("U-Net", "deep_cache", *ANY)),
        ("plain-unet", schedules.tea_cache(), ("U-Net", "deep_cache", *ANY)),
        ("plain-unet", schedules.di_cache(), ("U-Net", "deep_cache", *ANY)),
        ("plain-mlp", schedules.tea_cache(), ("not modulated by the timestep", "first_block_cache", *ANY)),
        ("plain-vit", schedules.tea_cache(), ("not modulated by the timestep", "di_cache", *ANY)),
        ("plain-mlp", schedules.first_block_cache(), ("add nothing onto a stream", *ANY)),
        ("plain-dit-shared-adaln", schedules.db_cache(), ("the first 8", "6 blocks", "fewer")),
        ("plain-dit-shared-adaln", schedules.di_cache(depth=6), ("the first 6 blocks", "has 6", "watch fewer")),
        ("FluxTransformer2DModel", schedules.faster_cache(), ("spatial frequency", "height, width", "(2, 16, 16)")),
    ],
)
def test_a_method_on_a_model_it_does_not_fit(name: str, schedule: CacheSchedule, words: tuple[str, ...]) -> None:
    with pytest.raises(RegionError) as error, torch.no_grad():
        on(name, schedule)
    says(error, *words)


@pytest.mark.parametrize("schedule", [schedules.mag_cache(), schedules.easy_cache()])
@pytest.mark.parametrize("name", ["plain-unet", "plain-mlp", "plain-vit"])
def test_what_is_offered_instead_does_apply(name: str, schedule: CacheSchedule) -> None:
    with torch.no_grad():
        on(name, schedule)
    assert schedule.name in " ".join(ANY)


@cache
def two_rules(second: Any) -> CacheSchedule:
    first = Rule(Blocks(first=1, last=1), RelativeChange(BlocksOutput(1), 0.1), storage="residual")
    return CacheSchedule("two", (first, Rule(Blocks(first=2), second, storage="residual")))


def test_one_decision_in_the_graph() -> None:
    for second in (RelativeChange(BlocksOutput(1), 0.2), Interval(2)):
        cached = compiled(two_rules(second), decide="graph")
        for _ in range(2):
            with pytest.raises(RegionError) as error, torch.no_grad():
                cached(*at(0))
            says(error, "an adaptive guard decides in the graph", "2 groups", "decide='host'", "one rule")
        for decide in ("host", "lagged"):
            assert compiled(two_rules(second), decide=decide)(*at(0)).shape == (2, 8)


def test_rows_by_step_need_the_host() -> None:
    schedule = schedules.first_block_cache(0.5, forecast=Rows(((1.0,), (1.0,), (1.5, -0.5))))
    with pytest.raises(RegionError) as error, torch.no_grad():
        compiled(schedule, decide="graph")(*at(0))
    says(error, "'rows'", "given by step", "decide='host'")
    cached = compiled(schedule)
    with torch.no_grad():
        run(cached, 3)
        with pytest.raises(ScheduleError, match="no row for step 3: the table has 3"):
            cached(*at(3))
        assert torch.equal(cached(*at(4)), NET(*at(4)))  # what failed has left nothing behind


def test_a_forecast_that_needs_a_probe() -> None:
    with pytest.raises(ScheduleError) as error:
        schedules.first_block_cache(9.0, forecast=ProbeRatio())
    says(error, "'probe_ratio'", "ratio", "ProbeChange", "another forecast")
    with pytest.raises(ScheduleError):
        schedules.interval(2, forecast=ProbeRatio())


@pytest.mark.parametrize("name", ["first_block_cache", "tea_cache", "easy_cache", "di_cache", "speca"])
def test_sizes_that_change_do_not_go_with_an_adaptive_guard(name: str) -> None:
    for decide in ("host", "lagged"):
        with pytest.raises(CacheError) as error:
            compiled(schedules.get(name), dynamic=True, decide=decide)(*at(0))
        says(error, "dynamic=True", "adaptive guard", "dynamic='batch'")
    with pytest.raises(CacheError, match=r"dynamic=True needs decide='host'"):
        compiled(schedules.get(name), dynamic=True, decide="graph")
    with pytest.raises(CacheError, match=r"dynamic must be True, False or 'batch', not 'all'"):
        compiled(schedules.get(name), dynamic="all")


def test_what_needs_the_number_of_steps() -> None:
    for schedule in (schedules.tea_cache(), schedules.easy_cache(), schedules.speca(), schedules.mag_cache()):
        cached = compiled(schedule, num_steps=None)
        with pytest.raises(ScheduleError) as error, torch.no_grad():
            cached(*at(0))
        says(error, "num_steps=", "num_inference_steps=")
        with torch.no_grad(), cached.cache_context("cond", num_inference_steps=10):
            assert torch.equal(cached(*at(0)), NET(*at(0)))
    free = compiled(schedules.speca(decay=1.0), num_steps=None)
    assert free(*at(0)).shape == (2, 8)


def test_limits_that_leave_nothing() -> None:
    for schedule in (schedules.tea_cache(9.0, warm_up=10), schedules.easy_cache(9.0, warm_up=9)):
        cached = compiled(schedule)
        with torch.no_grad():
            for step in range(10):
                assert torch.equal(cached(*at(step)), NET(*at(step)))
        assert "left no step for the guard to decide" in cached.summary()


# --- contexts ---


def raising(output: torch.Tensor) -> None:
    assert output.shape == (2, 8)
    raise ZeroDivisionError


def test_contexts_left_by_an_exception_and_nested() -> None:
    cached = compiled(schedules.first_block_cache(9.0))
    with torch.no_grad():
        for step in range(2):
            with pytest.raises(ZeroDivisionError), cached.cache_context("cond"):
                raising(cached(*at(step)))
            with cached.cache_context("outer"), cached.cache_context("uncond"):
                cached(*at(step))
            with cached.cache_context("outer"):
                with pytest.raises(CallError), cached.cache_context("#1"):
                    pass
                cached(*at(step))
        cached(*at(2))
    found = [(d.context, bool(d.reused)) for d in cached.stats().decisions]
    first, second = ([(name, reused) for name in ("cond", "uncond", "outer")] for reused in (False, True))
    assert found == [*first, *second, ("#0", False)]


def test_a_call_that_fails_inside_a_context_restarts_that_one_only() -> None:
    cached = compiled(schedules.first_block_cache(9.0))
    with torch.no_grad():
        for step in range(2):
            for name in ("cond", "uncond"):
                with cached.cache_context(name):
                    cached(*at(step))
        state = cached._driver.recognizer.contexts["uncond"].payload
        next(iter(state.histories.values())).slots[0] = [torch.zeros(7, 11, 13)]
        with pytest.raises(RuntimeError), cached.cache_context("uncond"):
            cached(*at(2))
        for name in ("cond", "uncond"):
            with cached.cache_context(name):
                got = cached(*at(3))
            assert torch.equal(got, NET(*at(3))) == (name == "uncond")


@pytest.mark.parametrize(("name", "option"), [("block_cache", "bits"), ("l2p", "rows"), ("mask", "bits")])
def test_what_has_no_default(name: str, option: str) -> None:
    with pytest.raises(ScheduleError) as error:
        schedules.get(name)
    says(error, f"schedules.{name} has no default for {option}", f"({option}=...)")
