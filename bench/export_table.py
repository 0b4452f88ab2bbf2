"""The tables of `bench.exports`: what was built and run of each model, artefact and form."""

from __future__ import annotations

from collections.abc import Sequence

from bench.rows import Row

ARTEFACTS = ("onnx", "aot_inductor", "tensorrt")
FORMS = ("pair", "branch", "split")
UNCACHED = "uncached"
# Largest relative error against eager over a generation, in float32.
LARGEST_ERROR = 1e-4


def cell(row: Row, artefact: str, form: str) -> str:
    if "failure" in row:
        return f"failed: {row['failure']}"
    known = row.get(form, {})
    if "not_applicable" in known:
        return "does not apply"
    found = known.get(artefact)
    if found is None:
        return "not run"
    if "failure" in found:
        return f"failed: {found['failure']}"
    if not found["executed"]:
        return "built"
    told = f"built, run on {found['executed']}: {found['error']:.0e}"
    if "rounding" in found:
        told += f" (eager itself against float64: {found['rounding']:.0e})"
    return told if found["same_decisions"] else f"{told}, other decisions"


def good(row: Row, artefact: str, form: str, most: float = LARGEST_ERROR) -> bool:
    """Whether a cell was built, holds the conditionals it should, and computes the same where it was run."""
    known = row.get(form, {})
    found = known.get(artefact, {})
    if not found or "failure" in found or found["conditionals"] != (known["conditionals"] if form == "branch" else 0):
        return False
    return not found["executed"] or (found["error"] < most and found["same_decisions"])


def markdown(known: dict[str, Row]) -> str:
    """The table, and how many of how many are good."""
    heads = [(artefact, form) for artefact in ARTEFACTS for form in FORMS]
    lines = ["| model | " + " | ".join(f"{a} {f}" for a, f in heads) + " |", "|" + "---|" * (len(heads) + 1)]
    for row in known.values():
        cells = [cell(row, artefact, form).replace("|", "/") for artefact, form in heads]
        lines.append("| " + " | ".join([row["name"], *cells]) + " |")
    return "\n".join(["# Exports", "", summary(known), sizes(known), "", *lines, ""])


def summary(known: dict[str, Row]) -> str:
    """For each artefact and form: how many entries are good, of those it was tried on."""
    lines = []
    for artefact in ARTEFACTS:
        for form in FORMS:
            tried = [row for row in known.values() if artefact in row.get(form, {})]
            lines.append(f"- {artefact} {form}: {sum(good(row, artefact, form) for row in tried)} of {len(tried)}")
    failed = [row["name"] for row in known.values() if "failure" in row]
    return "\n".join([*lines, *([f"- no row: {', '.join(failed)}"] if failed else [])])


def sizes(known: dict[str, Row]) -> str:
    """Of entries exported uncached, too: how many times the bytes each form takes."""
    lines = []
    for row in known.values():
        for artefact in ARTEFACTS:
            base = row.get(UNCACHED, {}).get(artefact, {}).get("files")
            if not base:
                continue
            found = {form: row.get(form, {}).get(artefact, {}).get("files") for form in FORMS}
            ratios = [
                f"{form} {sum(files.values()) / sum(base.values()):.3f}" for form, files in found.items() if files
            ]
            whole = sum(base.values()) / (1 << 20)
            lines.append(f"- {row['name']}, {artefact}: uncached {whole:.1f} MiB; times that: {', '.join(ratios)}")
    return "\n".join(lines)


def overview(known: dict[str, Row], full_size: Row | None = None) -> str:
    """The README's table: model, artefact and form; of how many what was built, and where it was run."""
    heads = [(artefact, form) for artefact in ARTEFACTS for form in FORMS]
    lines = ["| | " + " | ".join(f"{a}, {f}" for a, f in heads) + " |", "|" + "---|" * (len(heads) + 1)]
    for title, rows in _groups(known).items():
        lines.append("| " + " | ".join([title, *(_share(rows, artefact, form) for artefact, form in heads)]) + " |")
    if full_size is not None:
        told = f"run on cpu, {max(full_size['run']['errors']):.0e}"
        cells = [told if head == ("onnx", "branch") else "not run" for head in heads]
        lines.append(f"| {full_size['model']}, full size, float32 | " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


def _groups(known: dict[str, Row]) -> dict[str, list[Row]]:
    """Entries exported uncached, too, stand alone; the others by family."""
    found: dict[str, list[Row]] = {}
    for name, row in known.items():
        family = f"{row['family']}, tiny" if "family" in row else "not traced (see coverage.md)"
        found.setdefault(name if UNCACHED in row else family, []).append(row)
    return {title if len(rows) == 1 else f"{title}: {len(rows)}": rows for title, rows in found.items()}


def _share(rows: Sequence[Row], artefact: str, form: str) -> str:
    tried = [row for row in rows if artefact in row.get(form, {})]
    if not tried:
        return "does not apply" if all("not_applicable" in row.get(form, {}) for row in rows) else "not run"
    fine = [row for row in tried if good(row, artefact, form)]
    where = {row[form][artefact]["executed"] for row in fine}
    told = f"run on {', '.join(sorted(where))}" if where and "" not in where else "built"
    if not fine:
        return f"0 of {len(tried)}"
    return told if len(rows) == 1 else f"{told}: {len(fine)} of {len(tried)}"
