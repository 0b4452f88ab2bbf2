"""What a step costs: `python -m bench.step [--rounds N] [--only PART...]`.

In one run and in turn: the uncached model under torch.compile, the refresh program, the reuse program, a physical
control (the same class built with the kept blocks only), and whole generations; then the cost of a call over its
program, and cold compilation in fresh processes with an empty compiler cache. Targets are ratios, beside each figure.
Writes `bench/results/step.json`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from bench.figures import Figure, at_least, at_most, scaled, shown, table
from bench.zoo.entry import Call, Draw, call, denoiser_class, seeded
from bench.zoo.published import block_28
from diffcache_fx import CachedDenoiser, CacheSchedule, compile_with_cache, schedules
from diffcache_fx.measure import executed_flops, interleaved, recorded_programs

RESULTS = Path(__file__).parent / "results" / "step.json"
PARTS = ("transformer", "unet", "overhead", "cold")
_COLD = "cold seconds: "


class Steps:
    """A model, one call of it, and generations made of that call."""

    def __init__(self, model: nn.Module, example: Call) -> None:
        self.model = model.requires_grad_(False)
        self.args, self.kwargs = example

    def uncached(self) -> Callable[[], Any]:
        """One step of the model under torch.compile."""
        return self.one(torch.compile(self.model))

    def one(self, denoiser: Callable[..., Any]) -> Callable[[], Any]:
        def step() -> Any:
            with torch.no_grad():
                return denoiser(*self.args, **self.kwargs)

        return step

    def cached(self, schedule: CacheSchedule, steps: int, **options: Any) -> tuple[CachedDenoiser, Callable[[], None]]:
        """A cached denoiser, compiled, and one generation with it."""
        found = compile_with_cache(
            self.model, schedule, example_inputs=(self.args, self.kwargs), num_steps=steps, **options
        )

        def generation() -> None:
            found.reset()
            for index in range(steps):
                with found.cache_context("cond", step_index=index, num_inference_steps=steps):
                    found(*self.args, **self.kwargs)

        return found, generation


def model_part(
    part: str, steps: Steps, made: dict[str, tuple[CacheSchedule, int, float]], control: Steps | None, rounds: int
) -> list[Figure]:
    """Programs against the uncached step, and generations against their ideal.

    made: by name a schedule, the steps of a generation, and the least share of the ideal speed-up it must reach (0: no
    target). The programs are those of the first.
    """
    cached: dict[str, CachedDenoiser] = {}
    functions: dict[str, Callable[[], Any]] = {"uncached": steps.uncached()}
    programs: dict[str, Callable[[], Any]] = {}
    for name, (schedule, count, _) in made.items():
        cached[name], generation = steps.cached(schedule, count)
        if not programs:
            found = recorded_programs(cached[name], generation, count)
            programs = {"refresh" if not reused else "reuse": run for reused, run in found.items()}
        functions[name] = generation
    functions |= programs
    if control is not None:
        functions["control"] = control.uncached()
    times = interleaved(functions, rounds=rounds, warmup=1, progress=_note(part, rounds))
    first = cached[next(iter(made))].explain()
    share = min(flops for _, flops in first.programs) / first.full_flops
    reuse = times.ratio("reuse", "uncached")
    # Refresh and reuse are targets on the transformer; the U-Net shows the same figures.
    strict = control is not None
    figures = [
        shown(part, "uncached step", 1000 * times.median("uncached"), "ms"),
        at_most(part, "refresh program / uncached step", times.ratio("refresh", "uncached"), 1.03),
        shown(part, "reuse program / uncached step", reuse),
        shown(part, "share of FLOPs in a reuse step", share),
        (at_most if strict else lambda *a: shown(*a[:3]))(
            part, "reuse program / (its FLOP share of the uncached step)", scaled(reuse, 1 / share), 1.15
        ),
    ]
    if control is not None:
        figures.append(shown(part, "control (kept blocks only) / uncached step", times.ratio("control", "uncached")))
        figures.append(shown(part, "reuse program / control", times.ratio("reuse", "control")))
    for name, (_, count, least) in made.items():
        speedup = scaled(times.ratio("uncached", name), count)
        ideal = executed_flops(cached[name]).ideal_speedup
        figures.append(shown(part, f"{name}: speed-up of {count} steps", speedup))
        figures.append(shown(part, f"{name}: ideal by executed FLOPs", ideal))
        reached = scaled(speedup, 1 / ideal)
        title = f"{name}: share of the ideal reached"
        figures.append(at_least(part, title, reached, least) if least else shown(part, title, reached))
    return figures


def transformer(rounds: int) -> list[Figure]:
    """The 28-block transformer, trunk but the first block reused: interval 3, and one refresh in 20."""
    entry = block_28()
    model = entry.build()
    example = entry.inputs(0)
    config = dict(model.config) | {"num_layers": 1}  # type: ignore[arg-type]
    kept = type(model)(**{key: value for key, value in config.items() if not key.startswith("_")}).eval()
    made = {"interval 3": (schedules.interval(3), 12, 0.97), "one refresh in 20": (schedules.interval(20), 20, 0.96)}
    return model_part("transformer", Steps(model, example), made, Steps(kept, example), rounds)


def unet(rounds: int) -> list[Figure]:
    """A U-Net of about 100 M parameters with cross-attention, DeepCache at interval 3."""
    config = {
        "sample_size": 32,
        "block_out_channels": (128, 256, 512, 512),
        "cross_attention_dim": 512,
        "attention_head_dim": 8,
        "layers_per_block": 2,
    }
    model = seeded(lambda: denoiser_class("UNet2DConditionModel")(**config))
    draw = Draw(0)
    example = call(draw(2, 4, 32, 32), torch.tensor(500), encoder_hidden_states=draw(2, 77, 512))
    return model_part("unet", Steps(model, example), {"DeepCache 3": (schedules.deep_cache(3), 12, 0.0)}, None, rounds)


class _Small(nn.Module):
    """Blocks with 500 parameters in all and next to no work, so that what is left is the cost of the call."""

    def __init__(self, blocks: int = 125, width: int = 8) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width)) for _ in range(blocks))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        x = x + t
        for block in self.blocks:
            x = x + block(x)
        return x


def overhead(rounds: int) -> list[Figure]:
    """Microseconds of a cached call over the program it runs, 500 parameters, in the middle of a generation."""
    model = _Small().eval().requires_grad_(False)
    count = len(list(model.parameters()))
    x, moments = torch.zeros(1, 2, 8), itertools.count()
    cached = compile_with_cache(model, schedules.always(), example_inputs=((x, torch.tensor([1.0])), {}))

    def next_call() -> None:
        cached(x, torch.tensor([1e6 - next(moments)]))  # one long generation

    def first_call() -> None:
        cached.reset()
        next_call()

    run = recorded_programs(cached, next_call, None)[frozenset()]
    plain = torch.compile(model)
    functions = {
        "program": run,
        "uncached": lambda: plain(x, torch.tensor([1e6 - next(moments)])),
        "call": next_call,
        "first": first_call,
    }
    rounds = max(rounds * 5, 30)
    with torch.no_grad():
        times = interleaved(functions, rounds=rounds, warmup=3, calls=20)
    micro = {name: 1e6 * times.median(name) for name in functions}
    return [
        shown("overhead", f"program with {count} parameters", micro["program"], "us"),
        shown("overhead", "torch.compile call of the same model", micro["uncached"], "us"),
        at_most("overhead", "cached call over its program", micro["call"] - micro["program"], 100, "us"),
        shown("overhead", "first call of a generation over its program", micro["first"] - micro["program"], "us"),
    ]


def cold(repeats: int) -> list[Figure]:
    """Seconds to compile refresh and reuse program against torch.compile of the model, each in a fresh process."""
    seconds: dict[str, list[float]] = {"plain": [], "cached": []}
    for _ in range(repeats):
        for kind, values in seconds.items():
            Console(stderr=True).print(f"cold: {kind}", style="dim")
            with tempfile.TemporaryDirectory() as folder:
                environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": folder}
                command = [sys.executable, "-m", "bench.step", "--cold-worker", kind]
                result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            line = next(line for line in result.stdout.splitlines() if line.startswith(_COLD))
            values.append(float(line.removeprefix(_COLD)))
    plain, ours = (sorted(values)[len(values) // 2] for values in seconds.values())
    return [
        shown("cold", "torch.compile of the uncached model", plain, "s"),
        shown("cold", "capture and two programs", ours, "s"),
        at_most("cold", "two programs / torch.compile", ours / plain, 0.9),
    ]


def cold_worker(kind: str) -> None:
    """Compile once and print the seconds until the first result."""
    entry = block_28()
    steps = Steps(entry.build(), entry.inputs(0))
    start = time.perf_counter()
    if kind == "plain":
        steps.uncached()()
    else:
        cached, _ = steps.cached(schedules.interval(3), 12)
        cached.prepare()
    print(f"{_COLD}{time.perf_counter() - start:.2f}")


def _note(part: str, rounds: int) -> Callable[[str, int], None]:
    console = Console(stderr=True)
    return lambda name, turn: console.print(f"{part}: round {turn + 1} of {rounds}, {name}", style="dim")


def main() -> None:
    """Measure the parts asked for; exit 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="samples of each contender")
    parser.add_argument("--repeats", type=int, default=3, help="cold compilations of each kind")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--cold-worker", choices=("plain", "cached"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cold_worker:
        cold_worker(options.cold_worker)
        return
    measured = {
        "transformer": lambda: transformer(options.rounds),
        "unet": lambda: unet(options.rounds),
        "overhead": lambda: overhead(options.rounds),
        "cold": lambda: cold(options.repeats),
    }
    figures = [figure for part in PARTS if part in options.only for figure in measured[part]()]
    Console(width=None if sys.stdout.isatty() else 130).print(table(figures))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(options.out.read_text())["figures"] if options.out.exists() else []
    kept = [figure for figure in before if figure["part"] not in options.only]  # measured by an earlier run
    record = {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "rounds": options.rounds,
        "figures": [*kept, *(asdict(figure) for figure in figures)],
    }
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    sys.exit(any(figure.well is False for figure in figures))


if __name__ == "__main__":
    main()
