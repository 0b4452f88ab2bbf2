"""What goes into the reports of `diffcache-fx bench` and `diffcache-fx calibrate`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from . import figures
from .calibration import Calibration
from .comparison import Comparison
from .errors import CacheError
from .finding import Findings
from .page import Page, picture_of
from .recording import RecordingDenoiser
from .selection import Blocks

_CURVE = 12  # points of a predicted curve


def comparison_page(found: Comparison) -> Page:
    """The table, quality against speed, what each schedule decided and on what signal, images side by side."""
    page = Page(f"{found.model}: schedules compared")
    rounds = len(found.timings.seconds[found.timings.baseline])
    turns = f"{rounds} generation{'s' if rounds > 1 else ''} of {found.steps} steps each"
    page.section("Figures", f"{found.backend}, {turns}, in turn in one run.")
    page.table(found.columns(), [found.cells(row) for row in found.rows])
    images = any("psnr_db" in row.fidelity for row in found.rows)
    kind, label = ("psnr_db", "PSNR, dB") if images else ("error", "relative error")
    curves: dict[str, list[tuple[float, float]]] = {}
    for row in found.rows:
        if kind in row.fidelity:
            name = "uncached, fewer steps" if row.beside else row.name
            curves.setdefault(name, []).append((row.speedup.value, row.fidelity[kind]))
    if any(math.isfinite(y) for points in curves.values() for _, y in points):
        page.section("Quality against speed", "Measured speed-up; quality against the uncached model in all steps.")
        page.picture("quality", figures.quality_against_speed(curves, ylabel=label), f"{label} against speed-up")
    for index, (name, decisions) in enumerate(found.decisions.items()):
        page.section(name, next((row.why for row in found.rows if row.name == name), ""))
        page.picture(f"plan-{index}", figures.plan_grid(decisions), f"{name}: computed and reused, by region and step")
        drawn = figures.signals(decisions)
        if drawn is not None:
            page.picture(f"signal-{index}", drawn, f"{name}: signal against threshold")
    _samples(page, {name: outputs[0] for name, outputs in found.outputs.items() if outputs})
    return page


def calibration_page(model: str, work: Calibration, found: Findings, target: Any) -> Page:
    """The plan, how values change and errors travel, what other budgets would give, samples side by side."""
    page = Page(f"{model}: calibrated for {target}")
    count = len(found.plan.refreshes)
    facts = {
        "refreshes": f"{count} of {work.steps}",
        "speed-up by FLOPs": f"{work.ideal(found.plan):.2f}",
        "mean square error, expected from the plan": f"{found.predicted:.3g}",
        "mean square error, measured on other noise": f"{found.measured:.3g}",
    }
    if found.speedup is not None:
        facts["speed-up, measured"] = f"{found.speedup:.2f}"
    page.section("Result")
    page.facts(facts)
    samples = work.tried(found.plan, work.seed)
    decisions = work.trial.stats().decisions
    page.section("The plan", "Dark: computed; light: filled from refreshed values.")
    page.picture("plan", figures.plan_grid(decisions), "computed and reused, by region and step")
    page.section("How values change", "Relative L1 change from step to step, of each block where the model has blocks.")
    page.picture("changes", figures.change_map(_blocks(work)), "relative L1 change by region and step")
    page.section("How errors travel", "How far the final sample moves for what holding a value changes, by step.")
    titles = [repr(group) for group in work.groups] if len(work.groups) > 1 else ["gain"]
    gains = {title: [float(gain) for gain in own] for title, own in zip(titles, found.gains, strict=True)}
    page.picture("gains", figures.lines(gains, "step", "gain", log=True), "gain by step")
    page.section("Other budgets", "PSNR to the uncached samples as planned for, and as measured here.")
    page.picture("budgets", figures.quality_against_speed(_budgets(work, found), "speed-up by FLOPs"), "PSNR by budget")
    _samples(page, {"uncached": work.reference, "with this plan": samples})
    return page


def _samples(page: Page, batches: dict[str, torch.Tensor]) -> None:
    """A row of images for each batch; nothing where they are no images."""
    grids = {name: grid for name, batch in batches.items() if (grid := picture_of(batch)) is not None}
    if grids:
        page.section("Samples", "The same noise in every row.")
    for index, (name, grid) in enumerate(grids.items()):
        page.text(name)
        page.picture(f"samples-{index}", grid, f"samples, {name}")


def _blocks(work: Calibration) -> Any:
    """A recording of every block by itself; of what was calibrated where the model has none."""
    try:
        recorder = RecordingDenoiser(
            work.model, [(Blocks(first=0, each=True), "auto")], backend=work.backend, **work.backend_options
        )
        work.run(recorder, work.seed)
        return recorder.recording()
    except CacheError:
        return work.recording


def _budgets(work: Calibration, found: Findings) -> dict[str, list[tuple[float, float]]]:
    peak = 2.0 if float(work.reference.min()) < 0 else 1.0

    def decibels(square: float) -> float:
        return 10 * math.log10(peak**2 / square) if square > 0 else math.inf

    counts = np.unique(np.linspace(work.least, work.steps - 1, _CURVE).round().astype(int))
    pixels = work.reference.numel()
    with torch.no_grad():
        predicted = [(work.ideal(int(n)), decibels(work.plan(int(n)).error / pixels)) for n in counts]
    here = (work.ideal(found.plan), decibels(found.measured))
    return {"predicted": predicted, "measured": [here]}
