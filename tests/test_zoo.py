"""The corpus builds, runs, and no part of a model is ignored by its output."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bench.zoo import CORE, NOT_BUILT, Entry, corpus, stacks, tensors
from bench.zoo.check import argument, problems


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
    return corpus()[request.param]


def test_core_is_large_and_named() -> None:
    assert len(CORE) >= 24
    assert len(set(CORE)) == len(CORE)
    assert set(CORE) <= set(corpus())
    assert all(name == entry.name for name, entry in corpus().items())


def test_every_denoiser_of_diffusers_is_here_or_has_a_reason() -> None:
    assert all(len(reason) > 10 for reason in NOT_BUILT.values())
    assert not set(NOT_BUILT) & {name.split("-")[0] for name in corpus()}


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
