"""Recording a sampling run: the uncached model as one instrumented program, and what it tells of every region and step.

No hooks: the program is the full step with measurements added (`passes.measure`), compiled like any other. What is kept
is bounded: scalars, sketches and the outputs of the model, never the values inside beyond the last few steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from diffcache_fx.passes.measure import QUANTITY, MeasureChanges

from .call import Call
from .compile import Captured, Options
from .denoiser import CachedDenoiser
from .driver import Driver
from .errors import CalibrationError
from .forecasts import Binomial
from .guards import Always
from .record import Decision
from .references import BlocksOutput, Latents, ModelOutput, ModulatedInput, Reference
from .schedule import CacheSchedule, Rule
from .selection import Selection
from .step_set import Feed

LAGS = 3
# A prime: elements at equal distances, such as one channel of all tokens, do not fall on the same sums.
WIDTH = 251
QUANTITIES: tuple[tuple[str, Reference], ...] = (
    ("modulated_input", ModulatedInput()),
    ("first_block", BlocksOutput(1)),
    ("latents", Latents()),
    ("output", ModelOutput()),
)


# By guidance branch and step, the tensors that the model returned.
Replay = Mapping[str, Sequence[Sequence[Tensor]]]


@dataclass(frozen=True)
class RegionRecord:
    """What one region did, step by step, mean over runs.

    change [steps, lags]: mean |F_t - F_{t-j}|, j from 1; infinite where there was no such step. size [steps]: mean
    |F_t|. growth [steps]: mean over the last axis of |F_t| / |F_{t-1}|; 1 at the first step. gram [steps, steps]: inner
    products of F at any two steps, over all samples, estimated from sketches; relative to nothing. rule: of the
    schedule. flops: what a step without it saves. nbytes: of one stored copy.
    """

    name: str
    rule: int
    flops: float
    nbytes: int
    change: Tensor
    size: Tensor
    growth: Tensor
    gram: Tensor

    def relative(self, lag: int = 1) -> Tensor:
        """Relative L1 change to the value `lag` steps before, [steps]; infinite where there was none."""
        return self.change[:, lag - 1] / self.size


@dataclass(frozen=True)
class Recording:
    """A sampling run as recorded. quantities: by name, (change, size) [steps] of what guards watch, where the model has
    it. runs: how many sequences of steps were averaged (generations times guidance branches). timesteps: of the first
    run, [steps], where they could be read."""

    steps: int
    full_flops: float
    regions: tuple[RegionRecord, ...]
    quantities: Mapping[str, tuple[Tensor, Tensor]]
    runs: int
    timesteps: tuple[float | None, ...]

    def region(self, name: str) -> RegionRecord:
        return next(region for region in self.regions if region.name == name)


@dataclass
class _Run:
    """One sequence of steps. signals: by step, by target. lags: by step and region, the slot of each lag. outputs: by
    step, what the model returned."""

    name: str
    outputs: list[list[Tensor]] = field(default_factory=list)
    signals: list[dict[str, Tensor]] = field(default_factory=list)
    lags: list[dict[str, tuple[int, ...]]] = field(default_factory=list)
    timesteps: list[float | None] = field(default_factory=list)


class _RecordingDriver(Driver):
    """Runs the instrumented program at every step and keeps what it tells."""

    def __init__(self, schedule: CacheSchedule, num_steps: int | None, runs: list[_Run]) -> None:
        super().__init__(schedule, num_steps)
        self.runs = runs
        self._open: dict[str, _Run] = {}
        self._kept: dict[str, dict[str, Tensor]] = {}

    def _run_specialised(self, call: Call) -> tuple[list[Tensor], Decision]:
        steps, place, state, name = call.steps, call.place, call.state, call.branch
        sizes = steps.sizes(call.users)
        if place.new_generation or name not in self._open:
            self._open[name] = _Run(name)
            self.runs.append(self._open[name])
            self._kept[name] = dict(steps.memory(frozenset(), sizes))
        run = self._open[name]
        for region in steps.regions:
            state.zeros(region.name, sizes)
        run.lags.append({region: tuple(history.ages) for region, history in state.histories.items()})
        results = steps.run(frozenset(), state, Feed(call.users, kept=self._kept[name]))
        self._kept[name] = dict(results.memory)
        run.signals.append(results.signals)
        run.timesteps.append(place.timestep)
        run.outputs.append([output.clone() for output in results.users])
        for region_name, values in results.states.items():
            state.histories[region_name].refresh(values, float(place.position))
        return results.users, call.decision()


class RecordingDenoiser(CachedDenoiser):
    """The model itself, uncached, which records what the regions of `rules` do. Takes the model's calls, in any
    sampler or pipeline; `recording()` tells the result."""

    def __init__(
        self,
        model: nn.Module,
        rules: Sequence[tuple[Selection, str]],
        *,
        backend: Any = "inductor",
        num_steps: int | None = None,
        lags: int = LAGS,
        width: int = WIDTH,
        **backend_options: Any,
    ) -> None:
        """rules: (regions, storage) as in `Rule`. lags: how many past steps a value is compared with, 1 to 5. width: of
        the sketches."""
        schedule = CacheSchedule(
            "record", tuple(Rule(regions, Always(), Binomial(lags), storage) for regions, storage in rules)
        )
        measure = MeasureChanges(width, QUANTITIES)
        options = Options(
            backend,
            num_steps,
            backend_options=backend_options,
            measure=measure,
        )
        super().__init__(model, schedule, options)
        self._own["runs"] = []

    def _make_driver(self) -> Driver:
        options: Options = self._own["options"]
        return _RecordingDriver(self._own["schedule"], options.num_steps, self._own["runs"])

    def forget(self) -> None:
        """Drop what was recorded."""
        self._own["runs"].clear()

    def outputs(self) -> Replay:
        """What the model returned, of each guidance branch that ran once."""
        names = [run.name for run in self._own["runs"]]
        return {run.name: tuple(run.outputs) for run in self._own["runs"] if names.count(run.name) == 1}

    def recording(self) -> Recording:
        """What was recorded so far. Raises CalibrationError where nothing was, or runs differ in length."""
        runs: list[_Run] = self._own["runs"]
        lengths = sorted({len(run.signals) for run in runs})
        if not runs:
            raise CalibrationError("nothing was recorded: the sampler has not called the denoiser it was given")
        if len(lengths) > 1:
            raise CalibrationError(
                f"the recorded runs differ in length ({', '.join(map(str, lengths))} steps): record generations of one "
                "number of steps, each guidance branch in its cache_context"
            )
        captured = self._captured()
        assert captured is not None
        return _summed(captured, runs, lengths[0])


def _summed(captured: Captured, runs: Sequence[_Run], steps: int) -> Recording:
    regions = []
    for region in captured.program.regions:
        targets = [f"{region.name}/{i}" for i, value in enumerate(region.cut) if value.dtype.is_floating_point]
        tables = [_table(runs, region.name, target, steps) for target in targets]
        weights = [float(table[1].mean()) for table in tables]
        largest = max(range(len(tables)), key=weights.__getitem__)
        change, size, growth, _ = tables[largest]
        regions.append(
            RegionRecord(
                name=region.name,
                rule=region.rule,
                flops=captured.weight[region.name],
                nbytes=sum(value.nbytes for value in region.cut),
                change=change,
                size=size,
                growth=growth,
                gram=torch.stack([table[3] for table in tables]).sum(0),
            )
        )
    names = {target.split("/")[1] for target in runs[0].signals[0] if target.startswith(f"{QUANTITY}/")}
    quantities = {
        name: tuple(_mean(runs, f"{QUANTITY}/{name}/{kind}") for kind in ("change", "size")) for name in sorted(names)
    }
    return Recording(
        steps,
        float(captured.full_flops),
        tuple(regions),
        quantities,  # type: ignore[arg-type]
        len(runs),
        tuple(runs[0].timesteps),
    )


def _mean(runs: Sequence[_Run], target: str) -> Tensor:
    """A signal, mean over runs, [steps, ...] float64."""
    return torch.stack([torch.stack([step[target] for step in run.signals]) for run in runs]).double().cpu().mean(0)


def _table(runs: Sequence[_Run], region: str, target: str, steps: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """change [steps, lags], size [steps], growth [steps] and gram [steps, steps] of one cut value."""
    change, growth = (_mean(runs, f"{target}/{kind}") for kind in ("change", "growth"))
    by_lag, grown = torch.full_like(change, torch.inf), torch.ones(steps, dtype=torch.float64)
    for step, slots in enumerate(entry[region] for entry in runs[0].lags):
        for lag, slot in enumerate(slots):
            by_lag[step, lag] = change[step, slot]
        if slots:
            grown[step] = growth[step, slots[0]]
    sketches = [torch.stack([step[f"{target}/sketch"] for step in run.signals]).double().cpu() for run in runs]
    gram = sum((torch.einsum("sbw,tbw->st", s, s) for s in sketches), start=torch.zeros(steps, steps).double())
    return by_lag, _mean(runs, f"{target}/size"), grown, gram


__all__ = ["LAGS", "WIDTH", "Recording", "RecordingDenoiser", "RegionRecord", "Replay"]
