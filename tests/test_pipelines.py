"""A real pipeline works unchanged with its denoiser replaced by a cached one."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from diffcache_fx import CacheWarning, compile_with_cache, export, schedules
from diffcache_fx.measure import relative_error
from tests.tiny_pipelines import CASES, AbortedError, Case

pytestmark = pytest.mark.filterwarnings("ignore")
STEPS = 4


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tiny kernels are slower on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture(scope="module")
def plain(case: Case) -> Any:
    """The pipeline as it is, with two prompts' results."""
    pipe = case.build()
    model = case.denoiser(pipe)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pipe, model, case.run(pipe, 0, STEPS), case.run(pipe, 1, STEPS)


def _abort(case: Case, pipe: Any, prompt: int, stop_at: int) -> None:
    with pytest.raises(AbortedError):
        case.run(pipe, prompt, STEPS, stop_at=stop_at)


def _run(case: Case, pipe: Any, prompt: int) -> torch.Tensor:
    """A run in which the library sees nothing unusual."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", CacheWarning)
        return case.run(pipe, prompt, STEPS)


def test_always_is_the_plain_pipeline(case: Case, plain: Any) -> None:
    pipe, model, first, second = plain
    cached = compile_with_cache(model, schedules.always(), backend="eager")
    setattr(pipe, case.component, cached)
    assert case.denoiser(pipe) is cached
    assert torch.equal(case.run(pipe, 0, STEPS), first)
    compilations = cached.stats().compilations
    assert compilations == 1
    assert torch.equal(case.run(pipe, 1, STEPS), second)
    _abort(case, pipe, 1, stop_at=2)
    assert torch.equal(case.run(pipe, 0, STEPS), first)
    assert cached.stats().reused == 0
    assert cached.stats().compilations == compilations
    assert cached.stats().syncs == 0
    setattr(pipe, case.component, model)


def test_interval_keeps_its_plan_and_no_stale_state(case: Case, plain: Any) -> None:
    pipe, model, first, second = plain
    cached = compile_with_cache(model, schedules.interval(2), backend="eager")
    setattr(pipe, case.component, cached)

    def check() -> None:
        stats = cached.stats()
        assert stats.steps == STEPS * len(case.contexts)
        assert {decision.context for decision in stats.decisions} == set(case.contexts)
        for name in case.contexts:
            steps = [decision for decision in stats.decisions if decision.context == name]
            assert [decision.step for decision in steps] == list(range(STEPS))
            assert [bool(decision.reused) for decision in steps] == [step % 2 == 1 for step in range(STEPS)]
            assert not any(decision.reason for decision in steps)
        assert stats.refreshed == math.ceil(STEPS / 2) * len(case.contexts)
        assert stats.reused == STEPS // 2 * len(case.contexts)
        assert stats.cache_bytes > 0

    clean_first = _run(case, pipe, 0)
    check()
    compilations = cached.stats().compilations
    assert compilations == 2
    clean_second = _run(case, pipe, 1)
    check()
    for clean, exact in ((clean_first, first), (clean_second, second)):
        assert bool(torch.isfinite(clean).all())
        assert not torch.equal(clean, exact)  # something was reused
    # once more; after an aborted run of the same prompt, of the other one, at a refresh and at a reuse step
    assert torch.equal(_run(case, pipe, 0), clean_first)
    for prompt, stop_at in ((0, 2), (1, 3)):
        _abort(case, pipe, prompt, stop_at)
        assert torch.equal(_run(case, pipe, 0), clean_first), f"stale after stopping prompt {prompt} at {stop_at}"
        check()
    _abort(case, pipe, 0, stop_at=2)
    assert torch.equal(_run(case, pipe, 1), clean_second)
    # Stopped after its first step, a run that begins at the same timestep may also be a second call of that step: where
    # the pipeline says nothing, one step more is computed, and nothing is reused that a clean run would not reuse.
    _abort(case, pipe, 0, stop_at=1)
    again = case.run(pipe, 0, STEPS)
    computed = [decision for decision in cached.stats().decisions if decision.reason]
    assert all(decision.step <= 1 and "twice" in decision.reason for decision in computed)
    assert torch.equal(again, clean_first) or computed
    assert torch.equal(_run(case, pipe, 0), clean_first)
    check()
    assert cached.stats().compilations == compilations
    assert cached.stats().recaptures == ()
    setattr(pipe, case.component, model)


def test_the_pipeline_sees_the_model(case: Case, plain: Any) -> None:
    """What pipelines ask of a component: its config, dtype and device, and to be moved and listed."""
    pipe, model, _, _ = plain
    cached = compile_with_cache(model, schedules.interval(2), backend="eager")
    setattr(pipe, case.component, cached)
    assert pipe.components[case.component] is cached
    assert case.denoiser(pipe).config is model.config
    assert case.denoiser(pipe).dtype == torch.float32
    assert pipe.device.type == "cpu"
    assert pipe.to("cpu") is pipe
    setattr(pipe, case.component, model)


@pytest.mark.parametrize("name", ["DiTPipeline", "FluxPipeline", "StableDiffusionXLPipeline"])
def test_a_bundle_takes_the_denoisers_place(name: str, tmp_path: Path) -> None:
    """Captured by a run of the pipeline itself, exported, and put back as files."""
    case = next(case for case in CASES if case.name == name)
    pipe = case.build()
    cached = compile_with_cache(case.denoiser(pipe), schedules.interval(2), backend="eager", num_steps=STEPS)
    setattr(pipe, case.component, cached)
    expected = [_run(case, pipe, prompt) for prompt in (0, 1)]
    decided = [(d.context, d.step, d.reused) for d in cached.stats().decisions]
    loaded = export.load_bundle(export.to_onnx(cached, tmp_path / "bundle"))
    setattr(pipe, case.component, loaded)
    found = [_run(case, pipe, prompt) for prompt in (0, 1)]
    assert [(d.context, d.step, d.reused) for d in loaded.stats().decisions] == decided
    assert max(relative_error(a, b) for a, b in zip(found, expected, strict=True)) < 1e-3
