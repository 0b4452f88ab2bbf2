"""Scale-shift corrections fitted to the cached model's own runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diffcache_fx import CacheSchedule, compile_with_cache, schedules
from diffcache_fx.alignment import fit_scale_shift, train_scale_shift
from diffcache_fx.errors import CacheError, CalibrationError
from diffcache_fx.learners import embedding

from .toy import MODEL, STEPS, Denoiser, sampler

pytestmark = pytest.mark.usefixtures("one_thread")
# Blocks in turn, each held for three steps.
BITS = tuple(tuple(int((step + block) % 3 == 0 or step == 0) for block in range(6)) for step in range(STEPS))
PLAN = schedules.block_cache(BITS)


def error(schedule: CacheSchedule, seeds: range = range(50, 54), **options: Any) -> float:
    """Mean square error of the final samples, on noise that nothing was fitted to."""
    with torch.no_grad():
        cached = compile_with_cache(MODEL, schedule, backend="eager", max_programs=None, **options)
        return sum(float((sampler(cached, seed) - sampler(MODEL, seed)).square().mean()) for seed in seeds) / len(seeds)


@pytest.fixture(scope="module")
def fitted() -> CacheSchedule:
    return fit_scale_shift(MODEL, sampler, PLAN, describe="Euler")


@pytest.fixture(scope="module")
def trained() -> CacheSchedule:
    return train_scale_shift(MODEL, sampler, PLAN, iterations=200)


def test_reused_values_come_nearer(fitted: CacheSchedule, trained: CacheSchedule) -> None:
    plain = error(PLAN)
    assert error(fitted) < 0.5 * plain
    assert error(trained) < 0.5 * plain


def test_several_generations_and_other_backends(fitted: CacheSchedule) -> None:
    more = fit_scale_shift(MODEL, sampler, PLAN, generations=3, backend="aot_eager")
    assert error(more) < 0.5 * error(PLAN)
    assert more.rules[0].correction != fitted.rules[0].correction


def test_the_same_decisions_in_the_graph(fitted: CacheSchedule) -> None:
    assert error(fitted, decide="graph") == pytest.approx(error(fitted), rel=1e-4)


def test_steps_that_compute_stay_as_they_are(fitted: CacheSchedule) -> None:
    correction = fitted.rules[0].correction
    assert correction is not None
    for block, table in enumerate(correction.tables()):
        computed = [bool(row[block]) for row in BITS]
        blank = torch.tensor([1.0, 0.0])[:, None].expand(2, 16)
        assert [bool((row == blank).all()) for row in table] == computed


def test_a_fit_is_for_its_model_and_run(fitted: CacheSchedule) -> None:
    assert fitted.made_for is not None
    assert (fitted.made_for.steps, fitted.made_for.sampler) == (STEPS, "Euler")
    assert CacheSchedule.from_json(fitted.to_json()) == fitted
    torch.manual_seed(1)
    other = Denoiser().eval()
    other.blocks[0].inner[0].weight.data.mul_(2.0)  # type: ignore[index, union-attr, operator]
    with pytest.raises(CalibrationError, match="other weights"):
        compile_with_cache(other, fitted)


def test_embeddings_tell_timesteps_apart() -> None:
    made = embedding(torch.linspace(1.0, 0.02, 50))
    assert made.shape == (50, 129)
    assert torch.linalg.matrix_rank(made.double()) > 20
    torch.testing.assert_close(made, embedding(torch.linspace(1000.0, 20.0, 50)))


class TestRefusals:
    def test_decisions_at_run_time(self) -> None:
        with pytest.raises(CalibrationError, match="decides as it runs"):
            fit_scale_shift(MODEL, sampler, schedules.first_block_cache(0.1), num_steps=STEPS)

    def test_an_unknown_number_of_steps(self) -> None:
        with pytest.raises(CalibrationError, match="pass num_steps="):
            fit_scale_shift(MODEL, sampler, schedules.interval(3))
        with pytest.raises(CalibrationError, match=f"in {STEPS} steps, and corrections are for 7"):
            fit_scale_shift(MODEL, sampler, schedules.interval(3), num_steps=7)

    def test_nothing_to_align(self) -> None:
        with pytest.raises(CalibrationError, match="reuses nothing"):
            train_scale_shift(MODEL, sampler, schedules.mask([1] * STEPS))

    def test_what_it_was_made_for_stays(self, fitted: CacheSchedule) -> None:
        other = Denoiser().eval()
        other.head.weight.data.mul_(2.0)
        with pytest.raises(CalibrationError, match="other weights"):
            fit_scale_shift(other, sampler, fitted)

    def test_options_and_backends(self) -> None:
        with pytest.raises(CacheError, match="nonsense"):
            fit_scale_shift(MODEL, sampler, PLAN, nonsense=True)
        with pytest.raises(CalibrationError, match="keep the tables"):
            fit_scale_shift(MODEL, sampler, PLAN, backend="torch_tensorrt")

    def test_calls_of_several_kinds(self) -> None:
        def uneven(denoiser: Any, seed: int) -> torch.Tensor:
            for samples in (2, 3):
                for step in range(STEPS):
                    out = denoiser(torch.zeros(samples, 16), torch.tensor(1.0 - step / STEPS))
            return out

        with pytest.raises(CalibrationError, match=r"corrections are for 12|different ways"):
            fit_scale_shift(MODEL, uneven, PLAN)


def test_a_sampler_in_inference_mode() -> None:
    def inferring(denoiser: Any, seed: int) -> torch.Tensor:
        with torch.inference_mode():
            return sampler(denoiser, seed)

    made = train_scale_shift(MODEL, inferring, PLAN, iterations=5).rules[0].correction
    assert made is not None
    blank = torch.tensor([1.0, 0.0])[:, None]
    assert all(bool((table != blank).any()) for table in made.tables())
