"""What measures: ratios and intervals, order of the rounds, PSNR, FLOPs and compilations counted."""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffcache_fx import Blocks, CachedDenoiser, compile_with_cache, schedules
from diffcache_fx.measure import (
    Timings,
    compiled_baseline,
    compiler_use,
    counted_flops,
    executed_flops,
    interleaved,
    psnr,
    recorded_programs,
    relative_error,
)

STEPS = 6


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj(self.norm(x))


class Denoiser(nn.Module):
    """Four equal blocks of width 16."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(4))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = x * (1 + t.reshape(-1, 1, 1) / 1000)
        for block in self.blocks:
            x = block(x)
        return x


def cached_denoiser(schedule: str = "interval") -> tuple[CachedDenoiser, Callable[[], object]]:
    """A cached denoiser in eager and a generation of it."""
    torch.manual_seed(0)
    x, times = torch.randn(2, 8, 16), [torch.full((2,), 900.0 - 100 * step) for step in range(STEPS)]
    found = schedules.get(schedule, every=3, regions=Blocks(first=1)) if schedule == "interval" else schedule
    cached = compile_with_cache(
        Denoiser().eval().requires_grad_(False),
        found,
        backend="eager",
        example_inputs=((x, times[0]), {}),
        num_steps=STEPS,
    )

    def generation() -> None:
        cached.reset()
        for t in times:
            cached(x, t)

    return cached, generation


def test_interleaved_runs_every_function_once_a_round_in_changing_order() -> None:
    calls: list[str] = []
    names = ("a", "b", "c")
    functions = {name: (lambda name=name: calls.append(name)) for name in names}
    timings = interleaved(functions, rounds=10, warmup=2)
    turns = [tuple(calls[i : i + 3]) for i in range(0, len(calls), 3)]
    assert len(turns) == 12
    assert all(sorted(turn) == list(names) for turn in turns)
    assert len(set(turns)) > 1
    assert {name: len(values) for name, values in timings.seconds.items()} == dict.fromkeys(names, 10)
    first = calls.copy()
    calls.clear()
    interleaved(functions, rounds=10, warmup=2)
    assert calls == first


def test_interleaved_tells_fast_from_slow() -> None:
    functions = {"slow": lambda: time.sleep(0.02), "fast": lambda: time.sleep(0.005)}
    timings = interleaved(functions, rounds=5, warmup=0)
    speedup = timings.speedup("fast")
    assert 1.5 < speedup.value < 8
    assert speedup.low <= speedup.value <= speedup.high
    assert timings.speedup("slow").value == 1.0


@pytest.mark.parametrize(
    "options", [{"rounds": 0}, {"warmup": -1}, {"calls": 0}, {"baseline": "nobody"}], ids=lambda options: str(options)
)
def test_interleaved_refuses_nonsense(options: dict[str, object]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        interleaved({"a": lambda: None}, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one function"):
        interleaved({})


def test_ratio_cancels_what_falls_on_whole_rounds() -> None:
    drift = np.linspace(1.0, 3.0, 21)
    ratio = Timings({"a": 2 * drift, "b": drift}, "a").speedup("b")
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((2.0, 2.0, 2.0))
    noisy = np.random.default_rng(0).uniform(0.9, 1.1, 40)
    ratio = Timings({"a": 2 * noisy, "b": noisy[::-1]}, "a").speedup("b")
    assert ratio.low < ratio.value < ratio.high


def test_psnr() -> None:
    image = torch.zeros(1, 1, 4, 4)
    assert math.isinf(psnr(image, image.clone()))
    assert psnr(image + 0.2, image) == pytest.approx(20.0)
    two = torch.cat((image + 0.2, image + 0.02))
    assert psnr(two, torch.cat((image, image))) == pytest.approx(30.0)
    assert psnr(torch.cat((image + 0.2, image)), torch.cat((image, image))) == pytest.approx((20 + 96.33) / 2, abs=0.01)
    with pytest.raises(ValueError, match="differ in shape"):
        psnr(image, image[0])


def test_relative_error() -> None:
    reference = torch.tensor([3.0, 4.0])
    assert relative_error(reference, reference) == 0
    assert relative_error(reference * 1.1, reference) == pytest.approx(0.1, rel=1e-5)


def test_executed_flops_agree_with_what_ran() -> None:
    cached, generation = cached_denoiser()
    ran = counted_flops(generation)
    flops = executed_flops(cached)
    assert flops.spent == ran
    assert flops.full == STEPS * 4 * 2 * 2 * 8 * 16 * 16
    # Refreshed at steps 0 and 3; three of the four blocks are reused at the other four steps.
    assert flops.ideal_speedup == pytest.approx(24 / (2 * 4 + 4 * 1))


def test_flops_without_reuse_are_the_models_own() -> None:
    cached, generation = cached_denoiser("always")
    generation()
    assert executed_flops(cached).ideal_speedup == 1.0


def test_recorded_programs_run_alone() -> None:
    cached, generation = cached_denoiser()
    programs = recorded_programs(cached, generation, STEPS)
    assert sorted(len(reused) for reused in programs) == [0, 1]
    for program in programs.values():
        outputs = program()
        assert outputs[0].shape == (2, 8, 16)
    generation()
    assert cached.stats().reused == 4


def test_compiler_use_counts_compilations_and_breaks() -> None:
    def broken(x: Tensor) -> Tensor:
        x = x + 1
        torch._dynamo.graph_break()
        return x * 2

    torch._dynamo.reset()
    compiled = torch.compile(broken, backend="aot_eager")
    with compiler_use() as use, torch.no_grad():
        compiled(torch.zeros(3))
    assert use.graph_breaks == 1
    assert use.compilations == 2
    assert len(use.reasons) == 1
    with compiler_use() as again, torch.no_grad():
        compiled(torch.zeros(3))
    assert (again.graph_breaks, again.compilations) == (0, 0)


def test_baseline_is_the_module_itself_in_eager() -> None:
    module = Denoiser()
    assert compiled_baseline(module, "eager") is module
    assert compiled_baseline(module, "aot_eager") is not module
