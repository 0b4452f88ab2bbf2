"""The demo model's images through ONNX Runtime, in every form, against the denoiser they were exported from."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffcache_fx import export
from diffcache_fx.measure import psnr

from .conftest import digits_denoiser
from .drawing import SCHEDULES, STEPS, decided_alike, drawn, forced, margins, sampler

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("form", [None, "branch"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_same_images(name: str, form: str | None, tmp_path: Path) -> None:
    cached = digits_denoiser(SCHEDULES[name], STEPS, "graph" if form == "branch" else "host")
    loaded = export.load_bundle(export.to_onnx(cached, tmp_path / "bundle", form))
    expected, found = drawn(cached, sampler()), drawn(loaded, sampler())
    print(name, margins(loaded))
    decided_alike(loaded, cached)
    assert psnr(found, expected) > 60


@pytest.mark.parametrize("form", ["pair", "branch"])
def test_the_same_images_with_decisions_forced(form: str, tmp_path: Path) -> None:
    """What the first-block guard decided, as a plan from outside."""
    adaptive = SCHEDULES["first-block"]
    guided = digits_denoiser(adaptive, STEPS)
    expected = drawn(guided, sampler())
    planned = digits_denoiser(forced(adaptive, guided), STEPS, "graph" if form == "branch" else "host")
    loaded = export.load_bundle(export.to_onnx(planned, tmp_path / "bundle", form))
    found = drawn(loaded, sampler())
    decided_alike(loaded, guided)
    assert psnr(found, expected) > 60
