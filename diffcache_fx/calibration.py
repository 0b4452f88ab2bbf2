"""`calibrate`: state a target, have the model measured, get the schedule.

One recorded generation tells how the regions' values move, a second one what holding them does to the latents
(`effects`), parts of a few more how that reaches the final sample (`probing`); the rest is planning (`planning`), and
plans are tried before one is returned (`choosing`, `finding`).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffcache_fx.export.backends import check_backend

from .allotment import Allotment, JointPlan
from .choosing import Choice
from .clock import Clock
from .compile import user_shapes
from .effects import Maps, effects, sampler_maps
from .errors import CalibrationError, NotFiniteError
from .filling import Array, differences
from .finding import Findings, find
from .planning import LONGEST, Planner
from .probing import gains
from .provenance import Provenance
from .recording import RecordingDenoiser, RegionRecord, Replay
from .schedule import CacheSchedule
from .selection import Selection, Trunk
from .targets import Psnr, RelativeL1, Target, check_target
from .trial import Trial, planned
from .trying import Tries

Sampler = Callable[[Any, int], Tensor]
Progress = Callable[[str, int, int], None]
MOST_GROUPS = 4


def calibrate(model: Any, sampler: Sampler, target: Target, **options: Any) -> CacheSchedule:
    """The schedule of least error that meets a target; see `Calibration` for the options."""
    check_target(target)
    return Calibration(model, sampler, **options).find(target).schedule


class Calibration:
    """A model measured under a sampler. Targets can be asked for one after another; what was measured is kept.

    model: the denoiser, or a diffusers pipeline (whose denoiser is exchanged while it is measured).
    sampler: called as sampler(denoiser, seed), or sampler(pipeline, seed): one generation with noise that depends on
        the seed alone; returns the final samples [N, ...]. An error target wants twenty of them: with
        fewer, the worst has to meet it.
    regions, storage: as in `Rule`; they are refreshed and reused together. The whole trunk by default: what its first
        block would cost at every step is better spent on refreshes, where forecasts are fitted. Several selections are
        planned each with steps of its own (`allotment`), at most four: every combination is a program, so compile their
        schedule with max_programs=2 ** selections.
    history: refreshed values that a forecast sees, 1 to 3. longest: most reuses in a row. warm_up: steps at the start
        that refresh.
    memory_cap: most bytes of cache for one guidance branch; shortens the history.
    probes: steps at which the way of an error of each selection to the final sample is measured, each for part of a
        generation.
    refine: plans more that are tried, each in a generation or two, to move the one that is found towards what does best
        (and a few other starts and ways to fill its steps): where errors are too large for the linear picture, with few
        refreshes, the best plan is near the predicted one, not it. Two noises then tell which is best.
    describe: the sampler in words, for messages. progress: told of each stage.

    Raises CalibrationError, naming what cannot be met.
    """

    def __init__(
        self,
        model: Any,
        sampler: Sampler,
        *,
        regions: Selection | Sequence[Selection] | None = None,
        storage: str = "auto",
        history: int = 3,
        longest: int = LONGEST,
        warm_up: int = 1,
        memory_cap: int | None = None,
        probes: int = 8,
        refine: int = 0,
        backend: Any = "inductor",
        seed: int = 0,
        describe: str = "",
        progress: Progress | None = None,
        **backend_options: Any,
    ) -> None:
        for name, value, most in (("history", history, 3), ("longest", longest, None), ("warm_up", warm_up, None)):
            check_count(name, value, 1, most)
        check_count("probes", probes, 2, None)
        check_count("refine", refine, 0, None)
        check_backend(backend, backend_options)
        check_sampler(sampler)
        self.model, self._sample = within(model, sampler)
        self.groups = tuple(regions) if isinstance(regions, Sequence) else (regions or Trunk(first=0),)
        if not 1 <= len(self.groups) <= MOST_GROUPS:
            raise CalibrationError(f"regions must be from 1 to {MOST_GROUPS} selections, not {len(self.groups)}")
        self.storage = storage
        self.longest, self.warm_up, self.refine, self.seed = longest, warm_up, refine, seed
        self.backend, self.backend_options = backend, backend_options
        self.told = progress or (lambda stage, done, total: None)
        self.told("record", 0, 1)
        recorder = RecordingDenoiser(
            self.model,
            [(group, storage) for group in self.groups],
            backend=backend,
            **backend_options,
        )
        self.reference = self.run(recorder, seed)
        self.recording = recorder.recording()
        self.tries = Tries(self, recorder, self.reference)
        self._maps: list[Maps | None] = []
        self._recorder = recorder
        self.told("record", 1, 1)
        self.steps = self.recording.steps
        self.history = self._fitting(history, memory_cap)
        captured = recorder.current_signature().captured
        shapes = user_shapes(captured.program)
        self.made_for = Provenance.of(self.model, self.recording.timesteps, shapes, describe)
        self.trial = Trial(
            self.model, self.groups, storage, self.history, self.steps, backend, backend_options, like=recorder
        )
        tables = [self._effects(group) for group in range(len(self.groups))]
        self.gains = gains(self, tables, probes)
        self._plans: dict[int, JointPlan] = {}
        planners = [
            Planner(table, own, history=self.history, longest=self.longest, warm_up=self.warm_up)
            for table, own in zip(tables, self.gains, strict=True)
        ]
        self.allotment = Allotment(planners, [self._saved(group) for group in range(len(self.groups))])
        self.choice = Choice(self)

    # --- measuring -------------------------------------------------------------------------------------------------

    def run(self, denoiser: Any, seed: int) -> Tensor:
        """The samples of a generation with this denoiser. Raises CalibrationError for what is none."""
        with torch.no_grad():
            samples = self._sample(denoiser, seed)
        if not isinstance(samples, Tensor) or samples.dim() < 2:
            raise CalibrationError(
                f"the sampler must return the final samples as a tensor [N, ...], not {type(samples).__name__}"
            )
        if not bool(samples.isfinite().all()):
            raise NotFiniteError("the sampler returned samples that are not finite")
        return samples.detach().float().cpu()

    def _fitting(self, history: int, cap: int | None) -> int:
        """How many refreshed values fit below the cap."""
        one = sum(region.nbytes for region in self.recording.regions)
        if cap is None:
            return history
        if one > cap:
            raise CalibrationError(
                f"one copy of what is cached takes {one} bytes for a guidance branch, and memory_cap is {cap}: raise "
                "it, or choose other regions"
            )
        return max(1, min(history, cap // one))

    def regions_of(self, group: int) -> list[RegionRecord]:
        """What was recorded of the regions of one selection."""
        return [region for region in self.recording.regions if region.rule == group]

    def _saved(self, group: int) -> float:
        """FLOPs that reusing one selection saves at a step."""
        return sum(region.flops for region in self.regions_of(group))

    def _effects(self, group: int) -> Array:
        """Of holding a value of one selection: on the latents, or else how far the value itself is off."""
        found = effects(self, group)
        if found is not None:
            return found
        return differences(np.sum([region.gram.numpy() for region in self.regions_of(group)], axis=0))

    def maps(self) -> Maps | None:
        """What the sampler makes of the model's outputs; measured once."""
        if not self._maps:
            self._maps.append(sampler_maps(self))
        return self._maps[0]

    @property
    def outputs(self) -> Replay:
        """What the model returned in the generation that was recorded."""
        return self.tries.said(self.seed)

    @property
    def latents(self) -> int:
        """Which leaf of the model's calls the latents are."""
        return self._recorder.current_signature().latents

    # --- planning and trying ---------------------------------------------------------------------------------------

    def find(self, target: Target) -> Findings:
        """The schedule that meets a target. Raises CalibrationError where none does."""
        return find(self, target)

    def plan(self, refreshes: int) -> JointPlan:
        """The best plan that costs at most so many refreshes of everything, by the objective; nothing runs."""
        if refreshes not in self._plans:
            self._plans[refreshes] = self.allotment.plan(refreshes)
        return self._plans[refreshes]

    def best(self, refreshes: int, seed: int | None = None) -> JointPlan:
        """Of plans of this cost the one whose samples come nearest to the uncached ones, by mean PSNR, as tried on some
        noise (that of the recording, unless given); see `choosing`."""
        return self.choice.best(refreshes, self.seed if seed is None else seed)

    def tried(self, plan: JointPlan, seed: int) -> Tensor:
        """The samples of a generation under a plan; what is known of the uncached one is not computed again."""
        self.trial.follow(plan, self.tries.said(seed))
        return self.run(self.trial, seed)

    def timed(self, plan: JointPlan, uncached: Callable[..., Any]) -> Clock:
        """How long the steps of a generation under a plan take, beside the uncached model's."""
        self.trial.follow(plan)
        return self.trial.timed(uncached, lambda: self.run(self.trial, self.seed))

    def moved(self, plan: JointPlan, seed: int | None = None) -> float:
        """Mean square error of the final samples under a plan."""
        return self.tries.outcome(plan, self.seed if seed is None else seed).moved

    def level(self, plan: JointPlan, seed: int | None = None) -> float:
        """Mean logarithm of the mean square error of each final sample under a plan (`trying.Outcome`)."""
        return self.tries.outcome(plan, self.seed if seed is None else seed).level

    def errors(self, plan: JointPlan, target: Psnr | RelativeL1, seed: int) -> Tensor:
        """Error of each sample under a plan, from the uncached samples of the same noise."""
        return self.tries.outcome(plan, seed).errors[type(target)]

    def schedule(self, plan: JointPlan) -> CacheSchedule:
        """A plan as a schedule, with what it was made for."""
        return planned(self.groups, self.storage, plan, self.made_for)

    def ideal(self, plan: JointPlan | int) -> float:
        """Speed-up of a plan, or of so many refreshes of everything, by executed FLOPs."""
        counts = [plan] * len(self.groups) if isinstance(plan, int) else [len(part.refreshes) for part in plan.parts]
        full = self.recording.full_flops * self.steps
        return full / (full - sum(self._saved(group) * (self.steps - n) for group, n in enumerate(counts)))

    @property
    def least(self) -> int:
        """The fewest refreshes that the longest run allows."""
        return self.warm_up + math.ceil(max(self.steps - self.warm_up - self.longest, 0) / (self.longest + 1))


