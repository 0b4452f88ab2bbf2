"""Where decisions are taken - on the host, in the graph, with a lag - and what is said about them afterwards."""

from __future__ import annotations

import dataclasses
import logging
import math
import threading
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch

from bench.zoo import tensors
from diffcache_fx import (
    CachedDenoiser,
    CacheSchedule,
    Interval,
    Listed,
    Rule,
    ScheduleError,
    Taylor,
    Trunk,
    compile_with_cache,
    schedules,
)
from diffcache_fx.adaptive import RelativeChange
from diffcache_fx.references import BlocksOutput

from .conftest import argument, equal, sample, steps_of, worst
from .test_passes_signals import Net

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 20
NET = Net().eval()
MODES = ("host", "graph", "lagged")
KINDS: dict[str, Callable[[float], CacheSchedule]] = {
    "first_block_cache": lambda threshold: schedules.first_block_cache(threshold),
    "db_cache": lambda threshold: schedules.db_cache(1, 1, threshold, warm_up=2),
    "tea_cache": lambda threshold: schedules.tea_cache(threshold),
    "easy_cache": lambda threshold: schedules.easy_cache(threshold, warm_up=2),
    "di_cache": lambda threshold: schedules.di_cache(threshold),
    "speca": lambda threshold: schedules.speca(threshold, decay=0.5, floor=0.0, least=0),
}


def strict(module: Any, examples: Sequence[torch.Tensor]) -> Callable[..., Any]:
    """A backend that, like Inductor, takes only inputs that lie in memory as the examples do."""
    layouts = [(tuple(example.shape), example.stride(), example.dtype) for example in examples]

    def run(*args: torch.Tensor) -> Any:
        assert [(tuple(arg.shape), arg.stride(), arg.dtype) for arg in args] == layouts
        return module(*args)

    return run


def start(seed: int) -> torch.Tensor:
    return torch.randn(2, 8, generator=torch.Generator().manual_seed(seed))


Outputs = list[torch.Tensor]


def advance(model: Any, x: torch.Tensor, step: int, steps: int, outputs: Outputs) -> torch.Tensor:
    """One step of a sampler: call the model, move a little."""
    with torch.no_grad():
        outputs.append(model(x, torch.tensor(1.0 - step / steps)).clone())
        return x - 0.15 * torch.tanh(outputs[-1])


def generate(model: Any, seed: int = 0, steps: int = STEPS, context: str | None = None, **hints: Any) -> Outputs:
    x, outputs = start(seed), Outputs()
    for step in range(steps):
        if context is None:
            x = advance(model, x, step, steps, outputs)
        else:
            with model.cache_context(context, **hints):
                x = advance(model, x, step, steps, outputs)
    return outputs


def interleaved(model: Any, seeds: Sequence[int], names: Sequence[str], steps: int = STEPS) -> list[Outputs]:
    """Two guidance branches, each on a path of its own."""
    paths = [start(seed) for seed in seeds]
    outputs: list[Outputs] = [[] for _ in seeds]
    for step in range(steps):
        for i, name in enumerate(names):
            with model.cache_context(name):
                paths[i] = advance(model, paths[i], step, steps, outputs[i])
    return outputs


def denoiser(schedule: CacheSchedule, decide: Any = "host", **options: Any) -> CachedDenoiser:
    options = {"backend": strict, "num_steps": STEPS, **options}
    return compile_with_cache(NET, schedule, decide=decide, **options)


