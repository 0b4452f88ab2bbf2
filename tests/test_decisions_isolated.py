"""Decisions leave nothing stale behind; and what is said about them afterwards."""

from __future__ import annotations

import math
import threading
from typing import Any

import pytest
import torch

from diffcache_fx import (
    compile_with_cache,
    schedules,
)

from .conftest import equal, sample
from .deciding import (
    KINDS,
    MODES,
    STEPS,
    bits,
    denoiser,
    generate,
    go_on,
    run,
    start,
    strict,
    threshold,
)

pytestmark = pytest.mark.usefixtures("one_thread")


# --- isolation ---


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
