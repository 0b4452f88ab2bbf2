"""What `bench.fidelity` compares, each method tuned to a budget: the setting that executes nearest to full / budget
FLOPs.

A method has one knob: how many steps refresh (evenly spaced after its warm-up where the paper spaces them evenly),
a threshold, or a number of its own. Plans are costed without running; what decides as it runs is run on a few images of
noise that is not scored.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from bench.method_runs import Record, read_json, write_json
from bench.method_settings import EVEN
from diffcache_fx import (
    Blocks,
    CacheSchedule,
    Calibration,
    Linear,
    Mask,
    Modules,
    Recording,
    RecordingDenoiser,
    Rows,
    ScheduleError,
    Sublayers,
    Taylor,
    Trunk,
    __version__,
    fitting,
    schedules,
)
from diffcache_fx.compile import Options
from diffcache_fx.exchange import ExchangeableDenoiser
from diffcache_fx.measure import executed_flops
from diffcache_fx.provenance import hash_of_weights

OURS = "calibrated plan"
CALIBRATED_ON, IMAGES = 11, 20  # a seed that no scored image has, and samples of it
TUNED_ON, FEW = 12, 10
LONGEST, REFINE = 20, 24
REACHED = 0.06  # a method reaches a budget whose logarithm is at most so far off
Knob = float
Made = Callable[["Tuner", Knob], CacheSchedule]


@dataclass(frozen=True)
class Contender:
    """make: the schedule for a value of the knob. kind: "refreshes" (a whole number of steps), "threshold" (the larger
    the faster), "whole" (of `values`), or the "budget" itself. decide: as in `compile_with_cache`."""

    method: str
    make: Made
    kind: str = "refreshes"
    values: tuple[float, ...] = ()
    decide: str = "host"
    published: bool = True


def respaced(schedule: CacheSchedule, refreshes: int, steps: int) -> CacheSchedule:
    """A schedule of even intervals with so many refreshes instead: those of its warm-up first, the others evenly."""
    bits = Mask(tuple((bit,) for bit in spaced(refreshes, steps, schedule.warm_up)))
    rules = tuple(dataclasses.replace(rule, guard=bits) for rule in schedule.rules)
    return dataclasses.replace(schedule, rules=rules, warm_up=1)


def spaced(refreshes: int, steps: int, warm_up: int) -> tuple[bool, ...]:
    """A bit for each step, 1 to compute."""
    first = min(warm_up, refreshes)
    rest = refreshes - first
    found = {first - 1 + round((n + 1) * (steps - first + 1) / (rest + 1)) for n in range(rest)} | set(range(first))
    return tuple(step in found for step in range(steps))


def _even(method: str, make: Callable[[], CacheSchedule], published: bool = True) -> Contender:
    return Contender(method, lambda tuner, count: respaced(make(), int(count), tuner.runs.steps), published=published)


def _threshold(method: str, make: Made, low: float, high: float, decide: str = "host") -> Contender:
    return Contender(method, make, "threshold", (low, high), decide)


def contenders() -> list[Contender]:
    """Ours first, then the published ones, then the trunk held at even intervals, as a control."""
    linear = Linear()
    return [
        Contender(OURS, lambda tuner, budget: tuner.calibrated(budget), "budget"),
        _even("fora", lambda: schedules.fora(3)),
        _even("taylor_seer, order 1", lambda: schedules.taylor_seer(3, 1)),
        _even("taylor_seer, order 2", lambda: schedules.taylor_seer(3, 2)),
        _even("taylor_seer, order 1, last block", lambda: schedules.taylor_seer(3, 1, regions=Trunk(first=0))),
        _even("taylor_seer, order 2, last block", lambda: schedules.taylor_seer(3, 2, regions=Trunk(first=0))),
        _even("hi_cache", lambda: schedules.hi_cache(3)),
        _even("foca", lambda: schedules.foca(3)),
        _even("ab_cache", lambda: schedules.ab_cache(3)),
        _even("cheb_booster", lambda: schedules.cheb_booster(3)),
        _even("deep_cache", lambda: schedules.deep_cache(3)),
        Contender("l2p", lambda tuner, count: tuner.learned(int(count))),
        Contender("dp_cache", lambda tuner, count: tuner.dynamic(int(count))),
        Contender("lemica", lambda tuner, count: tuner.minimax(int(count))),
        Contender("delta_dit", lambda _, every: schedules.delta_dit(int(every)), "whole", tuple(range(2, 16))),
        Contender("pab", lambda tuner, every: tuner.broadcast(int(every)), "whole", tuple(range(2, 16))),
        Contender("t_gate", lambda _, gate: schedules.t_gate(int(gate), halves=True), "whole", tuple(range(2, 48, 3))),
        _threshold("smooth_cache", lambda tuner, alpha: tuner.smooth(alpha), 0.01, 4.0),
        _threshold("block_cache", lambda tuner, delta: tuner.blocks(delta), 0.01, 8.0, "graph"),
        _threshold("mag_cache", lambda tuner, t: tuner.magnitude(t), 0.001, 10.0),
        _threshold("tea_cache", lambda tuner, t: tuner.polynomial(t), 0.001, 10.0),
        _threshold("first_block_cache", lambda _, t: schedules.first_block_cache(t), 0.005, 3.0),
        _threshold("first_block_cache, linear", lambda _, t: schedules.first_block_cache(t, forecast=linear), 0.005, 3),
        _threshold("db_cache, F4", lambda _, t: schedules.db_cache(4, 0, t, warm_up=4), 0.005, 3.0),
        _threshold("easy_cache", lambda _, t: schedules.easy_cache(t, warm_up=3), 0.001, 5.0),
        _threshold("di_cache", lambda _, t: schedules.di_cache(t), 0.005, 5.0),
        _threshold("speca", lambda _, t: schedules.speca(t), 0.003, 30.0),
        _even(EVEN, lambda: schedules.interval(3), published=False),
    ]


@dataclass
class Tuned:
    """A method at a budget. speedup: by FLOPs, as costed or as run on a few images."""

    schedule: CacheSchedule
    knob: float
    speedup: float


class Tuner:
    """One model under one sampler (`fidelity.Seeded`). What is measured on it is measured once; what is tuned is kept
    in `runs.work`."""

    def __init__(self, runs: Any) -> None:
        self.runs = runs
        self._costing: dict[str, ExchangeableDenoiser] = {}
        self._tried: dict[str, dict[float, Tuned]] = {}

    def sampler(self, images: int, seed: int) -> Callable[[Any, int], torch.Tensor]:
        """So many images of labels in turn, from noise that nothing else has."""

        def sample(denoiser: Any, more: int) -> torch.Tensor:
            labels = torch.arange(images) % self.runs.demo.num_classes
            return self.runs.demo.draw(
                denoiser,
                labels,
                scheduler=self.runs.sampling(),
                num_steps=self.runs.sampler_steps,
                seed=seed + more,
                batch_size=images,
                dtype=self.runs.dtype,
            )

        return sample

    # --- what methods want to know of the model ----------------------------------------------------------------------

    @cached_property
    def _calibration(self) -> Calibration:
        return Calibration(
            self.runs.demo.model,
            self.sampler(IMAGES, CALIBRATED_ON),
            longest=LONGEST,
            refine=REFINE,
            backend=self.runs.backend,
        )

    def recording(self, regions: Any, storage: str) -> Recording:
        key = repr((regions, storage))
        if key not in self._recordings:
            rules = [(entry, storage) for entry in (regions if isinstance(regions, tuple) else (regions,))]
            recorder = RecordingDenoiser(self.runs.demo.model, rules, backend="eager")
            self.sampler(IMAGES, CALIBRATED_ON)(recorder, 0)
            self._recordings[key] = recorder.recording()
        return self._recordings[key]

    @cached_property
    def _recordings(self) -> dict[str, Recording]:
        return {}

    @cached_property
    def _segments(self) -> Any:
        few = Calibration(self.runs.demo.model, self.sampler(2, CALIBRATED_ON), backend=self.runs.backend)
        return fitting.segment_errors(few)

    def calibrated(self, budget: float) -> CacheSchedule:
        """With the whole trunk cached; of plans for this budget the one that comes nearest to uncached samples on noise
        that was not planned on."""
        work = self._calibration
        nearest = min(range(work.least, work.steps), key=lambda count: abs(math.log(work.ideal(count) / budget)))
        return work.schedule(work.best(nearest, work.seed + 1))

    def learned(self, refreshes: int) -> CacheSchedule:
        bits = spaced(refreshes, self.runs.steps, 1)
        rows = fitting.learned_rows(self.recording(Trunk(first=0), "value"), [int(bit) for bit in bits])
        return schedules.mask(bits, regions=Trunk(first=0), forecast=Rows(rows), storage="value")

    def dynamic(self, refreshes: int) -> CacheSchedule:
        recording = self.recording(Trunk(first=0), "value")
        bits = fitting.dynamic_plan(recording, refreshes, order=2, warm_up=min(3, refreshes), longest=LONGEST)
        return schedules.mask(bits, regions=Trunk(first=0), forecast=Taylor(2), storage="value")

    def minimax(self, refreshes: int) -> CacheSchedule:
        return schedules.mask(fitting.minimax_plan(self._segments, refreshes), regions=Trunk(first=0))

    def broadcast(self, every: int) -> CacheSchedule:
        """With cross-attention over three times the range, where there is any (pyramid: 2 and 6 in the paper)."""
        crossed = any("attn2" in name for name, _ in self.runs.demo.model.named_modules())
        return schedules.pab(every, 3 * every if crossed else 0)

    def smooth(self, alpha: float) -> CacheSchedule:
        kinds = ("attention", "mlp")
        plans = fitting.smooth_plans(self.recording(tuple(Sublayers((kind,)) for kind in kinds), "value"), alpha)
        return schedules.smooth_cache(**dict(zip(kinds, plans, strict=True)))

    def blocks(self, delta: float) -> CacheSchedule:
        regions = Blocks(first=0, each=True) if self.runs.model == "digits" else Modules(("*.attentions.*",))
        plan = fitting.block_plan(self.recording(regions, "residual"), delta)
        return schedules.block_cache(plan, regions=regions)

    def magnitude(self, threshold: float) -> CacheSchedule:
        ratios = fitting.magnitude_ratios(self.recording(Trunk(first=0), "residual"))
        return schedules.mag_cache(threshold=threshold, ratios=ratios, longest=LONGEST)

    def polynomial(self, threshold: float) -> CacheSchedule:
        recording = self.recording(Trunk(first=0), "residual")
        return schedules.tea_cache(threshold, fitting.tea_coefficients(recording))

    # --- budgets -----------------------------------------------------------------------------------------------------

    def tuned(self, contender: Contender, budget: float) -> Tuned:
        """The setting nearest to a budget; kept. Raises ScheduleError, RegionError or CalibrationError where the method
        does not apply to the model."""
        path, made_for = self.runs.work / "tuned.json", self.made_for
        known, key = read_json(path), f"{contender.method} at {budget:g}x"
        if known.get("made_for") != made_for:
            known = {"made_for": made_for}
        if key not in known:
            found = self._search(contender, budget)
            known |= {key: {**vars(found), "schedule": found.schedule.to_dict()}}
            write_json(path, known)
        entry = known[key]
        return Tuned(CacheSchedule.from_dict(entry["schedule"]), entry["knob"], entry["speedup"])

    def forget(self, methods: Sequence[str]) -> None:
        """Tune these anew."""
        path = self.runs.work / "tuned.json"
        known = read_json(path)
        kept = {key: entry for key, entry in known.items() if key.rpartition(" at ")[0] not in methods}
        if kept != known:
            write_json(path, kept)

    @cached_property
    def made_for(self) -> Record:
        """What settings were tuned for."""
        runs = self.runs
        facts = {"steps": runs.steps, "dtype": str(runs.dtype), "weights": hash_of_weights(runs.demo.model)}
        return facts | {"images": IMAGES, "tuned_on": FEW, "longest": LONGEST, "version": __version__}

    def _search(self, contender: Contender, budget: float) -> Tuned:
        tried = self._tried.setdefault(contender.method, {})  # what one budget tried, the next need not

        def speedup(knob: float) -> float:
            if knob not in tried:
                schedule = contender.make(self, knob)
                tried[knob] = Tuned(schedule, knob, self.speedup(contender, schedule))
            return tried[knob].speedup

        if contender.kind == "budget":
            speedup(budget)
        elif contender.kind == "whole":
            for value in contender.values:
                speedup(value)
        elif contender.kind == "refreshes":
            low, high = 1, self.runs.steps  # fewer refreshes are faster
            while low + 1 < high:
                middle = (low + high) // 2
                low, high = (middle, high) if speedup(middle) >= budget else (low, middle)
            for count in (low, high):
                speedup(count)
        else:
            low_t, high_t = (math.log(value) for value in contender.values)
            for _ in range(9):
                middle_t = (low_t + high_t) / 2
                if speedup(math.exp(middle_t)) >= budget:
                    high_t = middle_t
                else:
                    low_t = middle_t
        return min(tried.values(), key=lambda entry: abs(math.log(entry.speedup / budget)))

    def speedup(self, contender: Contender, schedule: CacheSchedule) -> float:
        """By executed FLOPs."""
        denoiser = self._costing.get(contender.method)
        if denoiser is None or not _exchanged(denoiser, schedule):
            # Without a bound on programs: what is costed is what the plan says.
            backend = self.runs.backend if schedule.adaptive else "eager"
            options = Options(backend, self.runs.steps, max_programs=None)
            denoiser = ExchangeableDenoiser(self.runs.demo.model, schedule, options, self.runs.example(FEW))
            self._costing[contender.method] = denoiser
        if not schedule.adaptive and not schedule.windows:
            return denoiser.explain().ideal_speedup
        self.sampler(FEW, TUNED_ON)(denoiser, 0)
        found = executed_flops(denoiser)
        return found.full / found.spent


def _exchanged(denoiser: ExchangeableDenoiser, schedule: CacheSchedule) -> bool:
    try:
        denoiser.exchange(schedule)
    except ScheduleError:
        return False
    return True


def chosen(names: Sequence[str]) -> list[Contender]:
    """Those of these names, ours always; all without names. Raises ValueError for a name that is none."""
    known = {contender.method: contender for contender in contenders()}
    for name in names:
        if name not in known:
            raise ValueError(f"no method is called {name!r}; there are {', '.join(known)}")
    return [contender for method, contender in known.items() if not names or method in (OURS, *names)]
