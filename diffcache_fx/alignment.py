"""Fitting scale-shift corrections: reused values aligned with what would be computed, on the cached model's own runs.

Block Caching (Wimbauer et al., CVPR 2024) unrolls the cached model from noise; at every step the blocks that it reuses
are computed as well, by the frozen weights, on what enters them there; and scale and shift are trained to bring the two
together. Here one program does both at once, and returns of each pair of values the means and second moments by
channel: all that the squared error depends on. What enters a block is taken as given, so that no gradient runs through
the model.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from diffcache_fx.export.backends import check_backend
from diffcache_fx.passes.correct import constant_name

from .calibration import Progress, Sampler, check_count, within
from .call import Call
from .compile import Captured, Options, user_shapes
from .correction import ScaleShift
from .denoiser import CachedDenoiser
from .driver import Driver
from .errors import CalibrationError
from .learners import ClosedForm, Learner, Trained
from .provenance import Provenance
from .recognition import Place
from .record import Decision
from .schedule import CacheSchedule
from .step_set import Feed


class _AligningDriver(Driver):
    """Runs the plan, and lets each step be learned from."""

    def __init__(self, schedule: CacheSchedule, num_steps: int, run: _Run) -> None:
        super().__init__(schedule, num_steps)
        self.run = run

    def _run_specialised(self, call: Call) -> tuple[list[Tensor], Decision]:
        steps, place, state = call.steps, call.place, call.state
        if place.refining:
            raise CalibrationError(
                "corrections are fitted to runs that call the model once at each timestep, and this sampler refines: "
                "take one that does not, or a schedule without corrections"
            )
        key = steps.choice.serve(call.allowed, steps.weight)
        rows = self._rows(steps, key, state, place.position, {}) if key else None
        feed = Feed(call.users, rows=rows, moment=self._moment(steps, place))
        results = steps.run(key, state, feed)
        self.run.note(place)
        moments = {target.rpartition("/")[0]: values for target, values in results.signals.items()}
        learner = self.run.learner
        if learner is not None and moments:
            learner.learn(place.step, moments)
            results = steps.run(key, state, feed) if learner.again else results
        for name, values in results.states.items():
            state.histories[name].refresh(values, float(place.position))
        return results.users, call.decision(key)


@dataclasses.dataclass
class _Run:
    """What the drivers of all threads share. timesteps: of the first run. calls: in all, by guidance branch."""

    learner: Learner | None = None
    timesteps: dict[int, float | None] = dataclasses.field(default_factory=dict)
    calls: Counter[str] = dataclasses.field(default_factory=Counter)

    def note(self, place: Place) -> None:
        self.timesteps.setdefault(place.step, place.timestep)
        self.calls[place.context.name] += 1


class _Aligning(CachedDenoiser):
    """The cached model, whose programs also compute what they reuse."""

    def __init__(self, model: nn.Module, schedule: CacheSchedule, options: Options) -> None:
        super().__init__(model, schedule, options)
        self._own["run"] = _Run()

    def _make_driver(self) -> Driver:
        steps = self._own["options"].num_steps
        return _AligningDriver(self._own["schedule"], steps, self._own["run"])

    @property
    def run(self) -> _Run:
        run: _Run = self._own["run"]
        return run

    def captured(self) -> Captured:
        known = self._signatures.every()
        if len(known) != 1:
            raise CalibrationError(
                f"the sampler calls the denoiser in {len(known)} different ways (tensors of other sizes, other "
                "arguments), and corrections are fitted to one: make its calls alike"
            )
        return known[0].captured

    def tables(self) -> dict[str, Tensor]:
        """By "region/index", the table in use; what is written there takes effect at the next step."""
        program = self.captured().program
        names = {
            f"{region.name}/{index}": constant_name(region.name, index)
            for region in program.regions
            for index, value in enumerate(region.cut)
            if value.scale is not None
        }
        return {target: program.constants[name] for target, name in names.items()}


def fit_scale_shift(
    model: Any,
    sampler: Sampler,
    schedule: CacheSchedule,
    *,
    num_steps: int | None = None,
    generations: int = 1,
    **options: Any,
) -> CacheSchedule:
    """The schedule with scale-shift corrections in closed form: per step and channel, the least-squares fit of what is
    reused to what would be computed, one step after the other, on the corrected model's own way from noise.

    model, sampler: as in `Calibration`; sampler(denoiser, seed) draws one batch, of 32 samples, say. schedule: one
    whose decisions are known ahead. num_steps: of a generation, where the schedule does not say. generations: how many
    batches are drawn. options: seed, backend ("eager": little is run), max_programs (None: each row of the plan has its
    program; compile the result alike, since merged rows reuse values of another age), describe, progress.

    Raises CalibrationError for a schedule that decides as it runs, or whose number of steps is not known.
    """
    check_count("generations", generations, 1, None)
    run = _prepared(model, sampler, schedule, num_steps, **options)
    run.aligning.run.learner = ClosedForm(run.aligning.tables())
    for index in range(generations):
        run.told("align", index, generations)
        run.draw(index)
    run.told("align", generations, generations)
    return run.schedule()


def train_scale_shift(
    model: Any,
    sampler: Sampler,
    schedule: CacheSchedule,
    *,
    num_steps: int | None = None,
    iterations: int = 300,
    learning_rate: float = 0.02,
    **options: Any,
) -> CacheSchedule:
    """The schedule with scale-shift corrections as published: linear maps of the timestep's embedding, trained on the
    cached model's own way from noise (Wimbauer et al., CVPR 2024: 15,000 iterations, on eight A100 for half a day or
    longer; the learning rate is not in the paper).

    iterations: updates of the maps, one for each step that reuses; batches are drawn until they are done. Others as in
    `fit_scale_shift`.
    """
    check_count("iterations", iterations, 1, None)
    run = _prepared(model, sampler, schedule, num_steps, **options)
    learner = Trained(run.aligning.tables(), run.timesteps(), iterations, learning_rate)
    run.aligning.run.learner = learner
    index = 0
    while learner.done < iterations:
        run.told("align", learner.done, iterations)
        before = learner.done
        run.draw(index)
        index += 1
        if learner.done == before:
            raise CalibrationError("this schedule reuses nothing in a run, so there is nothing to align")
    run.told("align", iterations, iterations)
    return run.schedule()


@dataclasses.dataclass
class _Prepared:
    """A model that has been captured, and is ready to be drawn from."""

    aligning: _Aligning
    sample: Sampler
    steps: int
    seed: int
    told: Progress
    describe: str
    asked: CacheSchedule

    def draw(self, index: int) -> None:
        with torch.no_grad():
            self.sample(self.aligning, self.seed + index)

    def timesteps(self) -> list[float]:
        """Of each step; the numbers of the steps, from the last to the first, where they could not be read."""
        found = self.aligning.run.timesteps
        known = [found.get(step) for step in range(self.steps)]
        if any(time is None for time in known):
            return [float(self.steps - step) for step in range(self.steps)]
        return [float(time) for time in known if time is not None]

    def schedule(self) -> CacheSchedule:
        program, found = self.aligning.captured().program, self.aligning.tables()
        rules = []
        for index, rule in enumerate(self.asked.rules):
            own = [f"{r.name}/{i}" for r in program.regions if r.rule == index for i in range(len(r.cut))]
            tables = [found[name] for name in own if name in found]
            rules.append(dataclasses.replace(rule, correction=ScaleShift.of(tables)))
        timesteps = [self.aligning.run.timesteps.get(step) for step in range(self.steps)]
        made_for = Provenance.of(self.aligning.model, timesteps, user_shapes(program), self.describe)
        return dataclasses.replace(self.asked, rules=tuple(rules), made_for=made_for)


def _prepared(
    model: Any,
    sampler: Sampler,
    schedule: CacheSchedule,
    num_steps: int | None,
    *,
    seed: int = 0,
    backend: Any = "eager",
    max_programs: int | None = None,
    describe: str = "",
    progress: Progress | None = None,
    **backend_options: Any,
) -> _Prepared:
    """A first generation captures the model; its steps are counted."""
    if schedule.adaptive or schedule.branch is not None:
        raise CalibrationError(
            f"the schedule {schedule.name!r} decides as it runs, and corrections are fitted to steps that are known "
            "ahead to reuse: take a plan, such as schedules.mask or block_cache"
        )
    steps = num_steps if num_steps is not None else schedule.mask_length
    if steps is None:
        raise CalibrationError("corrections are made for a number of steps: pass num_steps=")
    check_count("num_steps", steps, 2, None)
    check_backend(backend, backend_options)
    if backend == "torch_tensorrt":
        raise CalibrationError(
            "corrections cannot be fitted in TensorRT engines, which keep the tables they were built with: fit with "
            "backend='eager' or 'inductor', then compile with the result"
        )
    denoiser, sample = within(model, sampler)
    if schedule.made_for is not None:
        schedule.made_for.check_model(denoiser)
        schedule.made_for.check_steps(steps)
    blank = tuple(dataclasses.replace(rule, correction=ScaleShift(steps)) for rule in schedule.rules)
    options = Options(backend, steps, max_programs=max_programs, backend_options=backend_options, compare=True)
    aligning = _Aligning(denoiser, dataclasses.replace(schedule, rules=blank), options)
    told = progress or (lambda stage, done, total: None)
    made = _Prepared(aligning, sample, steps, seed, told, describe, schedule)
    told("record", 0, 1)
    made.draw(0)
    told("record", 1, 1)
    for seen in set(aligning.run.calls.values() or (0,)) - {steps}:
        raise CalibrationError(f"the sampler called the denoiser in {seen} steps, and corrections are for {steps}")
    return made


__all__ = ["fit_scale_shift", "train_scale_shift"]
