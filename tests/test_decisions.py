"""Where decisions are taken: on the host, in the graph, with a lag; and for each context by itself."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from bench.zoo import tensors
from diffcache_fx import (
    CacheSchedule,
    Listed,
    Rule,
    compile_with_cache,
    schedules,
)
from diffcache_fx.adaptive import RelativeChange
from diffcache_fx.references import BlocksOutput

from .conftest import argument, equal, sample, steps_of, worst
from .deciding import (
    KINDS,
    MODES,
    NET,
    STEPS,
    Outputs,
    advance,
    bits,
    denoiser,
    generate,
    interleaved,
    plain,
    run,
    start,
    threshold,
)

pytestmark = pytest.mark.usefixtures("one_thread")


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
