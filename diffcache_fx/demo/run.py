"""The demo: a grid of digits drawn with the uncached compiled model and with cached ones, side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from diffcache_fx.arguments import parse_schedule
from diffcache_fx.comparing import Progress, compare
from diffcache_fx.comparison import Comparison
from diffcache_fx.models import Call, load_demo
from diffcache_fx.schedule import CacheSchedule
from diffcache_fx.workload import Denoiser, image_fidelity

from .demo import Demo
from .sampling import image_grid

SEED = 0
DEFAULT_SCHEDULES = (
    "interval:every=2,forecast=linear",
    "interval:every=3,forecast=linear",
    "interval:every=5,forecast=linear",
    "fora:interval=3",
)
TABLE, DATA = "table.md", "table.json"
# MODEL-STEPS-steps.json, made by `diffcache-fx calibrate MODEL --steps STEPS --speedup 2.3`.
_SHIPPED = Path(__file__).parent


class _Enough(Exception):  # noqa: N818 - a signal, not an error
    """Ends a generation that was only meant to warm up."""


@dataclass
class Digits:
    """A workload: each turn draws one picture of a demo - an image for each label it shows - with guidance, in one
    batch."""

    demo: Demo
    steps: int = 50
    unit: str = "image"

    @property
    def units(self) -> int:
        return len(self.demo.shown)

    @property
    def example(self) -> Call:
        return self.demo.example()

    def generate(self, denoiser: Denoiser, turn: int, limit: int | None, tick: Callable[[], None]) -> Tensor | None:
        """Images [10, *image_shape] in [-1, 1]; the noise depends on the turn and the label alone."""

        def progress(done: int, total: int) -> None:
            tick()
            if limit is not None and done >= limit:
                raise _Enough

        try:
            return self.demo.draw(
                denoiser,
                self.demo.shown,
                num_steps=self.steps,
                seed=SEED,
                batch_size=self.units,
                progress=progress,
                first_index=turn * self.units,
            )
        except _Enough:
            return None

    def shorter(self, steps: int) -> Digits:
        return replace(self, steps=steps)

    def fidelity(self, outputs: list[Tensor], reference: list[Tensor]) -> dict[str, float]:
        """PSNR to the uncached images, and the share of images in which the classifier reads what was asked for."""
        read, _ = self.demo.read(torch.cat(outputs))
        wanted = torch.tensor(self.demo.shown).repeat(len(outputs))
        return {**image_fidelity(outputs, reference), "accuracy": float((read == wanted).float().mean())}


def default_schedules(name: str, steps: int) -> dict[str, CacheSchedule]:
    """What a demo shows when it is asked for nothing else; with the schedule calibrated for this model and number of
    steps first, where one is shipped."""
    path = _SHIPPED / f"{name}-{steps}-steps.json"
    calibrated = {"calibrated": CacheSchedule.from_pretrained(path)} if path.exists() else {}
    return calibrated | {text: parse_schedule(text) for text in DEFAULT_SCHEDULES}


def run_demo(
    schedules: Mapping[str, CacheSchedule],
    out: Path,
    *,
    name: str = "digits",
    steps: int = 50,
    images: int = 5,
    backend: str = "inductor",
    progress: Progress | None = None,
) -> Comparison:
    """Draw `images` pictures of the demo `name` with every contender; write picture, table and data into the folder
    `out`."""
    demo = load_demo(name)
    work = Digits(demo, steps)
    found = compare(name, demo.model, schedules, work, rounds=images, backend=backend, progress=progress)
    write(found, out)
    return found


def write(found: Comparison, out: Path) -> None:
    """The picture and the table of a finished comparison."""
    out.mkdir(parents=True, exist_ok=True)
    picture(found).save(out / f"{found.model}.png")
    title = f"# {found.model}, {found.steps} steps, {found.backend}"
    (out / TABLE).write_text(f"{title}\n\n{found.markdown()}\n{NOTES}{found.unsteady}".rstrip() + "\n")
    (out / DATA).write_text(found.json())


NOTES = """Latency: median over generations of ten images, all schedules in turn in one run. Ideal: speed-up by executed
FLOPs. PSNR: to the uncached images of the same noise. Accuracy: share of images read as the class asked for. Uncached
in fewer steps: as many as cost what the schedule above costs.
"""


def picture(found: Comparison, columns: int = 2, scale: int = 2, margin: int = 12) -> Image.Image:
    """One grid for each contender, a row for each turn, with captions; grids side by side in `columns`; where there are
    controls, each beside its schedule."""
    font, small = ImageFont.load_default(18), ImageFont.load_default(14)
    panels: list[Image.Image | None] = []
    paired = any(row.beside for row in found.rows)
    for row in found.rows:
        if paired and not row.beside and len(panels) % 2:
            panels.append(None)
        grid = Image.fromarray(image_grid(torch.cat(found.outputs[row.name])).numpy())
        grid = grid.resize((grid.width * scale, grid.height * scale), Image.Resampling.BICUBIC)
        panel = Image.new("L", (grid.width, grid.height + 52), 255)
        panel.paste(grid, (0, 52))
        draw = ImageDraw.Draw(panel)
        draw.text((0, 2), row.name, fill=0, font=font)
        draw.text((0, 28), _caption(found, row.name), fill=70, font=small)
        panels.append(panel)
    lines = -(-len(panels) // columns)
    across = min(columns, len(panels))
    width, height = next(panel.size for panel in panels if panel is not None)
    size = (across * (width + margin) + margin, lines * (height + margin) + margin)
    canvas = Image.new("L", size, 255)
    for index, drawn in enumerate(panels):
        if drawn is None:
            continue
        down, right = divmod(index, columns)
        canvas.paste(drawn, (margin + right * (width + margin), margin + down * (height + margin)))
    return canvas


def _caption(found: Comparison, name: str) -> str:
    row = next(row for row in found.rows if row.name == name)
    parts = [f"{1000 * row.latency:.0f} ms per image"]
    if name != found.timings.baseline:
        parts.append(f"{found.told(row.speedup)}x the speed (ideal {row.ideal:.2f}x)")
        if math.isfinite(row.fidelity["psnr_db"]):
            parts.append(f"PSNR {row.fidelity['psnr_db']:.1f} dB")
    parts.append(f"{100 * row.fidelity['accuracy']:.0f} % read as asked")
    return ", ".join(parts)
