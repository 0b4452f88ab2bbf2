"""What can leave Python: `python -m bench.exports [NAMES...] [--only ARTEFACT...] [--fresh]`.

The demo model, the 28 blocks of `bench.step`, and every entry of the corpus with tiny random weights, as ONNX,
AOTInductor and TensorRT bundles in each form. ONNX and AOTInductor are run over a generation of 20 steps and compared
with the denoiser they were exported from, in eager; TensorRT engines are built, and run where a GPU is. The first two
are also exported uncached, to compare sizes. Writes `bench/results/exports.json` (finished rows are kept unless named
or --fresh) and `exports.md`; `--report` only writes the table anew.
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
from torch.utils._pytree import tree_leaves, tree_map

from bench.export_table import ARTEFACTS, FORMS, LARGEST_ERROR, UNCACHED, cell, markdown, summary
from bench.rows import Row, brief, rows_of, work
from bench.zoo import Entry, corpus
from bench.zoo.entry import Call, Draw, moving
from bench.zoo.published import block_28
from diffcache_fx import CachedDenoiser, Linear, RegionError, ScheduleError, compile_with_cache, export, schedules
from diffcache_fx.demo.digits import load_digits
from diffcache_fx.demo.run import Digits
from diffcache_fx.measure import relative_error

RESULTS = Path(__file__).parent / "results" / "exports.json"
STEPS = 20
_MODULE, _LIMIT, _BATCH = "bench.exports", 1500, 6
WRITERS: dict[str, Callable[..., Path]] = {
    "onnx": export.to_onnx,
    "aot_inductor": export.to_aot_inductor,
    "tensorrt": export.to_tensorrt,
}
# Exported uncached, too.
SIZED = ("digits", "blocks28")
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
    *SIZED,
)


def entries() -> dict[str, Entry]:
    """By name."""
    return {"digits": _digits(), "blocks28": block_28(), **corpus()}


def _digits() -> Entry:
    """The trained demo, on ten classes with guidance."""
    demo = load_digits()

    def inputs(seed: int) -> Call:
        (latents, *rest), kwargs = Digits(demo, STEPS).example
        return (Draw(seed)(*latents.shape), *rest), kwargs

    return Entry("digits", "trained", lambda: demo.model, inputs, 0, "timestep")


def forms_of(name: str) -> tuple[str, ...]:
    """The forms an entry is exported in."""
    return (UNCACHED, *FORMS) if name in SIZED else FORMS


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
    schedule = schedules.always() if form == UNCACHED else schedules.interval(3, forecast=Linear())
    if form == "split":
        schedule = schedules.first_block_cache(0.1)
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
    entry = entries()[name]
    row: Row = {"name": name, "family": entry.family}
    for form in forms_of(name):
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
        folder = WRITERS[artefact](denoiser, Path(place) / "bundle", "pair" if form == UNCACHED else form)
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
        found |= {"executed": where, "error": error, "same_decisions": decisions(loaded) == taken}
        return found | ({} if error < LARGEST_ERROR else {"rounding": _rounding(entry)})


def _rounding(entry: Entry) -> float:
    """How far the uncached model itself is, in float32, from what it computes in float64 over the same generation."""
    single, double = entry.build(), entry.build().double()
    errors = []
    for step in range(STEPS):
        call = moving(entry, step / STEPS)
        wide = tree_map(lambda x: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x, call)
        with torch.no_grad():
            made, exact = (
                tree_leaves(model(*args, **kwargs)) for model, (args, kwargs) in ((single, call), (double, wide))
            )
        pairs = zip(made, exact, strict=True)
        errors += [relative_error(a, b.to(a.dtype)) for a, b in pairs if isinstance(a, torch.Tensor)]
    return max(errors)


def main() -> None:
    """Measure what is named, or everything that has no row yet, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="entries of the corpus")
    parser.add_argument("--only", nargs="+", choices=ARTEFACTS, default=list(ARTEFACTS), help="artefacts")
    parser.add_argument("--fresh", action="store_true", help="drop the rows measured before")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="measure nothing, write the table of what is known")
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
    for artefact in (
        () if options.report else options.only
    ):  # one at a time: what is slow or fails keeps nothing else from being seen
        every = [name for name in entries() if artefact != "aot_inductor" or name in AOT]
        wanted = options.names or [name for name in every if not _tried(known.get(name, {}), artefact)]
        for row in rows_of(_MODULE, wanted, lambda _: _BATCH, [artefact]):
            _merge(known.setdefault(row["name"], {"name": row["name"]}), row, artefact)
            options.out.write_text(json.dumps({n: known[n] for n in entries() if n in known}, indent=1) + "\n")
            told = "; ".join(f"{form}: {cell(known[row['name']], artefact, form)}" for form in FORMS)
            print(f"{row['name']}, {artefact}: {told}", file=sys.stderr, flush=True)
    known = {name: known[name] for name in entries() if name in known}
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
    for form in forms_of(row["name"]):
        known[form] = {**known.get(form, {}), **row[form]}


if __name__ == "__main__":
    main()