@cache
def threshold(kind: str) -> float:
    """One at which some steps reuse: somewhat above the middle of the signals."""
    cached = denoiser(KINDS[kind](1e9 if kind == "speca" else 0.0))
    generate(cached)
    signals = sorted(d.signal for d in cached.stats().decisions if d.signal)
    assert signals
    return 1.5 * signals[len(signals) // 2]


@cache
def run(kind: str, decide: str, seed: int = 0) -> tuple[Outputs, Any, str]:
    """One generation: its outputs, its statistics and its bits."""
    cached = denoiser(KINDS[kind](threshold(kind)), decide)
    outputs = generate(cached, seed)
    return outputs, cached.stats(), bits(cached)


def bits(cached: CachedDenoiser, context: str | None = None) -> str:
    """R refreshed, u reused."""
    chosen = [d for d in cached.stats().decisions if context in (None, d.context)]
    return "".join("u" if decision.reused else "R" for decision in chosen)


def plain(seed: int = 0, steps: int = STEPS) -> Outputs:
    return generate(NET, seed, steps)


# --- host, graph, lag ---


@pytest.mark.parametrize("kind", KINDS)
def test_host_and_graph_take_the_same_decisions(kind: str) -> None:
    (ours, host, found), (theirs, graph, other) = run(kind, "host"), run(kind, "graph")
    assert found == other
    assert {"R", "u"} == set(found)
    assert 4 <= found.count("u") <= STEPS - 3
    for mine, its in zip(host.decisions, graph.decisions, strict=True):
        assert (mine.signal is None) == (its.signal is None)
        assert mine.signal is None or its.signal == pytest.approx(mine.signal, rel=1e-4, abs=1e-6)
        assert its.threshold == pytest.approx(mine.threshold)
        assert (its.refreshed, its.reused) == (mine.refreshed, mine.reused)
        assert (mine.signal is None or mine.signal >= mine.threshold) == (not mine.reused) or mine.verdicts[0].forced
    assert worst(ours, theirs) < 1e-5
    assert kind in ("di_cache", "speca") or equal(ours, theirs)  # there the row of weights is computed in float32
    first = found.index("u")
    assert equal(ours[:first], plain()[:first])
    assert not torch.equal(ours[first], plain()[first])
    assert worst(ours, plain()) < 0.5


def drifting(name: str, steps: int) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Calls of a model of the corpus whose latents move a little from step to step."""
    model = sample(name)
    where, calls = model.entry.latent, steps_of(model.entry, steps)
    first = argument(*calls[0], where)
    found = []
    for step, (args, kwargs) in enumerate(calls):
        moved = {where: first + 0.05 * step * argument(args, kwargs, where)}
        found.append(
            (tuple(moved.get(i, v) for i, v in enumerate(args)), {k: moved.get(k, v) for k, v in kwargs.items()})
        )
    return found


@pytest.mark.parametrize(
    ("name", "kind"),
    [("plain-mlp", "easy_cache"), ("plain-vit", "di_cache"), ("plain-dit-shared-adaln", "tea_cache")],
)
def test_models_of_the_corpus_decide_alike(name: str, kind: str) -> None:
    calls, limit, found = drifting(name, 8), 0.0, []
    for decide in ("host", "host", "graph"):
        cached = compile_with_cache(
            sample(name).module, KINDS[kind](limit), backend="eager", num_steps=8, decide=decide
        )
        with torch.no_grad():
            outputs = [tensors(cached(*args, **kwargs))[0].clone() for args, kwargs in calls]
        signals = sorted(d.signal for d in cached.stats().decisions if d.signal)
        limit = limit or 1.5 * signals[len(signals) // 2]
        found.append((bits(cached), outputs))
    assert found[0][0] == "R" * 8
    assert {"R", "u"} == set(found[1][0])
    assert found[1][0] == found[2][0]
    assert worst(found[1][1], found[2][1]) < 1e-5
    assert worst(found[0][1], found[1][1]) > 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_the_guarded_program_under_torch_compile(kind: str) -> None:
    torch._dynamo.reset()

    def full(module: Any, examples: Any) -> Any:
        return torch.compile(module, fullgraph=True, backend="aot_eager" if kind == "tea_cache" else "eager")

    cached = denoiser(KINDS[kind](threshold(kind)), "graph", backend=full)
    assert worst(generate(cached), run(kind, "graph")[0]) < 1e-6
    assert bits(cached) == run(kind, "graph")[2]
    assert cached.stats().reads == 0


def blocks_of(x: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Block 0's residual and its modulated input, by the plain module."""
    scale = torch.tensor(1.0 - step / STEPS) + 1
    with torch.no_grad():
        entered = NET.enter(x)
        return NET.blocks[0](entered, scale) - entered, entered * scale


@pytest.mark.parametrize("kind", ["first_block_cache", "tea_cache"])
def test_a_lagged_decision_follows_from_the_signal_of_the_step_before(kind: str) -> None:
    limit = threshold(kind)
    outputs, stats, found = run(kind, "lagged")
    assert {"R", "u"} == set(found)
    x, kept, total = start(0), torch.zeros(()), 0.0
    waiting: float | None = None  # measured at the step before
    for step, (decision, output) in enumerate(zip(stats.decisions, outputs, strict=True)):
        residual, modulated = blocks_of(x, step)
        seen = residual if kind == "first_block_cache" else modulated
        measured = None if step == 0 else float((seen - kept).abs().mean() / kept.abs().mean())
        if waiting is None:
            refresh, signal = True, None
        else:
            signal = total + waiting if kind == "tea_cache" else waiting
            refresh = signal >= limit or (kind == "tea_cache" and step == STEPS - 1)
        total = 0.0 if refresh else signal or 0.0
        assert bool(decision.refreshed) == refresh, step
        assert decision.signal == (None if signal is None else pytest.approx(signal, rel=1e-4))
        if refresh or kind == "tea_cache":
            kept = seen
        waiting = measured
        x = x - 0.15 * torch.tanh(output)


@pytest.mark.parametrize("kind", KINDS)
def test_lagged_images_do_not_depend_on_timing(kind: str) -> None:
    cached = denoiser(KINDS[kind](threshold(kind)), "lagged")
    x, outputs = start(0), Outputs()
    for step in range(STEPS):
        x = advance(cached, x, step, STEPS, outputs)
        time.sleep(0.002 * (step % 3 == 0))
    expected, stats, found = run(kind, "lagged")
    assert equal(outputs, expected)
    assert bits(cached) == found
    assert {"R", "u"} == set(found)
    assert cached.stats().reads == stats.reads > 0
    assert kind in ("easy_cache", "speca") or found != run(kind, "host")[2]


NEVER = {
    **{kind: lambda kind=kind: KINDS[kind](0.0) for kind in KINDS},
    "tea_cache-falling": lambda: schedules.tea_cache(0, (0.0, 0.0, 0.0, -1.0, 0.0)),
    "speca-default": lambda: schedules.speca(0),
    "mag_cache": lambda: schedules.mag_cache(0),
}


@pytest.mark.parametrize("decide", MODES)
@pytest.mark.parametrize("kind", NEVER)
def test_threshold_zero_is_the_uncached_model(kind: str, decide: str) -> None:
    cached = denoiser(NEVER[kind](), decide)
    assert equal(generate(cached, steps=8), plain(steps=8))
    assert set(bits(cached)) == {"R"}
    assert cached.stats().reused == 0


@pytest.mark.parametrize("decide", ["host", "graph"])
@pytest.mark.parametrize("kind", [kind for kind in NEVER if kind != "mag_cache"])
def test_the_summary_says_that_the_threshold_is_zero(kind: str, decide: str) -> None:
    cached = denoiser(NEVER[kind](), decide)
    generate(cached, steps=5)
    assert "the threshold is 0, which means never" in cached.summary()


# --- contexts ---


@pytest.mark.parametrize("decide", MODES)
@pytest.mark.parametrize("kind", ["tea_cache", "di_cache", "first_block_cache"])
def test_each_context_has_accumulators_of_its_own(kind: str, decide: str) -> None:
    cached = denoiser(KINDS[kind](threshold(kind)), decide)
    mixed = interleaved(cached, (0, 7), ("cond", "uncond"))
    for outputs, seed, name in zip(mixed, (0, 7), ("cond", "uncond"), strict=True):
        expected, _, found = run(kind, decide, seed)
        assert bits(cached, name) == found
        assert equal(outputs, expected)
    assert bits(cached, "cond") != bits(cached, "uncond")


def easy(together: bool) -> CacheSchedule:
    return schedules.easy_cache(threshold("easy_cache"), warm_up=2, together=together)


@pytest.mark.parametrize("decide", MODES)
def test_together_the_second_branch_follows_the_first(decide: str) -> None:
    apart, both = denoiser(easy(False), decide), denoiser(easy(True), decide)
    interleaved(apart, (0, 7), ("cond", "uncond"))
    assert bits(apart, "cond") != bits(apart, "uncond")
    outputs = interleaved(both, (0, 7), ("cond", "uncond"))
    assert bits(both, "cond") == bits(both, "uncond") == bits(apart, "cond")
    assert all(value.isfinite().all() for value in outputs[1])
    interleaved(both, (7, 0), ("uncond", "cond"))  # whichever is called first
    assert bits(both, "cond") == bits(both, "uncond") == bits(apart, "uncond")


def test_a_branch_that_follows_does_so_against_its_own_signal() -> None:
    both = denoiser(easy(True))
    interleaved(both, (0, 4), ("cond", "uncond"))
    follower = [d.verdicts[0] for d in both.stats().decisions if d.context == "uncond" and d.signal is not None]
    assert any(v.forced and not v.refresh and v.signal >= v.limit for v in follower)
    assert any(v.forced and v.refresh and v.signal < v.limit for v in follower)


def test_two_rules_decide_each_for_itself_and_merged_programs_refresh_more() -> None:
    def two(low: float, high: float) -> CacheSchedule:
        parts = (("blocks.1",), low), (("blocks.2",), high)
        rules = (
            Rule(Listed((path,)), RelativeChange(BlocksOutput(1), limit), storage="residual") for path, limit in parts
        )
        return CacheSchedule("two", tuple(rules))

    middle = threshold("first_block_cache")
    cached = denoiser(two(0.5 * middle, 2 * middle), max_programs=None)
    generate(cached)
    rows = {decision.reused for decision in cached.stats().decisions}
    assert {(), ("blocks.2",)} <= rows
    merged = denoiser(two(0.5 * middle, 2 * middle), max_programs=1)
    assert equal(generate(merged), plain())
    assert set(bits(merged)) == {"R"}
    for decision in merged.stats().decisions[1:]:
        verdicts = decision.verdicts
        assert all(v.refresh and (v.forced or v.signal >= v.limit) for v in verdicts)
        assert verdicts[1].signal == verdicts[0].signal  # both kept what they saw at the step before


# --- isolation ---


def go_on(model: Any, x: torch.Tensor, first: int, last: int) -> torch.Tensor:
    outputs = Outputs()
    for step in range(first, last):
        x = advance(model, x, step, STEPS, outputs)
    return x


@pytest.mark.parametrize("decide", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_an_exception_leaves_nothing_stale(kind: str, decide: str) -> None:
    expected, _, found = run(kind, decide, 7)
    cached = denoiser(KINDS[kind](threshold(kind)), decide)
    reusing = run(kind, decide)[2].index("u", 3)
    x = go_on(cached, start(0), 0, reusing)
    state = cached._driver.recognizer.contexts["#0"].payload
    for history in state.histories.values():  # the next step fails, in its second part where it is split
        history.slots = [[torch.zeros(7, 11, 13) for _ in slots] for slots in history.slots]
    with pytest.raises((RuntimeError, AssertionError)):
        go_on(cached, x, reusing, reusing + 1)
    assert equal(generate(cached, 7), expected)
    assert bits(cached) == found


@pytest.mark.parametrize("decide", MODES)
def test_a_pipeline_that_never_ends_its_run_leaves_nothing_stale(decide: str) -> None:
    expected, _, found = run("first_block_cache", decide, 7)
    cached = denoiser(KINDS["first_block_cache"](threshold("first_block_cache")), decide, num_steps=None)
    go_on(cached, start(0), 0, 5)  # raises between two calls, and never resets
    assert equal(generate(cached, 7), expected)
    assert bits(cached) == found


@pytest.mark.parametrize("decide", ["host", "graph"])
def test_two_threads_share_no_decisions(decide: str) -> None:
    cached = denoiser(KINDS["tea_cache"](threshold("tea_cache")), decide)
    got: dict[int, Any] = {}
    gate = threading.Barrier(3)

    def work(seed: int) -> None:
        torch.set_num_threads(1)
        gate.wait()
        try:
            got[seed] = generate(cached, seed), bits(cached)
        except BaseException as error:
            got[seed] = error

    threads = [threading.Thread(target=work, args=(seed,)) for seed in (0, 7, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for seed in (0, 7, 9):
        expected, _, found = run("tea_cache", decide, seed)
        assert not isinstance(got[seed], BaseException), got[seed]
        assert equal(got[seed][0], expected)
        assert got[seed][1] == found


@pytest.mark.parametrize("decide", MODES)
def test_a_generation_of_another_length(decide: str) -> None:
    schedule = KINDS["tea_cache"](threshold("tea_cache"))
    cached = denoiser(schedule, decide, num_steps=None)
    for steps in (STEPS, 9, 13):
        found = generate(cached, 0, steps, "cond", num_inference_steps=steps)
        alone = denoiser(schedule, decide, num_steps=steps)
        assert equal(found, generate(alone, 0, steps))
        assert bits(cached) == bits(alone)
        assert bits(cached)[-1] == "R"
        assert "u" in bits(cached)


# --- what is said ---


def test_reads_and_signals_are_recorded() -> None:
    for kind in KINDS:
        _, stats, found = run(kind, "host")
        early, late = kind != "speca", kind in ("easy_cache", "speca")
        assert stats.reads == early * STEPS + late * (STEPS - 1)
        _, graph, _ = run(kind, "graph")
        assert (graph.reads, graph.close) == (0, 0)
        assert all(math.isfinite(d.threshold) for d in stats.decisions)
        assert stats.decisions[0].signal is None
        assert all(d.signal is not None and d.signal >= 0 for d in stats.decisions[1:])
        assert stats.steps == STEPS == stats.refreshed + stats.reused
        assert stats.reused == found.count("u")


@pytest.mark.parametrize("decide", MODES)
def test_signals_near_the_threshold_are_counted(decide: str) -> None:
    first = denoiser(schedules.first_block_cache(1e-9), decide)
    generate(first, steps=5)
    signal = next(d.signal for d in first.stats().decisions if d.signal is not None)
    assert first.stats().close == 0
    cached = denoiser(schedules.first_block_cache(signal * (1 + 4e-6)), decide)
    generate(cached, steps=5)
    assert cached.stats().close == 1
    assert "1 decision(s) within 1e-5 of the threshold" in cached.summary()


@pytest.mark.parametrize("decide", MODES)
def test_the_summary_says_why_nothing_was_reused(decide: str) -> None:
    cached = denoiser(schedules.first_block_cache(1e-6), decide)
    generate(cached)
    lowest = min(d.signal for d in cached.stats().decisions if d.signal is not None)
    assert f"the signal never fell below the threshold (nearest {lowest:.3g}, limit 1e-06)" in cached.summary()
    assert "raise the threshold" in cached.summary()
    cached = denoiser(schedules.first_block_cache(9.0, warm_up=STEPS), decide)
    generate(cached)
    assert "warm-up, cool-down and limits left no step for the guard to decide" in cached.summary()
    assert f"{STEPS} refresh(es) were forced" in cached.summary()
    cached = denoiser(KINDS["tea_cache"](threshold("tea_cache")), decide)
    generate(cached)
    assert "nothing was reused" not in cached.summary()
    assert f"threshold {threshold('tea_cache'):.3g}" in cached.summary()
    assert f"{bits(cached).count('u')} reused" in cached.summary()


@pytest.mark.parametrize("name", ["first_block_cache", "di_cache"])
def test_what_guards_keep_comes_back_as_it_was_compiled_for(name: str) -> None:
    """Tokens made by a convolution lie transposed in memory, and so does what is computed from them."""
    model = sample("plain-dit-shared-adaln")
    cached = compile_with_cache(model.module, schedules.get(name, threshold=9.0), backend=strict, num_steps=4)
    with torch.no_grad():
        for moment in (900.0, 800.0, 700.0):
            cached(model.args[0], torch.full((2,), moment), *model.args[2:])
    assert bits(cached) == "Ruu"


# --- schedules ---

PRESETS = {
    "mask": {"bits": [1, 0]},
    "smooth_cache": {"mlp": [1, 0]},
    "block_cache": {"bits": [[1, 1], [0, 1]]},
    "l2p": {"rows": [[1.0], [1.5, -0.5]]},
    "tea_cache": {"coefficients": "flux"},
    "first_block_cache": {"forecast": Taylor(2)},
    "di_cache": {"minus_input": True},
    "faster_cache": {"second": True},
    "t_gate": {"halves": True},
}


@pytest.mark.parametrize("name", schedules.list())
def test_every_preset_survives_json(name: str) -> None:
    schedule = schedules.get(name, **PRESETS.get(name, {}))
    again = CacheSchedule.from_json(schedule.to_json())
    assert again == schedule
    assert hash(again) == hash(schedule)
    assert [type(rule.guard) for rule in again.rules] == [type(rule.guard) for rule in schedule.rules]
    data = schedule.to_dict()
    if name in ("first_block_cache", "tea_cache", "db_cache"):
        assert data["rules"][0]["guard"]["of"]["kind"] in ("blocks_output", "modulated_input")
        data["rules"][0]["guard"]["of"]["kind"] = "block_output"
        with pytest.raises(ScheduleError, match="unknown quantity 'block_output'"):
            CacheSchedule.from_dict(data)


def capped(most: int | None) -> CachedDenoiser:
    schedule = dataclasses.replace(schedules.first_block_cache(0.5, forecast=Taylor(2)), memory_cap=most)
    cached = denoiser(schedule, example_inputs=((start(0), torch.tensor(1.0)), {}))
    generate(cached)
    return cached


def test_a_memory_cap_shortens_the_history(caplog: pytest.LogCaptureFixture) -> None:
    one = 2 * 8 * 4
    assert capped(None).explain().cache_bytes == 4 * one  # three refreshes, and what the guard keeps
    with caplog.at_level(logging.WARNING):
        cached = capped(3 * one)
    assert cached.explain().cache_bytes == 3 * one
    assert "2 of 3 past refreshes" in caplog.text
    assert "u" in bits(cached)
    assert capped(2 * one).explain().cache_bytes == 2 * one
    with pytest.raises(ScheduleError) as error:
        capped(2 * one - 1)
    for word in (f"at least {2 * one} bytes", f"memory_cap is {2 * one - 1}", "raise the cap"):
        assert word in str(error.value)


def test_a_memory_cap_counts_what_the_guard_keeps() -> None:
    most = 3 * 2 * 8 * 4
    assert capped(most).stats().cache_bytes <= most


def test_a_window_of_timesteps() -> None:
    rule = Rule(Trunk(first=1), Interval(2, window=(0.3, 0.8)), storage="residual")
    for decide in ("host", "graph"):
        cached = denoiser(CacheSchedule("window", (rule,)), decide)
        outputs = generate(cached)  # timesteps 1, 0.95, 0.9, ...: inside from step 5 (0.75) to 13 (0.35)
        assert bits(cached) == "RRRRRuRuRuRuRu" + "RRRRRR"
        assert equal(outputs[:5], plain()[:5])


def test_attention_is_broadcast_inside_its_window() -> None:
    """PAB on a text transformer: self-attention every second step, cross-attention every third, between timesteps."""
    model = sample("PixArtTransformer2DModel")
    cached = compile_with_cache(
        model.module, schedules.pab(2, 3, window=(100, 850)), backend="eager", max_programs=None
    )
    args, kwargs = model.args, dict(model.kwargs)
    for moment in (950, 900, 840, 600, 400, 200, 100, 50):
        with torch.no_grad():
            cached(*args, **{**kwargs, "timestep": torch.full_like(kwargs["timestep"], moment)})
    found = {}
    for kind in ("attn1", "attn2"):
        reused = [[name for name in d.reused if name.endswith(kind)] for d in cached.stats().decisions]
        assert {len(names) for names in reused} == {0, 6}
        found[kind] = "".join("u" if names else "R" for names in reused)
    assert found == {"attn1": "RRRuRuRR", "attn2": "RRuRuuRR"}
