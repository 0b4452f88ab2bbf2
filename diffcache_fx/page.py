"""A report as one self-contained HTML page, with its pictures beside it as PNG files."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image

from .version import __version__

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAME = "report.html"
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2rem }
img { max-width: 100%; height: auto } .wide { overflow-x: auto }
table { border-collapse: collapse; font-size: 13px } td, th { padding: .25rem .6rem; border-bottom: 1px solid #ddd }
td { text-align: right } td:first-child, th:first-child { text-align: left }
footer { margin-top: 3rem; color: #777; font-size: 12px }
""".strip()


@dataclass
class Page:
    """Sections, in order; nothing is written before `write`."""

    title: str
    _parts: list[str] = field(default_factory=list)
    _files: dict[str, bytes] = field(default_factory=dict)

    def section(self, heading: str, text: str = "") -> None:
        """A heading, and a paragraph under it."""
        self._parts.append(f"<h2>{html.escape(heading)}</h2>")
        if text:
            self.text(text)

    def text(self, text: str) -> None:
        self._parts.append(f"<p>{html.escape(text)}</p>")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        self._parts.append(f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>')

    def facts(self, facts: Mapping[str, str]) -> None:
        """Names and what belongs to them."""
        rows = "".join(f"<tr><td>{html.escape(k)}</td><td>{html.escape(v)}</td></tr>" for k, v in facts.items())
        self._parts.append(f"<table>{rows}</table>")

    def picture(self, name: str, made: Figure | Image.Image, says: str) -> None:
        """A picture, kept as NAME.png; says: the same in words."""
        buffer = io.BytesIO()
        if isinstance(made, Image.Image):
            made.save(buffer, "PNG")
        else:
            made.savefig(buffer, format="png", dpi=110)
        self._files[f"{name}.png"] = buffer.getvalue()
        data = base64.b64encode(buffer.getvalue()).decode()
        self._parts.append(f'<img src="data:image/png;base64,{data}" alt="{html.escape(says, quote=True)}">')

    def write(self, folder: Path) -> Path:
        """The page and its pictures into a folder, made if missing; returns the page."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in self._files.items():
            (folder / name).write_bytes(data)
        title = html.escape(self.title)
        text = (
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>\n'
            f"<body><h1>{title}</h1>\n" + "\n".join(self._parts) + f"\n<footer>diffcache_fx {__version__}</footer>"
            "</body></html>\n"
        )
        path = folder / NAME
        part = path.with_suffix(".part")
        part.write_text(text, encoding="utf-8")
        part.replace(path)
        return path


def picture_of(batch: torch.Tensor, columns: int = 8, scale: int = 2) -> Image.Image | None:
    """Images in a grid: a tensor [N, C, H, W] in [-1, 1] or [N, H, W, C] in [0, 1]; None for what are no images."""
    if batch.dim() != 4 or (batch.shape[1] not in (1, 3) and batch.shape[3] not in (1, 3)):
        return None
    if batch.shape[1] in (1, 3):
        batch = (batch.permute(0, 2, 3, 1) + 1) / 2
    pixels = (batch[:columns].float().clamp(0, 1) * 255).round().to(torch.uint8)
    height, width = pixels.shape[1:3]
    canvas = Image.new("RGB", (len(pixels) * (width + 2), height))
    for index, image in enumerate(pixels):
        canvas.paste(Image.fromarray(image.expand(height, width, 3).numpy()), (index * (width + 2), 0))
    return canvas.resize((canvas.width * scale, canvas.height * scale)) if max(height, width) <= 128 else canvas
