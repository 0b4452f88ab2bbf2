"""The corpus builds, runs, and no part of a model is ignored by its output."""

from __future__ import annotations

from collections.abc import Iterator

import diffusers
import pytest
import torch
from diffusers.models import transformers, unets
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from bench.zoo import CORE, NOT_BUILT, Entry, corpus, published, stacks, tensors
from bench.zoo.check import argument, problems
from bench.zoo.entry import denoiser_class


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Tiny kernels are slower on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=CORE)
def entry(request: pytest.FixtureRequest) -> Entry:
    """Every entry that the other tests run."""
    found = corpus()[request.param]
    older = tuple(int(part) for part in diffusers.__version__.split(".")[:2]) < (0, 42)
    if older and found.family != "plain":
        try:
            denoiser_class(found.name.split("-")[0])
        except ImportError as error:
            pytest.skip(str(error))
    return found


def test_core_is_large_and_named() -> None:
    assert len(CORE) >= 24
    assert len(set(CORE)) == len(CORE)
    assert set(CORE) <= set(corpus())
    assert all(name == entry.name for name, entry in corpus().items())


def test_every_denoiser_of_diffusers_is_here_or_has_a_reason() -> None:
    named = {name.split("-")[0] for name in corpus()}
    assert all(len(reason) > 10 for reason in NOT_BUILT.values())
    assert not set(NOT_BUILT) & named
    if not diffusers.__version__.startswith("0.42."):
        pytest.skip("the corpus lists the classes of diffusers 0.42")
    public = {
        name
        for module in (transformers, unets)
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, torch.nn.Module)
    }
    assert len(public) > 80
    assert public <= named | set(NOT_BUILT)


@pytest.mark.parametrize("name", ["FLUX.1-dev", "SD-1.5", "SDXL", "SD3-medium", "Wan2.1-T2V-14B", "HunyuanVideo"])
def test_published_runs_without_memory(name: str) -> None:
    model = published()[name]
    with FakeTensorMode(), torch.no_grad():
        module, (args, kwargs) = model.build(), model.inputs()
        output = module(*args, **kwargs)[0]
    assert isinstance(output, FakeTensor)
    billions = {"FLUX.1-dev": 11.9, "SD-1.5": 0.86, "SDXL": 2.57, "SD3-medium": 2.03, "Wan2.1-T2V-14B": 14.3}
    size = sum(p.numel() for p in module.parameters()) / 1e9
    assert size == pytest.approx(billions.get(name, 12.8), rel=0.01)
    latent = args[0] if args else kwargs["hidden_states"]
    assert output.shape == latent.shape


def test_core_entry_is_sound(entry: Entry) -> None:
    model, arguments = entry.build(), entry.inputs(0)
    assert not model.training
    assert sum(len(blocks) for blocks in stacks(model).values()) >= 4
    assert problems(entry, model, arguments) == []


def test_core_entry_is_drawn_from_its_seed(entry: Entry) -> None:
    with torch.no_grad():
        torch.manual_seed(1)
        (args, kwargs), first = entry.inputs(3), entry.build()
        torch.manual_seed(2)
        (args_again, kwargs_again), second = entry.inputs(3), entry.build()
        left, right = tensors(first(*args, **kwargs)), tensors(second(*args_again, **kwargs_again))
    assert all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
    # a drawn weight is neither zero nor huge, and the batch leaves room for guidance
    assert all(bool(p.any()) for p in first.parameters())
    assert max(float(t.abs().max()) for t in left) < 100
    latent = argument((args, kwargs), entry.latent)
    assert len(latent) == 2
    assert not torch.equal(latent[0], latent[1])
