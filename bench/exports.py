"""What can leave Python: `python -m bench.exports [NAMES...] [--only ARTEFACT...] [--fresh]`.

Every entry of the corpus with tiny random weights, as ONNX, AOTInductor and TensorRT bundles in each form. ONNX and
AOTInductor are run over a generation of 20 steps and compared with the denoiser they were exported from, in eager;
TensorRT engines are built, and run where a GPU is. Writes `bench/results/exports.json` (finished rows are kept unless
named or --fresh) and `exports.md`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffcache_fx.export.manifest import read_manifest
from rich.console import Console
from torch.utils._pytree import tree_leaves

from bench.rows import Row, brief, rows_of, work
from bench.zoo import Entry, corpus
from bench.zoo.entry import moving
from diffcache_fx import CachedDenoiser, Linear, RegionError, ScheduleError, compile_with_cache, export, schedules
from diffcache_fx.measure import relative_error

RESULTS = Path(__file__).parent / "results" / "exports.json"
STEPS = 20
_MODULE, _LIMIT, _BATCH = "bench.exports", 1500, 6
WRITERS: dict[str, Callable[..., Path]] = {
    "onnx": export.to_onnx,
    "aot_inductor": export.to_aot_inductor,
    "tensorrt": export.to_tensorrt,
}
FORMS = ("pair", "branch", "split")
# AOTInductor compiles for minutes: these entries, unless others are named.
AOT = (
    "AuraFlowTransformer2DModel",
    "CogVideoXTransformer3DModel",
    "DiTTransformer2DModel",
    "FluxTransformer2DModel",
    "LTXVideoTransformer3DModel",
    "PixArtTransformer2DModel",
    "SD3Transformer2DModel",
    "SanaTransformer2DModel",
    "UNet2DConditionModel",
    "WanTransformer3DModel",
)


def generation(denoiser: Any, entry: Entry, steps: int = STEPS) -> list[torch.Tensor]:
    """All outputs of a generation whose inputs move a little, so that an adaptive guard has something to see."""
    outputs: list[torch.Tensor] = []
    for step in range(steps):
        args, kwargs = moving(entry, step / steps)
        with torch.no_grad(), denoiser.cache_context("cond", step_index=step, num_inference_steps=steps):
            made = tree_leaves(denoiser(*args, **kwargs))
        outputs += [value for value in made if isinstance(value, torch.Tensor)]
    return outputs


def decisions(denoiser: Any) -> list[tuple[int, tuple[str, ...]]]:
    """Step by step, what was reused."""
    return [(decision.step, decision.reused) for decision in denoiser.stats().decisions]


def _denoiser(entry: Entry, form: str) -> CachedDenoiser:
    schedule = schedules.first_block_cache(0.1) if form == "split" else schedules.interval(3, forecast=Linear())
    return compile_with_cache(
        entry.build(),
        schedule,
        backend="eager",
        decide="graph" if form == "branch" else "host",
        num_steps=STEPS,
        example_inputs=entry.inputs(0),
    )


def measure(name: str, artefacts: Sequence[str]) -> Row:
    """Every form of one entry through these artefacts."""
    entry = corpus()[name]
    row: Row = {"name": name, "family": entry.family}
    for form in FORMS:
        found: Row = {}
        row[form] = found
        try:
            denoiser = _denoiser(entry, form)
            expected = generation(denoiser, entry)
        except (RegionError, ScheduleError) as error:  # such as a guard that finds nothing to measure
            found["not_applicable"] = brief(error)
            continue
        found |= {"conditionals": denoiser.explain().conditionals, "reused": denoiser.stats().reused}
        taken = decisions(denoiser)
        for artefact in artefacts:
            start = time.perf_counter()
            try:
                found[artefact] = _exported(denoiser, entry, artefact, form, expected, taken)
            except Exception as error:
                found[artefact] = {"failure": brief(error)}
            found[artefact]["seconds"] = round(time.perf_counter() - start, 1)
    return row


def _exported(
    denoiser: CachedDenoiser, entry: Entry, artefact: str, form: str, expected: list[torch.Tensor], taken: Any
) -> Row:
    with tempfile.TemporaryDirectory(prefix="exports") as place:
        folder = WRITERS[artefact](denoiser, Path(place) / "bundle", form)
        manifest = read_manifest(folder)
        found: Row = {
            "files": {name: file.bytes for name, file in manifest.files.items()},
            "conditionals": sum(program.conditionals for program in manifest.programs.values()),
        }
        if artefact == "tensorrt" and not torch.cuda.is_available():
            return found | {"executed": ""}
        loaded = export.load_bundle(folder)
        made = generation(loaded, entry)
        error = max(relative_error(a, b) for a, b in zip(made, expected, strict=True))
        where = "cuda" if torch.cuda.is_available() else "cpu"
        return found | {"executed": where, "error": error, "same_decisions": decisions(loaded) == taken}


def _cell(row: Row, artefact: str, form: str) -> str:
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
    return told if found["same_decisions"] else f"{told}, other decisions"


def good(row: Row, artefact: str, form: str, most: float = 1e-4) -> bool:
    """Whether a cell was built, holds the conditionals it should, and computes the same where it was run."""
    known = row.get(form, {})
    found = known.get(artefact, {})
    if not found or "failure" in found or found["conditionals"] != (known["conditionals"] if form == "branch" else 0):
        return False
    return not found["executed"] or (found["error"] < most and found["same_decisions"])


def markdown(known: dict[str, Row]) -> str:
    """The table, and how many of how many are good."""
    heads = [(artefact, form) for artefact in WRITERS for form in FORMS]
    lines = ["| model | " + " | ".join(f"{a} {f}" for a, f in heads) + " |", "|" + "---|" * (len(heads) + 1)]
    for row in known.values():
        cells = [_cell(row, artefact, form).replace("|", "/") for artefact, form in heads]
        lines.append("| " + " | ".join([row["name"], *cells]) + " |")
    return "\n".join(["# Exports", "", summary(known), "", *lines, ""])


def summary(known: dict[str, Row]) -> str:
    """For each artefact and form: how many entries are good, of those it was tried on."""
    lines = []
    for artefact in WRITERS:
        for form in FORMS:
            tried = [row for row in known.values() if artefact in row.get(form, {})]
            lines.append(f"- {artefact} {form}: {sum(good(row, artefact, form) for row in tried)} of {len(tried)}")
    failed = [row["name"] for row in known.values() if "failure" in row]
    return "\n".join([*lines, *([f"- no row: {', '.join(failed)}"] if failed else [])])


def main() -> None:
    """Measure what is named, or everything that has no row yet, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="entries of the corpus")
    parser.add_argument("--only", nargs="+", choices=tuple(WRITERS), default=list(WRITERS), help="artefacts")
    parser.add_argument("--fresh", action="store_true", help="drop the rows measured before")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        artefacts, *names = options.names
        work(names, partial(measure, artefacts=artefacts.split(",")), _LIMIT)
        return
    options.out.parent.mkdir(parents=True, exist_ok=True)
    known: dict[str, Row] = {}
    if options.out.exists() and not options.fresh:
        known = json.loads(options.out.read_text())
    for artefact in options.only:  # one at a time: what is slow or fails keeps nothing else from being seen
        every = [name for name in corpus() if artefact != "aot_inductor" or name in AOT]
        wanted = options.names or [name for name in every if not _tried(known.get(name, {}), artefact)]
        for row in rows_of(_MODULE, wanted, lambda _: _BATCH, [artefact]):
            _merge(known.setdefault(row["name"], {"name": row["name"]}), row, artefact)
            options.out.write_text(json.dumps({n: known[n] for n in corpus() if n in known}, indent=1) + "\n")
            told = "; ".join(f"{form}: {_cell(known[row['name']], artefact, form)}" for form in FORMS)
            print(f"{row['name']}, {artefact}: {told}", file=sys.stderr, flush=True)
    known = {name: known[name] for name in corpus() if name in known}
    options.out.with_suffix(".md").write_text(markdown(known))
    Console().print(summary(known), highlight=False)


def _tried(row: Row, artefact: str) -> bool:
    return any(artefact in row.get(form, {}) for form in FORMS)


def _merge(known: Row, row: Row, artefact: str) -> None:
    """Put what was measured of one artefact beside what is known of others."""
    if "failure" in row:
        for form in FORMS:
            known.setdefault(form, {})[artefact] = {"failure": row["failure"]}
        return
    known["family"] = row["family"]
    for form in FORMS:
        known[form] = {**known.get(form, {}), **row[form]}


if __name__ == "__main__":
    main()
