"""The compiler, as one readable page: from a module, an example call and a schedule to a set of compiled step programs.

capture -> normalize -> select regions -> compute cuts -> correct reuse -> add signals -> specialize (-> split) | insert
guards -> verify -> lower
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from torch import nn

from .calling import ShapeRules
from .capture import Dynamic, capture
from .errors import CacheError, RegionError, ScheduleError
from .export import eager, torch_compile
from .export.backends import check_backend
from .export.lowered import Lowered
from .guards import Mask
from .limits import Limits
from .parameters import Parameters
from .passes.branches import difference_program, rebuild_program
from .passes.correct import CorrectReuse
from .passes.cut import ComputeCut, RuleStorage
from .passes.decide import Control
from .passes.deduplicate import Deduplicate
from .passes.flops import StepFlops
from .passes.guard import InsertGuards, group_name
from .passes.normalize import Normalize
from .passes.regions import SelectRegions
from .passes.signals import AddSignals, kept_bytes
from .passes.specialize import Specialize
from .passes.split import Probe, RestOfStep, live_names
from .passes.verify import Verify
from .plan import Plan, ProgramChoice, Reused, choose_programs, variants
from .program import InputKind, StepProgram, size_hint
from .schedule import CacheSchedule
from .schedules import resolve
from .step_set import DIFFERENCE, PROBE, REBUILD, StepSet

log = logging.getLogger(__name__)
Decide = Literal["host", "graph", "lagged"]
Traced = tuple[StepProgram, ShapeRules]
DECIDE = ("host", "graph", "lagged")


@dataclass(frozen=True)
class Options:
    """How to compile: everything but the model and the schedule."""

    backend: str | Callable[..., Any] = "inductor"
    num_steps: int | None = None
    dynamic: Dynamic = False
    decide: Decide = "host"
    max_programs: int | None = 4
    refinement: bool = False
    backend_options: Mapping[str, Any] = field(default_factory=dict)
    measure: Callable[[StepProgram], StepProgram] | None = None  # a pass for the program that refreshes all
    compare: bool = False  # programs that reuse tell how what they reuse relates to what is computed

    def __post_init__(self) -> None:
        if self.decide not in DECIDE:
            raise CacheError(f"decide must be 'host', 'graph' or 'lagged', not {self.decide!r}")
        if not isinstance(self.dynamic, bool) and self.dynamic != "batch":
            raise CacheError(f"dynamic must be True, False or 'batch', not {self.dynamic!r}")
        if self.dynamic is True and self.decide == "graph":
            raise CacheError(
                "dynamic=True needs decide='host': in a program with conditionals only the batch may vary; "
                "dynamic='batch' goes with decide='graph'"
            )
        for name in ("num_steps", "max_programs"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise CacheError(f"{name} must be a whole number from 1, or None, not {value!r}")


def front_end(
    schedule: CacheSchedule, most_slots: int | None = None
) -> tuple[Callable[[StepProgram], StepProgram], ...]:
    """The passes from a captured program to one with regions and cuts, in order. most_slots: past refreshes kept."""
    slots = [min(rule.forecast.slots, most_slots or rule.forecast.slots) for rule in schedule.rules]
    storage = tuple(RuleStorage(rule.storage, n) for rule, n in zip(schedule.rules, slots, strict=True))
    return (
        Normalize(),  # drop what computes nothing
        SelectRegions(tuple(rule.regions for rule in schedule.rules)),  # which nodes are refreshed or reused together
        ComputeCut(storage),  # what is kept of them
        CorrectReuse(schedule.corrections),  # what reused values are scaled and shifted by
        AddSignals(tuple(schedule.adaptive.items())),  # what adaptive guards measure
    )


def run_passes(program: StepProgram, passes: Iterable[Callable[[StepProgram], StepProgram]]) -> StepProgram:
    """Apply passes in order; with DIFFCACHE_FX_VERIFY set, check the intermediate form after each."""
    checking = os.environ.get("DIFFCACHE_FX_VERIFY", "") not in ("", "0")
    for step in passes:
        program = step(program)
        log.debug("%s: %d nodes", type(step).__name__, len(program.graph.nodes))
        if checking:
            Verify(after=type(step).__name__)(program)
    return program


def _within_memory(captured: StepProgram, schedule: CacheSchedule) -> StepProgram:
    """The program with regions and cuts; forecasts look back less far where the schedule caps the cache."""
    cap = schedule.memory_cap
    for slots in range(schedule.slots, 0, -1):
        program = run_passes(captured, front_end(schedule, slots))
        needed = sum(region.nbytes for region in program.regions) + kept_bytes(program)
        if cap is None or needed <= cap:
            if slots < schedule.slots:
                log.warning(
                    "memory_cap: %d of %d past refreshes are kept, so forecasts are of lower order",
                    slots,
                    schedule.slots,
                )
            return program
    raise ScheduleError(
        f"the cache needs at least {needed} bytes for one guidance branch and memory_cap is {cap}: cache fewer regions "
        "(Trunk instead of Sublayers, say), or raise the cap"
    )


def lower(program: StepProgram, options: Options, parameters: Parameters) -> Lowered:
    """One program through the backend the user chose."""
    if options.backend == "eager":
        return eager.lower(run_passes(program, (Deduplicate(),)))
    if options.backend == "onnxruntime":
        from .export import ort_backend

        return ort_backend.lower(run_passes(program, (Deduplicate(),)), **options.backend_options)
    if options.backend == "torch_tensorrt":
        from .export import torch_tensorrt

        return torch_tensorrt.lower(run_passes(program, (Deduplicate(),)), parameters, **options.backend_options)
    return torch_compile.lower(program, options.backend, **options.backend_options)


def user_shapes(program: StepProgram) -> list[tuple[int, ...]]:
    """The sizes of the caller's tensors in the call that was captured."""
    nodes = program.graph.find_nodes(op="placeholder")
    return [tuple(size_hint(size) for size in nodes[i].meta["val"].shape) for i, _ in program.inputs_of(InputKind.USER)]


