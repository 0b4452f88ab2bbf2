"""What calibration costs and whether targets are met: `python -m bench.calibrating`.

The demo model, 50 steps, a batch of 20. Cost: seconds of the second of two calibrations in one process and of finding
each target, and how many of them tracing and compiling take; peak memory over that of an uncached compiled generation,
each in a process of its own. Targets: errors on 200 samples of noise that was not calibrated on, and speed-ups measured
in turn with the uncached model. Leave the machine alone meanwhile. Writes `bench/results/calibrating.json`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from bench.method_runs import write_json
from diffcache_fx import Calibration, Psnr, RelativeL1, Speedup, compile, compile_with_cache
from diffcache_fx.demo.digits import load_digits
from diffcache_fx.measure import compiled_baseline, interleaved

RESULTS = Path(__file__).parent / "results" / "calibrating.json"
IMAGES, STEPS, HELD_BACK, ROUNDS = 20, 50, 200, 9
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

    def within(self, cached: Any, plain: Any, target: Psnr | RelativeL1) -> dict[str, Any]:
        """The share of held-back samples whose error is not above the one asked for."""
        seeds = range(HELD_BACK // IMAGES)
        errors = torch.cat([target.error(self.sampler(cached, seed), self.sampler(plain, seed)) for seed in seeds])
        return {"within": float((errors <= target.largest).float().mean()), "samples": len(errors)}

    def faster(self, cached: Any, plain: Any) -> dict[str, Any]:
        """The speed-up, measured in turn with the uncached model; and its interval."""
        runs = {"uncached": partial(self.sampler, plain, 3), "cached": partial(self.sampler, cached, 3)}
        ratio = interleaved(runs, rounds=ROUNDS, warmup=1, baseline="uncached").speedup("cached")
        return {"speedup": [ratio.value, ratio.low, ratio.high]}


class Compiling:
    """Counts the seconds that tracing and compiling take from now on."""

    def __init__(self) -> None:
        self.seconds = 0.0
        for name in ("capture", "lower"):
            setattr(compile, name, self._counted(getattr(compile, name)))

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - start

        return run


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
    """Sends the cost first and then each target as it is done."""
    work, compiling = Work(), Compiling()
    start = time.perf_counter()
    work.calibration()
    first = time.perf_counter() - start
    before, start = compiling.seconds, time.perf_counter()
    found = work.calibration()
    second, compiled = time.perf_counter() - start, compiling.seconds - before
    pipe.send({"first_s": first, "second_s": second, "second_compiling_s": compiled, "peak_mib": peak()})
    plain = compiled_baseline(work.demo.model, "inductor")
    for target in (*ERRORS, *SPEEDS):
        before, start = compiling.seconds, time.perf_counter()
        result = found.find(target)
        seconds = time.perf_counter() - start
        row: dict[str, Any] = {"target": repr(target), "seconds": seconds}
        row["calibration_s"] = second + seconds
        row["after_compilation_s"] = row["calibration_s"] - compiled - (compiling.seconds - before)
        row |= {"refreshes": len(result.plan.refreshes), "ideal_speedup": found.ideal(result.plan)}
        row |= {"predicted_mse": result.predicted, "measured_mse": result.measured}
        cached = compile_with_cache(work.demo.model, result.schedule, num_steps=STEPS)
        row |= work.faster(cached, plain) if isinstance(target, Speedup) else work.within(cached, plain, target)
        pipe.send(row)
    pipe.send(None)


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
        if name == "calibration":
            found["memory_ratio"] = found["calibration"]["peak_mib"] / found["uncached"]["peak_mib"]
            found["targets"] = []
            while (row := here.recv()) is not None:
                found["targets"].append(row)
                write_json(options.out, found)
        process.join()
    Console().print_json(data=found)


if __name__ == "__main__":
    main()
