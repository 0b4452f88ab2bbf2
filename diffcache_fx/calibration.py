"""`calibrate`: state a target, have the model measured, get the schedule.

One recorded generation tells how the regions' values move, parts of a few more how their errors reach the final sample;
the rest is planning (`planning`), and the plan is tried before it is returned (`finding`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .clock import Clock
from .compile import user_shapes
from .errors import CalibrationError
from .finding import Findings, find
from .planning import LONGEST, Planned, Planner
from .provenance import Provenance
from .recording import RecordingDenoiser
from .schedule import CacheSchedule
from .selection import Selection, Trunk
from .targets import Psnr, RelativeL1, Target
from .trial import Trial, planned

Sampler = Callable[[Any, int], Tensor]
Progress = Callable[[str, int, int], None]
# Of the steadiness in `planning`.
TRIED = (0.03, 0.3, 1.0)


def calibrate(model: Any, sampler: Sampler, target: Target, **options: Any) -> CacheSchedule:
    """The schedule of least error that meets a target; see `Calibration` for the options."""
    return Calibration(model, sampler, **options).find(target).schedule


class Calibration:
    """A model measured under a sampler. Targets can be asked for one after another; what was measured is kept.

    model: the denoiser, or a diffusers pipeline (whose denoiser is exchanged while it is measured).
    sampler: called as sampler(denoiser, seed), or sampler(pipeline, seed): one generation with noise that depends on
        the seed alone; returns the final samples [N, ...]. An error target wants twenty of them: with
        fewer, the worst has to meet it.
    regions, storage: as in `Rule`; they are refreshed and reused together. The whole trunk by default: what its first
        block would cost at every step is better spent on refreshes, where forecasts are fitted.
    history: refreshed values that a forecast sees, 1 to 3. longest: most reuses in a row. warm_up: steps at the start
        that refresh.
    memory_cap: most bytes of cache for one guidance branch; shortens the history.
    probes: steps at which the way of an error to the final sample is measured, each for a generation.
    describe: the sampler in words, for messages. progress: told of each stage.

    Raises CalibrationError, naming what cannot be met.
    """

    def __init__(
        self,
        model: Any,
        sampler: Sampler,
        *,
        regions: Selection | None = None,
        storage: str = "auto",
        history: int = 3,
        longest: int = LONGEST,
        warm_up: int = 1,
        memory_cap: int | None = None,
        probes: int = 8,
        backend: Any = "inductor",
        seed: int = 0,
        describe: str = "",
        progress: Progress | None = None,
        **backend_options: Any,
    ) -> None:
        for name, value, most in (("history", history, 3), ("longest", longest, None), ("warm_up", warm_up, None)):
            check_count(name, value, 1, most)
        check_count("probes", probes, 2, None)
        self.model, self._sample = within(model, sampler)
        self.regions, self.storage = regions or Trunk(first=0), storage
        self.longest, self.warm_up, self.seed = longest, warm_up, seed
        self.backend, self.backend_options = backend, backend_options
        self.told = progress or (lambda stage, done, total: None)
        self.told("record", 0, 1)
        recorder = RecordingDenoiser(
            self.model,
            [(self.regions, storage)],
            backend=backend,
            **backend_options,
        )
        self.reference = self.run(recorder, seed)
        self._references, self._moved = {seed: self.reference}, dict[tuple[Planned, int], float]()
        self._errors: dict[tuple[Planned, Psnr | RelativeL1, int], Tensor] = {}
        self.recording = recorder.recording()
        self._known = {seed: recorder.outputs()}
        self._recorder = recorder
        self.told("record", 1, 1)
        self.steps = self.recording.steps
        self.history = self._fitting(history, memory_cap)
        captured = recorder.current_signature().captured
        shapes = user_shapes(captured.program)
        self.made_for = Provenance.of(self.model, self.recording.timesteps, shapes, describe)
        self.trial = Trial(
            self.model, self.regions, storage, self.history, self.steps, backend, backend_options, like=recorder
        )
        self.gram = sum(region.gram for region in self.recording.regions).numpy()  # type: ignore[union-attr]
        self.gains = self._measure_gains(probes)
        self._plans: dict[int, Planned] = {}
        self.planner = Planner(self.gram, self.gains, history=self.history, longest=self.longest, warm_up=self.warm_up)

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
            raise CalibrationError("the sampler returned samples that are not finite")
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

    def _measure_gains(self, probes: int) -> np.ndarray[Any, Any]:
        """At some steps, how far the final sample moves when the step before is held, over how far the value is off;
        in between, by interpolation of logarithms."""
        first = max(self.warm_up, 1)
        if first >= self.steps:
            raise CalibrationError(f"a run of {self.steps} steps with {self.warm_up} to warm up leaves none to reuse")
        places = np.unique(np.linspace(first, self.steps - 1, probes).round().astype(int))
        gains = []
        for index, step in enumerate(places):
            self.told("probe", index, len(places))
            held = Planned(tuple(set(range(self.steps)) - {int(step)}), ((1.0,),) * self.steps, 0.0, 0.0)
            moved = float((self.tried(held, self.seed) - self.reference).norm())
            inner = self.gram[step, step] - 2 * self.gram[step, step - 1] + self.gram[step - 1, step - 1]
            gains.append(max(moved, 1e-12) / math.sqrt(max(float(inner), 1e-24)))
        self.told("probe", len(places), len(places))
        return np.exp(np.interp(np.arange(self.steps), places, np.log(gains)))

    # --- planning and trying ---------------------------------------------------------------------------------------

    def find(self, target: Target) -> Findings:
        """The schedule that meets a target. Raises CalibrationError where none does."""
        return find(self, target)

    def plan(self, refreshes: int) -> Planned:
        """The best plan with so many refreshes, by the objective; nothing runs."""
        if refreshes not in self._plans:
            self._plans[refreshes] = self.planner.plan(refreshes)
        return self._plans[refreshes]

    def best(self, refreshes: int, seed: int | None = None) -> Planned:
        """Of the plans with so many refreshes that trust the linear picture more or less, the one that comes nearest to
        the uncached samples, as tried on some noise (that of the recording, unless given)."""
        others = [self.planner.steadier(s).plan(refreshes) for s in TRIED if s != self.planner.steadiness]
        plans = [self.plan(refreshes), *others, self.planner.drafted(refreshes)]
        return min(plans, key=lambda plan: self.moved(plan, seed))

    def tried(self, plan: Planned, seed: int) -> Tensor:
        """The samples of a generation under a plan; what is known of the uncached one is not computed again."""
        self.trial.follow(plan.bits, plan.rows, self._known.get(seed))
        return self.run(self.trial, seed)

    def timed(self, plan: Planned, uncached: Callable[..., Any]) -> Clock:
        """How long the steps of a generation under a plan take, beside the uncached model's."""
        self.trial.follow(plan.bits, plan.rows)
        return self.trial.timed(uncached, lambda: self.run(self.trial, self.seed))

    def moved(self, plan: Planned, seed: int | None = None) -> float:
        """Mean square error of the final samples under a plan."""
        seed = self.seed if seed is None else seed
        if (plan, seed) not in self._moved:
            self._measure_error(plan, seed)
        return self._moved[plan, seed]

    def errors(self, plan: Planned, target: Psnr | RelativeL1, seed: int) -> Tensor:
        """Error of each sample under a plan, from the uncached samples of the same noise."""
        if (plan, target, seed) not in self._errors:
            self._measure_error(plan, seed, target)
        return self._errors[plan, target, seed]

    def _measure_error(self, plan: Planned, seed: int, target: Psnr | RelativeL1 | None = None) -> None:
        samples, reference = self.tried(plan, seed), self._reference(seed)
        self._moved[plan, seed] = float((samples - reference).square().mean())
        if target is not None:
            self._errors[plan, target, seed] = target.error(samples, reference)

    def _reference(self, seed: int) -> Tensor:
        if seed not in self._references:
            self._recorder.forget()
            self._references[seed] = self.run(self._recorder, seed)
            self._known[seed] = self._recorder.outputs()
        return self._references[seed]

    def schedule(self, plan: Planned) -> CacheSchedule:
        """A plan as a schedule, with what it was made for."""
        return planned(self.regions, self.storage, plan.bits, plan.rows, self.made_for)

    def ideal(self, refreshes: int) -> float:
        """Speed-up by executed FLOPs."""
        full = self.recording.full_flops
        saved = sum(region.flops for region in self.recording.regions)
        return full * self.steps / (full * self.steps - saved * (self.steps - refreshes))

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
