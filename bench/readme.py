"""Write the table of methods into the README, between its two marks: `python -m bench.readme`."""

from __future__ import annotations

from pathlib import Path

from diffcache_fx.presets.methods import table

README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- methods: written by `python -m bench.readme` -->\n", "<!-- end of methods -->\n"


def with_table(text: str) -> str:
    """The README's text with the table as it should be."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}{table()}{END}{tail}"


if __name__ == "__main__":
    README.write_text(with_table(README.read_text()))
