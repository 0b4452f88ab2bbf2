"""The results of `bench.methods`: each setting beside its controls, as a table, as JSON and as a picture."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.table import Table

from bench.method_runs import Record, Runs
from bench.method_settings import EVEN, UNCACHED, Setting, even_grid, known
from diffcache_fx.measure import Timings
from diffcache_fx.presets.methods import METHODS

METRICS = {"psnr_db": "PSNR, dB", "ssim": "SSIM", "accuracy": "accuracy, %", "frechet": "Fréchet distance"}
SPEEDS = {"ideal_speedup": "speed-up by executed FLOPs", "speedup": "measured speed-up"}
# In the picture, from top to bottom.
DRAWN = (("psnr_db", "ideal_speedup"), ("psnr_db", "speedup"), ("ssim", "ideal_speedup"), ("frechet", "ideal_speedup"))
HEADINGS = ["setting", "FLOPs, %", "ideal", "measured", *METRICS.values()]
NOTES = """Brackets: 95 % bootstrap intervals. FLOPs: executed, of the uncached model's. Ideal: the speed-up these alone
would give. Measured: ratio of median seconds to the uncached compiled model, generations in turn in one run. PSNR and
SSIM: to the uncached images of the same noise. Accuracy: images read as the class asked for. Fréchet distance: squared,
in the classifier's features, to 10,000 real digits; biased upwards alike for equally many images. Under each setting
its controls at the same FLOPs: the uncached model in fewer steps, and the trunk held at even intervals."""


@dataclass
class Report:
    """facts: how it was measured. rows: settings and controls, the reference first; a row's `controls` are keys."""

    facts: dict[str, Any]
    rows: list[Record]

    @classmethod
    def of(cls, runs: Runs, found: Mapping[str, tuple[Setting, Record]], timing: Record) -> Report:
        """found: settings and records by key. timing: what the timing stage wrote, or nothing."""
        rounds = timing.get("rounds", [])
        reference = next((key for key, (setting, _) in found.items() if setting.reference), None)
        times = None
        if rounds and reference in rounds[0]:
            times = Timings({key: np.array([turn[key] for turn in rounds]) for key in rounds[0]}, reference)
        rows, own = [], {setting.key for setting in (*known(), *even_grid(runs.steps))}
        for key, (setting, record) in found.items():
            row = {name: value for name, value in record.items() if name != "config"}
            row |= {"control": setting.control, "reference": setting.reference, "factory": setting.factory}
            if not setting.control:
                options = setting.arguments(lambda: runs.calibration)
                row["options"] = {name: _plain_option(value) for name, value in options.items()}
            row["own"] = key in own
            row["controls"] = [c.key for c in runs.controls(record) if c.key in found and c.key != key]
            if "flops" in record:
                row["flops_share"] = record["flops"]["spent"] / record["flops"]["full"]
            if times is not None and key in times.seconds:
                row["speedup"] = vars(times.speedup(key))
                row["timing"] = {"median_s": times.median(key), "ideal_speedup": timing["ideal"][key]}
            rows.append(row)
        facts = {
            "model": "digits",
            "samples": runs.samples,
            "steps": runs.steps,
            "batch": runs.batch,
            "dtype": str(runs.dtype).removeprefix("torch."),
            "guidance_scale": runs.demo.guidance_scale,
            "backend": runs.backend,
            "timing": {"rounds": len(rounds), **{k: timing["made_for"][k] for k in ("images", "threads")}}
            if times
            else None,
            "versions": {"torch": torch.__version__, "python": platform.python_version()},
            "capability": torch.backends.cpu.get_cpu_capability(),
        }
        return cls(facts, rows)

    def to_dict(self) -> dict[str, Any]:
        return {**self.facts, "rows": self.rows}

    def _lines(self) -> Iterator[tuple[Record, str]]:
        """Rows in the order of the table, each with what stands before its label: controls follow what they are for."""
        by_key = {row["key"]: row for row in self.rows}
        for row in self.rows:
            if "quality" not in row or (row["control"] and not row["reference"] and not row["own"]):
                continue
            yield row, ""
            for key in row["controls"]:
                yield by_key[key], "fewer steps" if by_key[key]["method"] == UNCACHED else "even hold"

    def _refused(self) -> list[str]:
        """The settings that do not apply to the model, and why not."""
        rows = [row for row in self.rows if "quality" not in row]
        return [f"{row['method']}, {row['label']}: not applicable: {row['not_applicable']}" for row in rows]

    def _cells(self, row: Record, role: str) -> list[str]:
        title = f"{role}: {row['label'].removesuffix(' steps')}" if role else f"{row['method']}, {row['label']}"
        speed = "1" if row["reference"] else _shown(row.get("speedup"), 2)
        digits = {"psnr_db": (1, 1), "ssim": (3, 1), "accuracy": (1, 100), "frechet": (2, 1)}
        return [
            title,
            f"{100 * row['flops_share']:.1f}",
            f"{row['ideal_speedup']:.2f}",
            speed,
            *(_shown(row["quality"].get(name), *digits[name]) for name in METRICS),
        ]

    @property
    def title(self) -> str:
        """What was measured, in one line."""
        facts, timed = self.facts, self.facts["timing"]
        line = f"{facts['samples']} digits, {facts['steps']} DDIM steps, guidance {facts['guidance_scale']:g}"
        line += f", {facts['dtype']}, {facts['backend']}"
        return line + (f"; speed: {timed['rounds']} rounds of {timed['images']} images" if timed else "")

    def table(self) -> Table:
        """For a terminal."""
        table = Table(title=self.title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for index, heading in enumerate(HEADINGS):
            table.add_column(heading, justify="right" if index else "left", no_wrap=True)
        method = ""
        for row, role in self._lines():
            if not role and row["method"] != method:
                method = row["method"]
                table.add_section()
                table.add_row(f"[bold]{method}")
            _, *cells = self._cells(row, role)
            label = f"    {role}: {row['label'].removesuffix(' steps')}" if role else f"  {row['label']}"
            table.add_row(label, *cells, style="dim" if role else "")
        table.caption = "\n".join(self._refused()) or None
        table.caption_justify = "left"
        return table

    def markdown(self) -> str:
        """The same as a page."""
        lines = ["| " + " | ".join(HEADINGS) + " |", "|---|" + "---:|" * (len(HEADINGS) - 1)]
        for row, role in self._lines():
            first, *others = (cell.replace("|", "/") for cell in self._cells(row, role))
            lines.append("| " + " | ".join([first if role else f"**{first}**", *others]) + " |")
        refused = [f"- {line}" for line in self._refused()]
        parts = [
            "# Methods on the demo model",
            "",
            self.title + ".",
            "",
            *lines,
            "",
            *refused,
            *([""] if refused else []),
        ]
        return "\n".join([*parts, NOTES, ""])

    def curves(self, metric: str, speed: str) -> dict[str, list[tuple[float, dict[str, float]]]]:
        """By method, its points in the order of their FLOPs: the speed-up, and the figure with its interval. Settings
        that never reused anything are the reference, and no points."""
        found: dict[str, list[tuple[float, dict[str, float]]]] = {}
        for row in sorted(self.rows, key=lambda row: row.get("ideal_speedup", 0.0)):
            at = row.get(speed)
            if metric in row.get("quality", {}) and at is not None and row["flops_share"] < 1:
                point = at["value"] if isinstance(at, dict) else at, row["quality"][metric]
                found.setdefault(row["method"], []).append(point)
        return found

    def picture(self, path: Path) -> None:
        """Quality against speed, by FLOPs and, where there are timings, measured: a curve for each method, a column for
        each class of methods, the controls in black, the uncached model as a grey line."""
        if not self.curves("frechet", "ideal_speedup"):
            raise SystemExit("nothing to draw: no setting has been scored with these options (--stage quality)")
        try:
            from matplotlib.figure import Figure
            from matplotlib.ticker import LogFormatter
        except ImportError as error:
            raise SystemExit("the picture needs matplotlib: pip install '.[plot]'") from error
        panels = [(metric, speed) for metric, speed in DRAWN if self.curves(metric, speed)]
        families: dict[str, list[str]] = {}
        for row in self.rows:
            if "quality" in row and not row["control"]:
                among = families.setdefault(family_of(row["factory"]), [])
                among += [] if row["method"] in among else [row["method"]]
        figure = Figure(figsize=(1.5 + 5.5 * len(families), 4.3 * len(panels)), layout="constrained")
        axes = figure.subplots(len(panels), len(families), squeeze=False, sharex="row", sharey="row")
        for line, (metric, speed) in zip(axes, panels, strict=True):
            curves = self.curves(metric, speed)
            for axis, (family, methods) in zip(line, families.items(), strict=True):
                for method, style in _styles(methods).items():
                    _draw(axis, curves.get(method, []), style)
                axis.grid(alpha=0.25)
                axis.set_xlabel(SPEEDS[speed])
                if axis in axes[0]:
                    axis.set_title(family)
                    axis.legend(fontsize=8)
                if metric == "frechet":
                    whole = [row["quality"][metric]["value"] for row in self.rows if row["reference"]]
                    values = [figure["value"] for points in curves.values() for _, figure in points]
                    axis.axhline(whole[0], color="grey", linewidth=0.8)
                    axis.set(yscale="log", ylim=(0.8 * min(values + whole), 1.25 * max(values + whole)))
                    axis.yaxis.set_major_formatter(LogFormatter())
                    axis.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
            line[0].set_ylabel(METRICS[metric])
        figure.suptitle(self.title, x=0.01, horizontalalignment="left")
        figure.savefig(path, dpi=110)


def family_of(factory: str) -> str:
    """A method's class in the survey's taxonomy, those that adapt together."""
    family = next(method.family for method in METHODS if method.name == factory)
    return "adaptive" if "adaptive" in family else family.split(",")[0]


def _styles(methods: Iterable[str]) -> dict[str, dict[str, Any]]:
    """How each curve of a panel is drawn, those of the controls first."""
    from matplotlib import colormaps

    colors, markers = colormaps["tab10"].colors, "osD^vPX*"
    styles: dict[str, dict[str, Any]] = {
        UNCACHED: {"color": "black", "linestyle": "--", "label": "control: uncached, fewer steps"},
        EVEN: {"color": "black", "linestyle": ":", "label": f"control: {EVEN}"},
    }
    for index, method in enumerate(methods):
        marker = markers[(index + index // 10) % len(markers)]
        styles[method] = {"color": colors[index % 10], "marker": marker, "markersize": 5, "label": method}
    return styles


def _draw(axis: Any, points: list[tuple[float, dict[str, float]]], style: dict[str, Any]) -> None:
    """One curve; intervals as bars, or as a band where there are no markers."""
    x = [at for at, _ in points]
    value, low, high = (np.array([figure[name] for _, figure in points]) for name in ("value", "low", "high"))
    if "marker" in style:
        axis.errorbar(x, value, [value - low, high - value], linewidth=1.3, elinewidth=0.8, **style)
    else:
        axis.plot(x, value, linewidth=1.3, **style)
        axis.fill_between(x, low, high, color=style["color"], alpha=0.08, linewidth=0)


def _plain_option(value: Any) -> Any:
    return value if isinstance(value, (int, float, str, list, tuple)) else repr(value)


def _shown(figure: Mapping[str, float] | None, digits: int, by: float = 1.0) -> str:
    if figure is None:
        return "-"
    value, low, high = (f"{by * figure[name]:.{digits}f}" for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"
