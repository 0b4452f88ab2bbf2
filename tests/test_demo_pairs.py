"""The second demo: its files, its prompts, and what its samples look like to the classifier."""

from __future__ import annotations

from importlib import resources

import pytest
import torch

from diffcache_fx.demo import pairs
from diffcache_fx.demo.demo import Demo
from diffcache_fx.demo.files import read_tensors
from diffcache_fx.demo.pairs import load_pairs, prompt_of
from diffcache_fx.demo.prompts import END, START, tokens_of


@pytest.fixture(scope="module")
def demo() -> Demo:
    return load_pairs()


def test_the_weights_are_small_float16_and_finite() -> None:
    size = len((resources.files("diffcache_fx.demo") / pairs.WEIGHTS).read_bytes())
    assert 2_000_000 < size <= 12_000_000
    tensors = read_tensors(pairs.WEIGHTS).values()
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {torch.float16}
    assert all(tensor.isfinite().all() for tensor in tensors)


def test_prompts() -> None:
    assert (prompt_of(37), prompt_of(5), prompt_of(100)) == ("3 7", "0 5", "")
    assert tokens_of(["3 7", ""]).tolist() == [[START, 3, 7, END], [START, END, END, END]]
    assert tokens_of([]).shape == (0, 4)
    for wrong in ("3", "3 7 1", "a 1", "37"):
        with pytest.raises(ValueError, match="two digits"):
            tokens_of([wrong])


def test_the_order_of_the_digits_matters(demo: Demo) -> None:
    seen = demo.condition(torch.tensor([37, 73, 100]))["encoder_hidden_states"]
    assert seen.shape == (3, 4, 64)
    assert seen.dtype == torch.float32
    assert (seen[0] - seen[1]).abs().max() > 0.1 < (seen[0] - seen[2]).abs().max()
    assert load_pairs(torch.bfloat16).condition(torch.tensor([1]))["encoder_hidden_states"].dtype == torch.bfloat16


def test_real_pairs_are_read_and_a_half_is_not_the_other(demo: Demo) -> None:
    assert demo.reference_features.shape == (10_000, 128)
    left = demo.classifier.head(demo.reference_features[:, :64]).argmax(1)
    right = demo.classifier.head(demo.reference_features[:, 64:]).argmax(1)
    assert (10 * left + right == demo.reference_labels).float().mean() > 0.98
    assert (left == right).float().mean() < 0.2


def test_samples_are_the_pairs_asked_for(demo: Demo) -> None:
    labels = torch.tensor(demo.shown).repeat(2)
    images = demo.draw(demo.model, labels, num_steps=10, seed=3)
    assert images.shape == (20, 1, 32, 64)
    read, features = demo.read(images)
    assert (read == labels).float().mean() >= 0.9
    assert features.shape == (20, 128)
    assert images[:, :, 0].mean() < -0.95  # the border is background


def test_both_halves_of_guidance_in_one_call_or_two(demo: Demo) -> None:
    one, two = (demo.draw(demo.model, [37, 4], num_steps=3, batched_guidance=batched) for batched in (True, False))
    torch.testing.assert_close(one, two, atol=2e-3, rtol=0)
