"""Reports: one page that needs nothing else, its pictures, and what a browser makes of it."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffcache_fx import compile_with_cache, figures, schedules
from diffcache_fx.comparing import compare
from diffcache_fx.comparison import Comparison
from diffcache_fx.demo.digits import load_digits
from diffcache_fx.demo.run import Digits
from diffcache_fx.page import NAME, Page, picture_of
from diffcache_fx.reporting import comparison_page

STEPS = 6
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--virtual-time-budget=5000"),
)


@pytest.fixture(scope="module")
def found() -> Comparison:
    demo = load_digits()
    given = {
        "interval": schedules.interval(2),
        "first <block>": schedules.first_block_cache(threshold=0.3),
    }
    return compare("digits", demo.model, given, Digits(demo, STEPS), rounds=1, backend="eager")


@pytest.fixture(scope="module")
def folder(found: Comparison, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = comparison_page(found).write(tmp_path_factory.mktemp("report"))
    assert path.name == NAME
    return path.parent


def test_the_page_holds_everything(folder: Path, found: Comparison) -> None:
    text = (folder / NAME).read_text()
    assert "first &lt;block&gt;" in text
    assert "first <block>" not in text
    for row in found.rows:
        assert f"{1000 * row.latency:.1f}" in text
    sources = re.findall(r'(?:src|href)="([^"]{0,40})', text)
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)  # nothing is loaded
    assert len(re.findall(r'<img [^>]*alt="[^"]+"', text)) == len(sources)


def test_pictures_lie_beside_it(folder: Path, found: Comparison) -> None:
    names = {path.name for path in folder.glob("*.png")}
    controls = sum(bool(row.beside) for row in found.rows)
    samples = {f"samples-{index}.png" for index in range(3 + controls)}
    assert names == {"quality.png", "plan-0.png", "plan-1.png", "signal-1.png", *samples}
    for name in names:
        with Image.open(folder / name) as picture:
            colours = np.unique(np.asarray(picture.convert("L")))
        assert len(colours) > 2, name


def test_a_browser_shows_it(folder: Path, tmp_path: Path) -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"opening a report needs one of {', '.join(BROWSERS)}")
    script = (
        "<script>onload = () => { const all = [...document.images];"
        "const shown = all.filter(image => image.complete && image.naturalWidth > 100);"
        "document.body.dataset.shown = shown.length + ' of ' + all.length;"
        "document.body.dataset.wide = document.documentElement.scrollWidth <= innerWidth }</script>"
    )
    page = tmp_path / "page.html"
    page.write_text((folder / NAME).read_text().replace("</body>", script + "</body>"))
    shot = tmp_path / "shot.png"
    command = [browser, *QUIET, f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1100,1400"]
    done = subprocess.run(
        [*command, f"--screenshot={shot}", "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=80
    )
    count = len(list(folder.glob("*.png")))
    assert f'data-shown="{count} of {count}"' in done.stdout, done.stderr[-2000:]
    assert 'data-wide="true"' in done.stdout
    with Image.open(shot) as picture:
        assert len(np.unique(np.asarray(picture.convert("L")))) > 50


def test_a_plan_is_drawn_as_it_was_decided() -> None:
    demo = load_digits()
    cached = compile_with_cache(demo.model, schedules.interval(3), backend="eager", num_steps=STEPS)
    demo.draw(cached, [1], num_steps=STEPS)
    decisions = cached.stats().decisions
    (axis,) = figures.plan_grid(decisions).axes
    grid = np.asarray(axis.images[0].get_array())
    assert grid.tolist() == [[1, 0, 0, 1, 0, 0]]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["transformer_blocks.1..11"]
    assert figures.signals(decisions) is None


def test_images_of_both_kinds_and_none() -> None:
    channels_first, channels_last = torch.rand(3, 1, 8, 8) * 2 - 1, torch.rand(3, 8, 8, 3)
    for images in (channels_first, channels_last):
        grid = picture_of(images)
        assert grid is not None
        assert grid.size == (2 * 3 * 10, 16)
    assert picture_of(torch.rand(4, 16)) is None


def test_text_is_text(tmp_path: Path) -> None:
    page = Page('a "b" <c>')
    page.section("<script>", "x & y")
    page.table(["<i>"], [["<b>"]])
    page.facts({"<u>": "<s>"})
    text = page.write(tmp_path).read_text()
    for raw in ("<script>", "<i>", "<b>", "<u>", "<s>", "<c>"):
        assert raw not in text
    assert "x &amp; y" in text
