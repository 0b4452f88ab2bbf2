"""Write the README's generated tables, each between its two marks: `python -m bench.readme`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from bench.export_table import overview
from diffcache_fx.presets.methods import table

README = Path(__file__).parent.parent / "README.md"
RESULTS = Path(__file__).parent / "results"
_BY = "written by `python -m bench.readme`"


def exports() -> str:
    """What was exported and run, as `bench.exports` and `bench.full_size` left it."""
    known, full_size = (json.loads((RESULTS / f"{name}.json").read_text()) for name in ("exports", "full_size"))
    return overview(known, full_size)


TABLES: dict[str, Callable[[], str]] = {"methods": table, "exports": exports}


def with_tables(text: str) -> str:
    """The README's text with its tables as they should be."""
    for name, made in TABLES.items():
        begin, end = f"<!-- {name}: {_BY} -->\n", f"<!-- end of {name} -->\n"
        head, _, rest = text.partition(begin)
        _, _, tail = rest.partition(end)
        text = f"{head}{begin}{made()}{end}{tail}"
    return text


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text()))
