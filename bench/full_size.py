"""A full-size model as a file: `python -m bench.full_size [--model SD-1.5] [--steps 6]`.

The published configuration with random float32 weights (SD 1.5: 3.4 GB, more than a protobuf may hold), exported in
branch form with its weights beside it, and run by ONNX Runtime over a generation that refreshes and reuses in turn,
against the denoiser it was exported from, in eager. Each stage is a process of its own, so that its peak memory
(resident, mapped files included) is its own. Writes `bench/results/full_size.json`.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from diffcache_fx.export.manifest import read_manifest
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch.utils._pytree import tree_map

from bench.zoo.entry import seeded
from bench.zoo.published import published
from diffcache_fx import CachedDenoiser, Linear, compile_with_cache, export, schedules
from diffcache_fx.measure import relative_error

RESULTS = Path(__file__).parent / "results" / "full_size.json"
STAGES = ("eager", "export", "run")
Row = dict[str, Any]


def _example(name: str, step: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The published shapes, float32, with random values; the latents drift a little from step to step."""
    draw = torch.Generator().manual_seed(0)

    def filled(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor) or not leaf.is_floating_point():
            return leaf
        fixed, drift = (torch.randn(leaf.shape, generator=draw) for _ in range(2))
        return fixed + 0.05 * step * drift

    args, kwargs = tree_map(filled, published()[name].inputs())
    moment = torch.tensor(900 - 100 * step)
    return (args[0], moment, *args[2:]), kwargs


def _denoiser(name: str, steps: int) -> CachedDenoiser:
    model = seeded(published()[name].build).float()
    return compile_with_cache(
        model,
        schedules.interval(2, forecast=Linear()),
        backend="eager",
        decide="graph",
        num_steps=steps,
        example_inputs=_example(name, 0),
    )


def _outputs(denoiser: Any, name: str, steps: int, row: Row) -> dict[str, torch.Tensor]:
    found, seconds = {}, []
    for step in range(steps):
        args, kwargs = _example(name, step)
        start = time.perf_counter()
        with torch.no_grad(), denoiser.cache_context("cond", step_index=step, num_inference_steps=steps):
            found[str(step)] = denoiser(*args, **kwargs).sample
        seconds.append(round(time.perf_counter() - start, 2))
    row["step_s"] = seconds
    row["decisions"] = [bool(decision.reused) for decision in denoiser.stats().decisions]
    return found


def stage(which: str, name: str, steps: int, place: Path) -> Row:
    """One stage, in this process."""
    row: Row = {}
    start = time.perf_counter()
    if which == "eager":
        denoiser = _denoiser(name, steps)
        row["conditionals"] = denoiser.explain().conditionals
        save_file(_outputs(denoiser, name, steps, row), place / "expected.safetensors")
    elif which == "export":
        export.to_onnx(_denoiser(name, steps), place / "bundle", "branch")
        manifest = read_manifest(place / "bundle")
        row["files"] = {file: known.bytes for file, known in manifest.files.items()}
        row["conditionals"] = sum(program.conditionals for program in manifest.programs.values())
    else:
        loaded = export.load_bundle(place / "bundle")
        row["load_s"] = round(time.perf_counter() - start, 1)
        made, expected = _outputs(loaded, name, steps, row), load_file(place / "expected.safetensors")
        row["errors"] = [relative_error(made[step], expected[step]) for step in expected]
    row["seconds"] = round(time.perf_counter() - start, 1)
    row["peak_gib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2)
    return row


def main() -> None:
    """Run the stages one after the other and write what they found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=tuple(published()), default="SD-1.5")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--stage", choices=STAGES, help=argparse.SUPPRESS)
    parser.add_argument("--place", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        print(json.dumps(stage(options.stage, options.model, options.steps, options.place)))
        return
    record: Row = {
        "model": options.model,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
    }
    with tempfile.TemporaryDirectory(prefix="full_size") as place:
        for which in STAGES:
            command = [sys.executable, "-m", "bench.full_size", "--stage", which, "--place", place]
            command += ["--model", options.model, "--steps", str(options.steps)]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            record[which] = json.loads(done.stdout.strip().splitlines()[-1])
            Console(stderr=True).print(which, record[which])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