def check_count(name: str, value: Any, least: int, most: int | None) -> None:
    """Raises CalibrationError for what is no whole number in that range."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        limits = f"from {least}" + (f" to {most}" if most is not None else "")
        raise CalibrationError(f"{name} must be a whole number {limits}, not {value!r}")


def check_sampler(sampler: Any) -> None:
    """Raises CalibrationError for what cannot be called as samplers are."""
    try:
        inspect.signature(sampler).bind(None, 0)
    except (TypeError, ValueError) as error:
        raise CalibrationError(
            f"the sampler is called as sampler(denoiser, seed), and this one cannot be ({error}): give it two arguments"
        ) from error


def within(model: Any, sampler: Sampler) -> tuple[nn.Module, Sampler]:
    """The denoiser, and a sampler that takes one; of a pipeline, its denoiser is exchanged for the time of a run."""
    if isinstance(model, nn.Module):
        return model, sampler
    from .models import PARTS

    part = next((name for name in PARTS if isinstance(getattr(model, name, None), nn.Module)), None)
    if part is None:
        raise CalibrationError(
            f"calibrate takes a denoiser (an nn.Module) or a pipeline with one under {', '.join(PARTS)}, not a "
            f"{type(model).__name__}"
        )
    denoiser = getattr(model, part)

    def sample(other: Any, seed: int) -> Tensor:
        setattr(model, part, other)
        try:
            return sampler(model, seed)
        finally:
            setattr(model, part, denoiser)

    return denoiser, sample


__all__ = ["Calibration", "calibrate"]
