"""The shipped demo: its files, its size, what its samples look like to the classifier, and the sampler's promises."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib import resources
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from diffcache_fx.demo import digits
from diffcache_fx.demo.demo import Demo
from diffcache_fx.demo.digits import load_digits
from diffcache_fx.demo.files import build, read_tensors
from diffcache_fx.demo.run import DEFAULT_SCHEDULES, default_schedules
from diffcache_fx.demo.sampling import generate, image_grid, initial_noise, sample_generators


@pytest.fixture(scope="module")
def demo() -> Demo:
    return load_digits()


def size_of(name: str) -> int:
    return len((resources.files("diffcache_fx.demo") / name).read_bytes())


def test_files_are_small() -> None:
    assert 6_000_000 < size_of(digits.WEIGHTS) <= 12_000_000
    assert size_of(digits.CLASSIFIER) < 1_000_000
    assert size_of(digits.REFERENCE) < 2_000_000


def test_weights_are_float16_and_finite() -> None:
    for name in (digits.WEIGHTS, digits.CLASSIFIER):
        floating = [v for v in read_tensors(name).values() if v.is_floating_point()]
        assert {v.dtype for v in floating} == {torch.float16}
        assert all(v.isfinite().all() for v in floating)


def test_model_shape(demo: Demo) -> None:
    parameters = sum(p.numel() for p in demo.model.parameters())
    assert 3_000_000 <= parameters <= 6_000_000
    blocks = demo.model.get_submodule("transformer_blocks")
    assert len(list(blocks.children())) == 12
    assert not demo.model.training
    assert {p.dtype for p in demo.model.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in demo.model.parameters())
    assert demo.image_shape == (1, 32, 32)
    assert (demo.num_classes, demo.null_class) == (10, 10)


def test_dtype_is_the_denoisers_only() -> None:
    demo = load_digits(torch.bfloat16)
    assert {p.dtype for p in demo.model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in demo.classifier.parameters()} == {torch.float32}


def test_scheduler_is_fresh(demo: Demo) -> None:
    first, second = demo.scheduler(), demo.scheduler()
    assert first is not second
    first.set_timesteps(7)
    assert len(first.timesteps) == 7
    assert len(second.timesteps) == 1000


def test_unknown_class_name_is_an_error() -> None:
    with pytest.raises(ValueError, match="no class 'NoSuchModel'"):
        build({"_class_name": "NoSuchModel"})


def test_reference_features(demo: Demo) -> None:
    assert demo.reference_features.shape == (10_000, 64)
    assert demo.reference_features.dtype == torch.float32
    assert demo.reference_labels.shape == (10_000,)
    assert demo.reference_labels.bincount(minlength=10).min() > 800
    read = demo.classifier.head(demo.reference_features).argmax(1)
    assert (read == demo.reference_labels).float().mean() > 0.992


def test_samples_are_the_digits_asked_for(demo: Demo) -> None:
    labels = torch.arange(64) % 10
    images = generate(demo.model, demo.scheduler(), labels, num_steps=20, guidance_scale=demo.guidance_scale, seed=3)
    assert images.shape == (64, 1, 32, 32)
    assert images.dtype == torch.float32
    assert images.min() >= -1
    assert images.max() <= 1
    read, features = demo.classifier.predict(images)
    assert (read == labels).float().mean() >= 0.9
    assert features.shape == (64, 64)
    assert images[:, :, 0].mean() < -0.95  # the border is background
    assert images[labels == 0].std(0).max() > 0.3  # zeros differ from one another


def test_noise_belongs_to_the_sample() -> None:
    whole = initial_noise(sample_generators(5, 0, 6), (1, 32, 32))
    part = initial_noise(sample_generators(5, 4, 2), (1, 32, 32))
    assert torch.equal(whole[4:], part)
    assert len({float(noise.sum()) for noise in whole}) == 6
    assert not torch.equal(whole, initial_noise(sample_generators(6, 0, 6), (1, 32, 32)))


@pytest.mark.parametrize("scheduler_class", [diffusers.DDIMScheduler, diffusers.DDPMScheduler])
def test_batch_size_does_not_change_a_sample(demo: Demo, scheduler_class: Any) -> None:
    def draw(labels: list[int], **options: Any) -> Tensor:
        scheduler = scheduler_class.from_config(demo.scheduler().config)
        return generate(demo.model, scheduler, labels, num_steps=4, guidance_scale=2.0, seed=1, **options)

    labels = [3, 1, 4, 1, 5]
    whole = draw(labels)
    assert torch.equal(whole, draw(labels))
    torch.testing.assert_close(whole, draw(labels, batch_size=2), atol=2e-3, rtol=0)
    torch.testing.assert_close(whole[3:], draw(labels[3:], first_index=3), atol=2e-3, rtol=0)
    torch.testing.assert_close(whole, draw(labels, batched_guidance=False), atol=2e-3, rtol=0)
    assert (whole[1] - whole[3]).abs().max() > 0.1  # the same class, another sample


class Recorder(nn.Module):
    """Answers with its input and notes how it was called."""

    def __init__(self, answer: str = "tuple", fail: bool = False) -> None:
        super().__init__()
        self.answer, self.fail, self.resets = answer, fail, 0
        self.context: str | None = None
        self.calls: list[tuple[str | None, int, list[int]]] = []

    @contextlib.contextmanager
    def cache_context(self, name: str) -> Iterator[None]:
        self.context = name
        yield
        self.context = None

    def _reset_stateful_cache(self) -> None:
        self.resets += 1

    def forward(self, hidden_states: Tensor, timestep: Tensor, class_labels: Tensor) -> Any:
        assert timestep.dtype == torch.int64
        assert timestep.shape == class_labels.shape == (len(hidden_states),)
        assert not torch.is_grad_enabled()
        if self.fail:
            raise RuntimeError("boom")
        self.calls.append((self.context, int(timestep[0]), class_labels.tolist()))
        output = hidden_states * 0.1
        return {"tuple": (output,), "tensor": output, "sample": SimpleNamespace(sample=output)}[self.answer]


@pytest.mark.parametrize("answer", ["tuple", "tensor", "sample"])
def test_two_calls_a_step_in_their_contexts(answer: str) -> None:
    recorder, seen = Recorder(answer), []
    generate(
        recorder,
        diffusers.DDIMScheduler(),
        [1, 2, 3],
        num_steps=2,
        guidance_scale=2.0,
        batch_size=2,
        batched_guidance=False,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert [call[0] for call in recorder.calls] == ["cond", "uncond"] * 4
    assert [call[2] for call in recorder.calls] == [[1, 2], [10, 10]] * 2 + [[3], [10]] * 2
    assert [call[1] for call in recorder.calls] == [500, 500, 0, 0] * 2
    assert recorder.resets == 2
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_one_call_a_step() -> None:
    recorder = Recorder()
    generate(recorder, diffusers.DDIMScheduler(), [1, 2], num_steps=3, guidance_scale=2.0)
    assert [(call[0], call[2]) for call in recorder.calls] == [("cond_uncond", [1, 2, 10, 10])] * 3
    recorder = Recorder()
    generate(recorder, diffusers.DDIMScheduler(), [1, 2], num_steps=3, guidance_scale=1.0)
    assert [(call[0], call[2]) for call in recorder.calls] == [("cond", [1, 2])] * 3


def test_cache_is_reset_after_a_failure() -> None:
    recorder = Recorder(fail=True)
    with pytest.raises(RuntimeError, match="boom"):
        generate(recorder, diffusers.DDIMScheduler(), [1], num_steps=2)
    assert recorder.resets == 1


def test_wrong_arguments() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        generate(Recorder(), diffusers.DDIMScheduler(), [1], num_steps=0)
    with pytest.raises(ValueError, match="one list"):
        generate(Recorder(), diffusers.DDIMScheduler(), torch.zeros(2, 2), num_steps=1)
    assert generate(Recorder(), diffusers.DDIMScheduler(), [], num_steps=1).shape == (0, 1, 32, 32)


def test_grid() -> None:
    images = torch.full((3, 1, 4, 4), -1.0)
    images[2] = 1.0
    grid = image_grid(images, columns=2, gap=1)
    assert grid.shape == (9, 9)
    assert grid.dtype == torch.uint8
    assert grid[5:, :4].unique().tolist() == [255]
    assert int(grid.float().sum()) == 255 * 16


def test_the_shipped_schedule_is_of_the_shipped_model(demo: Demo) -> None:
    found = default_schedules("digits", 50)["calibrated"]
    assert found.made_for is not None
    found.made_for.check_model(demo.model)
    scheduler = demo.scheduler()
    scheduler.set_timesteps(50)
    assert list(found.made_for.timesteps) == [float(step) for step in scheduler.timesteps]
    assert list(default_schedules("digits", 20)) == list(DEFAULT_SCHEDULES)