class Captured:
    """One call signature of one model under one schedule: the program with its regions, and what was compiled of it."""

    def __init__(
        self,
        module: nn.Module,
        schedule: CacheSchedule,
        options: Options,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        traced: Traced | None = None,
    ) -> None:
        """traced: what tracing this call gave before, where the model is still the same."""
        if options.dynamic is True and schedule.adaptive:
            raise CacheError(
                "dynamic=True does not go with an adaptive guard: there only the batch may vary, with dynamic='batch'"
            )
        self.traced = captured, rules = traced or capture(module, args, kwargs, dynamic=options.dynamic)
        if schedule.made_for is not None:
            schedule.made_for.check_shapes(user_shapes(captured))
        self.module, self.schedule, self.options = module, schedule, options
        self.rules = rules
        self.program = _within_memory(captured, schedule)
        if not self.program.regions:
            raise RegionError("the schedule selects nothing that depends on the inputs of a step")
        if options.num_steps is not None or not schedule.needs_num_steps():
            # A plan that does not fit is refused before anything compiles.
            Plan(schedule, self.program.regions, options.num_steps)
        self._flops = StepFlops(self.program)
        self.full_flops = self.flops(frozenset())
        names = [region.name for region in self.program.regions]
        self.weight = {name: float(self.full_flops - self.flops(frozenset({name}))) for name in names}
        self._lowered: dict[Reused | str, Lowered] = {}
        self._sets: dict[int | None, StepSet] = {}

    def flops(self, reused: Reused) -> int:
        """FLOPs of a step that takes these regions from the cache."""
        return self._flops(reused)

    @property
    def programs_compiled(self) -> int:
        return len(self._lowered)

    def exchange(self, schedule: CacheSchedule) -> None:
        """Follow another schedule, which needs the same programs (see `exchange`); those that are compiled stay."""
        self.schedule = schedule
        self._sets.clear()

    def compiled(self, num_steps: int | None) -> StepSet | None:
        """The compiled programs for a run of so many steps, if they are there already."""
        return self._sets.get(num_steps)

    def specialized(self, reused: Reused) -> StepProgram:
        return run_passes(self.program, (Specialize(reused, self.options.compare),))

    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Regions that are refreshed together: those of one rule, unless its mask has a bit for each region."""
        found: list[tuple[str, ...]] = []
        for index, rule in enumerate(self.schedule.rules):
            names = tuple(region.name for region in self.program.regions if region.rule == index)
            apart = isinstance(rule.guard, Mask) and len(rule.guard.bits[0]) > 1
            found += [(name,) for name in names] if apart else [names] if names else []
        return tuple(found)

    def guarded(self, hoist: bool = False) -> StepProgram:
        """The program with the conditionals inside. hoist: what both ways compute alike stands outside of them."""
        return run_passes(self.program, (InsertGuards(self.groups(), self._control(), hoist),))

    def _control(self) -> Control | None:
        """How the graph decides by itself, under an adaptive guard."""
        schedule = self.schedule
        for index, guard in schedule.adaptive.items():
            rule = schedule.rules[index]
            slots = max(value.slots for region in self.program.regions for value in region.cut)
            limits = Limits(schedule.longest_reuse, schedule.most_reuses)
            return Control(index, guard, limits, rule.forecast, slots)
        return None

    @property
    def split(self) -> bool:
        """Whether a step is split at the decision: the host decides by a signal that a first part of it measures."""
        return self.options.decide == "host" and any(entry.before for entry in self.program.measured)

    def probe(self) -> StepProgram:
        """What runs before the decision."""
        live = live_names(self.rest(frozenset()))
        return run_passes(self.program, (Probe(live),))

    def rest(self, reused: Reused) -> StepProgram:
        """What runs after the decision."""
        return run_passes(self.program, (Specialize(reused), RestOfStep()))

    def choice(self, num_steps: int | None) -> ProgramChoice:
        """The specialised programs that a run of so many steps needs."""
        rows = variants(
            Plan(self.schedule, self.program.regions, num_steps).rows(), self.schedule, self.program.regions
        )
        return choose_programs(rows, self.weight, float(self.full_flops), self.options.max_programs)

    def steps(self, num_steps: int | None) -> StepSet:
        """The compiled programs for a run of so many steps (None: unknown); compiled on the first request."""
        if num_steps not in self._sets:
            choice = self.choice(num_steps)
            groups = {}
            extra = {}
            if self.split:
                extra[PROBE] = self._lower(PROBE)
            if self.schedule.branch is not None:
                extra |= {name: self._lower(name) for name in (DIFFERENCE, REBUILD)}
            if self.options.decide == "graph":
                lowered: dict[Reused, Lowered] = {frozenset(): self._lower("guarded")}
                groups = {name: group_name(group) for group in self.groups() for name in group}
            else:
                lowered = {reused: self._lower(reused) for reused in choice.programs}
            self._sets[num_steps] = StepSet(
                self.program.regions,
                lowered,
                choice,
                self.weight,
                Parameters(self.module),
                groups,
                extra,
                self.program.measured,
            )
        return self._sets[num_steps]

    def _lower(self, which: Reused | str) -> Lowered:
        if which not in self._lowered:
            self._lowered[which] = lower(self._program(which), self.options, Parameters(self.module))
        return self._lowered[which]

    def _program(self, which: Reused | str) -> StepProgram:
        """A program to compile, by the regions it reuses or by name."""
        if not isinstance(which, str):
            found = self.rest(which) if self.split else self.specialized(which)
            return found if self.options.measure is None or which else run_passes(found, (self.options.measure,))
        if which in (REBUILD, DIFFERENCE):
            return self.extra(which)
        return self.guarded() if which == "guarded" else self.probe()

    def extra(self, name: str) -> StepProgram:
        """What works on the outputs of two guidance branches: DIFFERENCE or REBUILD."""
        if name == REBUILD:
            return rebuild_program(self.program)
        assert self.schedule.branch is not None
        return difference_program(self.program, self.schedule.branch.radius)


def compile_with_cache(
    model: nn.Module,
    schedule: CacheSchedule | str | Path | None = None,
    *,
    backend: str | Callable[..., Any] = "inductor",
    example_inputs: tuple[tuple[Any, ...], Mapping[str, Any]] | None = None,
    num_steps: int | None = None,
    dynamic: Dynamic = False,
    decide: Decide = "host",
    max_programs: int | None = 4,
    refinement: bool = False,
    **backend_options: Any,
) -> Any:
    """Wrap a denoiser so that it computes at each step only what the schedule asks for.

    model: any `nn.Module` called once per step, in evaluation mode, on one device.
    schedule: a CacheSchedule, the name of a factory in `schedules`, the path of a saved schedule, or None for
        `schedules.default()` (every second step after three, continued in a straight line).
    backend: "inductor", "eager", "onnxruntime", "torch_tensorrt" (whose engines keep the weights they were built with),
        the name of another torch.compile backend, or such a backend itself.
    example_inputs: (args, kwargs) of one call; without it the first call is the example.
    num_steps: calls per generation (and guidance branch), where known: lets plans count from the end.
    dynamic: keep batch and spatial sizes symbolic where the model allows it; "batch": that of the batch only, which the
        branch form of an export needs.
    decide: "host" runs one straight program per decision; under an adaptive guard a probe program first, with a read of
        its signal per step, and a second read where the guard also measures the output. "graph" runs one program with
        the decision and the conditionals inside. "lagged" lets the signal of a step decide the step after, so that
        every step is one straight program and nothing is waited for.
    max_programs: most specialised programs to compile; plans with more distinct steps refresh more. None: no bound.
    refinement: the sampler may call the model more than once at one timestep; each of the last eight timesteps then
        has cache state of its own (memory_cap counts one of them), and on a GPU the timestep is read at every step.
    backend_options: passed to the backend (Inductor config entries, `outlining=False`; for ONNX Runtime `providers` and
        `session_options`).

    Returns a CachedDenoiser. Raises ScheduleError, RegionError, CaptureError or CallError, each in one clear sentence.
    """
    from .denoiser import CachedDenoiser

    check_backend(backend, backend_options)
    options = Options(backend, num_steps, dynamic, decide, max_programs, refinement, backend_options)
    wanted = resolve(schedule)
    if wanted.made_for is not None and isinstance(model, nn.Module):
        wanted.made_for.check_model(model)
        if num_steps is not None:
            wanted.made_for.check_steps(num_steps)
    return CachedDenoiser(model, wanted, options, example_inputs)


__all__ = ["Captured", "Options", "compile_with_cache", "front_end", "lower", "run_passes"]
