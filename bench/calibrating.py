"""What calibration costs and whether targets are met: `python -m bench.calibrating`.

The demo model, 50 steps, a batch of 20. Cost: seconds of the second of two calibrations in one process (the first
compiles; the second still captures the model twice), and peak memory over that of an uncached compiled generation,
each in a process of its own. Targets: errors on 200 samples of noise that was not calibrated on, and speed-ups measured
in turn with the uncached model. Leave the machine alone meanwhile. Writes `bench/results/calibrating.json`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from diffcache_fx import Calibration, Psnr, RelativeL1, Speedup, compile_with_cache
from diffcache_fx.demo.digits import load_digits
from diffcache_fx.measure import compiled_baseline, interleaved

RESULTS = Path(__file__).parent / "results" / "calibrating.json"
IMAGES, STEPS, HELD_BACK = 20, 50, 200
ERRORS = (Psnr(35.0), Psnr(40.0), Psnr(45.0), RelativeL1(0.02))
SPEEDS = (Speedup(2.0), Speedup(3.0))


class Work:
    """The demo model and its sampler."""

    def __init__(self) -> None:
        self.demo = load_digits()
        self.labels = torch.arange(IMAGES) % self.demo.num_classes

    def sampler(self, denoiser: Any, seed: int) -> torch.Tensor:
        return self.demo.draw(denoiser, self.labels, num_steps=STEPS, seed=seed, batch_size=IMAGES)

    def calibration(self) -> Calibration:
        return Calibration(self.demo.model, self.sampler, seed=1000, describe="DDIM")


def peak() -> float:
    """MiB of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def uncached(pipe: Any) -> None:
    work = Work()
    denoiser = compiled_baseline(work.demo.model, "inductor")
    work.sampler(denoiser, 0)
    start = time.perf_counter()
    work.sampler(denoiser, 0)
    pipe.send({"seconds": time.perf_counter() - start, "peak_mib": peak()})


def calibrated(pipe: Any) -> None:
    work = Work()
    start = time.perf_counter()
    work.calibration()
    first = time.perf_counter() - start
    start = time.perf_counter()
    found = work.calibration()
    measured = time.perf_counter() - start
    memory = peak()
    targets = []
    for target in ERRORS:
        start = time.perf_counter()
        result = found.find(target)
        seconds = time.perf_counter() - start
        cached = compile_with_cache(work.demo.model, result.schedule, num_steps=STEPS)
        plain = compiled_baseline(work.demo.model, "inductor")
        errors = torch.cat(
            [target.error(work.sampler(cached, s), work.sampler(plain, s)) for s in range(HELD_BACK // IMAGES)]
        )
        targets.append(
            {
                "target": repr(target),
                "refreshes": len(result.plan.refreshes),
                "ideal_speedup": found.ideal(len(result.plan.refreshes)),
                "seconds": seconds,
                "within": float((errors <= target.largest).float().mean()),
                "predicted_mse": result.predicted,
                "measured_mse": result.measured,
            }
        )
    for speed in SPEEDS:
        start = time.perf_counter()
        result = found.find(speed)
        seconds = time.perf_counter() - start
        cached = compile_with_cache(work.demo.model, result.schedule, num_steps=STEPS)
        plain = compiled_baseline(work.demo.model, "inductor")
        runs = {"uncached": partial(work.sampler, plain, 3), "cached": partial(work.sampler, cached, 3)}
        ratio = interleaved(runs, rounds=9, warmup=1, baseline="uncached").speedup("cached")
        targets.append(
            {
                "target": repr(speed),
                "refreshes": len(result.plan.refreshes),
                "ideal_speedup": found.ideal(len(result.plan.refreshes)),
                "seconds": seconds,
                "speedup": [ratio.value, ratio.low, ratio.high],
                "measured_mse": result.measured,
            }
        )
    pipe.send({"first_s": first, "second_s": measured, "peak_mib": memory, "targets": targets})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    found: dict[str, Any] = {"images": IMAGES, "steps": STEPS, "threads": torch.get_num_threads()}
    for name, function in (("uncached", uncached), ("calibration", calibrated)):
        here, there = context.Pipe()
        process = context.Process(target=function, args=(there,))
        process.start()
        there.close()
        found[name] = here.recv()
        process.join()
    found["memory_ratio"] = found["calibration"]["peak_mib"] / found["uncached"]["peak_mib"]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(found, indent=1) + "\n")
    Console().print_json(data=found)


if __name__ == "__main__":
    main()
