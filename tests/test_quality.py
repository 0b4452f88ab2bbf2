"""The metrics of `bench.quality` on crafted inputs, with known values and closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench.quality import (
    Estimate,
    FrechetDistance,
    Neighbourhoods,
    difference,
    distance_estimate,
    mean_estimate,
    probability_of_none,
    psnr_each,
    score,
    shown_of_many,
    ssim_each,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_psnr_of_known_errors() -> None:
    reference = torch.zeros(3, 1, 32, 32)
    images = reference + torch.tensor([0.2, 0.02, 0.0])[:, None, None, None]
    found = psnr_each(images, reference)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found[:2], torch.tensor([20.0, 40.0], dtype=torch.float64), rtol=0, atol=1e-4)
    assert found[2] == pytest.approx(96.33, abs=0.01)
    with pytest.raises(ValueError, match="differ in shape"):
        psnr_each(images, reference[:2])


def test_ssim() -> None:
    images = noise(4, 1, 32, 32).clamp(-1, 1)
    torch.testing.assert_close(ssim_each(images, images), torch.ones(4, dtype=torch.float64))
    mixed = ssim_each(torch.cat((images[:1], -images[:1])), images[:1].expand(2, 1, 32, 32))
    assert mixed[0] == pytest.approx(1)
    assert mixed[1] < 0
    assert ssim_each(images[:1], images[:1]).shape == (1,)
    # Two constant images differ in luminance only: (2 a b + c) / (a^2 + b^2 + c) on [0, 1], with c = 0.01^2.
    flat = torch.zeros(1, 1, 32, 32)
    expected = (2 * 0.5 * 0.75 + 1e-4) / (0.5**2 + 0.75**2 + 1e-4)
    assert float(ssim_each(flat + 0.5, flat)[0]) == pytest.approx(expected, abs=1e-6)


def gaussian(count: int, mean: Tensor, covariance: Tensor) -> Tensor:
    """Rows [count, D] whose sample mean and covariance are exactly these."""
    rows = noise(count, len(mean)).double()
    rows = rows - rows.mean(0)
    whitening = torch.linalg.inv(torch.linalg.cholesky(rows.T.cov()))
    return rows @ whitening.T @ torch.linalg.cholesky(covariance).T + mean


def test_frechet_distance_in_closed_form() -> None:
    one, two = torch.diag(torch.tensor([1.0, 4.0, 9.0])).double(), torch.diag(torch.tensor([4.0, 4.0, 1.0])).double()
    shift = torch.tensor([1.0, -2.0, 0.5]).double()
    first, second = gaussian(50, torch.zeros(3).double(), one), gaussian(80, shift, two)
    distance = FrechetDistance(first)
    expected = float(shift.square().sum() + (one.diag().sqrt() - two.diag().sqrt()).square().sum())
    assert distance(second) == pytest.approx(expected, rel=1e-9)
    assert distance(first) == pytest.approx(0, abs=1e-9)
    assert distance(second) == pytest.approx(expected, rel=1e-9)  # the reference is kept, what was measured is not


def test_frechet_distance_of_covariances_that_do_not_commute() -> None:
    one = torch.tensor([[2.0, 0.6], [0.6, 1.0]]).double()
    two = torch.tensor([[1.0, -0.4], [-0.4, 3.0]]).double()
    values, vectors = torch.linalg.eigh(one)
    root = vectors @ torch.diag(values.sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ two @ root).sqrt().sum()
    zero = torch.zeros(2).double()
    found = FrechetDistance(gaussian(40, zero, one))(gaussian(60, zero, two))
    assert found == pytest.approx(float(one.trace() + two.trace() - 2 * cross), rel=1e-9)


def test_intervals_contain_the_value() -> None:
    values = noise(200).double()
    found = mean_estimate(values)
    assert found.value == pytest.approx(float(values.mean()))
    assert found.low < found.value < found.high
    assert found.high - found.low == pytest.approx(2 * 1.96 / 200**0.5, rel=0.2)
    assert found == mean_estimate(values)
    assert mean_estimate(torch.ones(5)) == Estimate(1.0, 1.0, 1.0)
    distance = FrechetDistance(noise(500, 8, seed=1))
    near, far = distance_estimate(noise(60, 8, seed=2), distance), distance_estimate(noise(60, 8, seed=2) + 1, distance)
    for estimate in (near, far):
        assert 0 <= estimate.low < estimate.value < estimate.high
    assert far.low > near.high
    assert far == distance_estimate(noise(60, 8, seed=2) + 1, distance)


class Classifier:
    """Reads the class from the first pixel; the features are the first pixels."""

    def predict(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return (images[:, 0, 0, 0] * 10).round().long(), images[:, 0, 0, :4]


def test_score() -> None:
    images = noise(10, 1, 32, 32).clamp(-1, 1)
    images[:, 0, 0, 0] = torch.arange(10) / 10
    labels = torch.arange(10)
    labels[0] = 5
    distance = FrechetDistance(images[:, 0, 0, :4])
    found = score(images, labels, Classifier().predict, distance, images)
    assert found["accuracy"].value == pytest.approx(0.9)
    assert found["ssim"].value == pytest.approx(1)
    assert found["frechet"].value == pytest.approx(0, abs=1e-9)
    assert set(score(images, labels, Classifier().predict, distance, None)) == {"accuracy", "frechet"}


def test_precision_and_recall() -> None:
    """Two clouds of real rows; what is drawn lies in one of them, and beside both."""
    clouds = torch.cat((noise(300, 4), noise(300, 4, seed=1) + 50))
    found = Neighbourhoods(clouds)(torch.cat((noise(60, 4, seed=2), noise(20, 4, seed=3) - 50)))
    assert {name: len(rows) for name, rows in found.items()} == {"precision": 80, "recall": 80}
    assert float(found["precision"][:60].mean()) > 0.9
    assert float(found["precision"][60:].sum()) == 0
    assert float(found["recall"].mean()) == pytest.approx(0.5, abs=0.15)
    same = Neighbourhoods(clouds)(clouds)
    assert float(same["precision"].mean()) == float(same["recall"].mean()) == 1


def test_differences_are_told_more_sharply_than_the_figures() -> None:
    """Of features of the same noise, most of the spread is the noise's."""
    source = torch.Generator().manual_seed(0)
    real, ours = (torch.randn(400, 4, generator=source, dtype=torch.float64) for _ in range(2))
    distance = FrechetDistance(real)
    near, far = (distance_estimate(features, distance) for features in (ours, ours * 1.05))
    found = difference(far, near)
    assert found.value == pytest.approx(far.value - near.value)
    assert near.high > far.low  # by themselves they cannot be told apart
    assert found.low > 0
    assert (difference(near, near).low, difference(near, near).high) == (0.0, 0.0)
    with pytest.raises(ValueError, match="100 and 0 draws"):
        difference(near, Estimate(1.0, 0.9, 1.1))


def test_what_is_shown_when_many_are_looked_at() -> None:
    assert shown_of_many([0.03, 0.01, 0.6]) == [False, True, False]  # 0.01 < 0.05 / 3, but 0.03 > 0.05 / 2
    assert shown_of_many([0.02, 0.01, 0.6]) == [True, True, False]
    assert shown_of_many([0.02, 0.02, 0.02]) == [False] * 3
    assert shown_of_many([]) == []


def test_probability_of_no_difference() -> None:
    draws = tuple(float(value) for value in torch.linspace(-1.0, 1.0, 101, dtype=torch.float64))
    spread = float(torch.tensor(draws).std())
    assert probability_of_none(Estimate(1.96 * spread, 0.0, 0.0, draws)) == pytest.approx(0.05, rel=0.01)
    assert probability_of_none(Estimate(-1.96 * spread, 0.0, 0.0, draws)) == pytest.approx(0.05, rel=0.01)
    assert probability_of_none(Estimate(0.0, 0.0, 0.0, (0.0, 0.0))) == 1.0
    with pytest.raises(ValueError, match="without its draws"):
        probability_of_none(Estimate(1.0, 0.9, 1.1))
