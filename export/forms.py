"""Forms of an artefact: which step programs it holds, under which names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from diffcache_fx.passes.deduplicate import Deduplicate
from diffcache_fx.passes.drop_state import DropState
from diffcache_fx.passes.guard import group_name

from diffcache_fx.driver import Driver
from diffcache_fx.errors import CacheError, ExportError, RegionError
from diffcache_fx.plan import Plan, ProgramChoice
from diffcache_fx.program import StepProgram
from diffcache_fx.recognition import Arguments, Hints
from diffcache_fx.sizes import Size, Sizes
from diffcache_fx.step_set import DIFFERENCE, PROBE, REBUILD, Feed, Key, Results, StepSet

from .manifest import FORMS, Form, Step

if TYPE_CHECKING:
    from diffcache_fx.compile import Captured
    from diffcache_fx.state import CacheState

REFRESH, REUSE, STEP = "refresh", "reuse", "step"


@dataclass(frozen=True)
class Chosen:
    """The programs of one form, by name. keys: by name, what the driver calls each."""

    form: Form
    num_steps: int | None
    programs: dict[str, StepProgram]
    keys: dict[str, Key]
    choice: ProgramChoice
    groups: dict[str, str]


def check_form(form: str | None) -> None:
    """Raises ExportError for what is no form; None is for the one that fits."""
    if form is not None and form not in FORMS:
        raise ExportError(f"form must be one of {', '.join(FORMS)}, not {form!r}")


def choose(captured: Captured, form: str | None, num_steps: int | None, hoist: bool = False) -> Chosen:
    """The programs of a form. form None: "split" where a guard measures within the step, else "pair". hoist: see
    InsertGuards.

    Raises ExportError where the schedule cannot be had in this form, and ScheduleError where it needs num_steps.
    """
    from diffcache_fx.compile import run_passes  # which imports this package

    measures = any(entry.before for entry in captured.program.measured)
    lagged = captured.options.decide == "lagged"
    if form is None:
        form = "split" if measures and not lagged else "pair"
    check_form(form)
    if form == "pair" and measures and not lagged:
        raise ExportError(
            "this schedule decides by a signal that is measured within the step, which a pair of programs cannot do: "
            "use form='split' or form='branch', or compile with decide='lagged'"
        )
    if form == "branch" and captured.options.dynamic is True:
        raise ExportError(
            "in the branch form only the batch may vary: compile with dynamic='batch', or export form='pair'"
        )
    if form == "split" and not measures:
        raise ExportError("this schedule measures nothing within a step, so there is nothing to split: use form='pair'")
    if num_steps is not None and (not isinstance(num_steps, int) or isinstance(num_steps, bool) or num_steps < 1):
        raise ExportError(f"num_steps must be a whole number from 1, not {num_steps!r}")
    num_steps = num_steps if num_steps is not None else captured.options.num_steps
    if num_steps is None:
        num_steps = captured.schedule.mask_length
    choice = captured.choice(num_steps)
    groups: dict[str, str] = {}
    if form == "branch":
        try:
            found: dict[str, tuple[Key, StepProgram]] = {STEP: (frozenset(), captured.guarded(hoist))}
        except RegionError as error:
            raise ExportError(f"this schedule has no branch form: {error}") from error
        groups = {name: group_name(group) for group in captured.groups() for name in group}
    else:
        make = captured.rest if form == "split" else captured.specialized
        found = {_name(choice, reused): (reused, make(reused)) for reused in choice.programs}
        if form == "split":
            found[PROBE] = (PROBE, captured.probe())
    if captured.schedule.branch is not None:
        found |= {name: (name, captured.extra(name)) for name in (DIFFERENCE, REBUILD)}
    used = frozenset[str]().union(*choice.programs)
    idle = frozenset(region.name for region in captured.program.regions if region.name not in used)
    programs = {}
    for name, (_, program) in found.items():
        unused = idle & {region.name for region in program.regions} if form != "branch" else frozenset()
        last = (DropState(unused), Deduplicate()) if unused else (Deduplicate(),)
        programs[name] = run_passes(program, last)
    keys = {name: key for name, (key, _) in found.items()}
    return Chosen(form, num_steps, programs, keys, choice, groups)  # type: ignore[arg-type]


def _name(choice: ProgramChoice, reused: frozenset[str]) -> str:
    if not reused:
        return REFRESH
    others = [entry for entry in choice.programs if entry]
    return REUSE if len(others) == 1 else f"{REUSE}_{others.index(reused) + 1}"


def plan_table(captured: Captured, chosen: Chosen) -> tuple[Step, ...]:
    """What the driver does at each step of a generation, where all of it is known ahead; else nothing.

    The driver itself is run, around programs that only take notes.
    """
    schedule = captured.schedule
    if chosen.num_steps is None or schedule.adaptive or schedule.needs_timestep:
        return ()
    Plan(schedule, captured.program.regions, chosen.num_steps)
    names = {key: name for name, key in chosen.keys.items()}
    steps = _Notes(captured, chosen)
    driver = Driver(schedule, chosen.num_steps)
    table = []
    for step in range(chosen.num_steps):
        arguments = Arguments(torch.empty(0), None, ())
        place = driver.locate(arguments, (), Hints("plan", step_index=step, num_steps=chosen.num_steps))
        driver.step(steps, place, {})
        key, rows, predicates = steps.ran
        state: CacheState = place.context.payload
        stored = not isinstance(key, str) and chosen.form != "branch"
        store = {r.name: state.histories[r.name].ages[0] for r in steps.regions if stored and r.name not in key}
        table.append(Step(program=names[key], store=store, rows=rows, predicates=predicates))
    return tuple(table)


class _Notes(StepSet):
    """Programs that compute nothing, and note what they were asked."""

    def __init__(self, captured: Captured, chosen: Chosen) -> None:
        super().__init__(captured.program.regions, {}, chosen.choice, captured.weight, _no_weights, chosen.groups)
        self.branching = chosen.form == "branch"
        self.ran: tuple[Any, tuple[tuple[float, ...], ...], dict[str, bool]] = ("", (), {})

    def sizes(self, users: Mapping[int, torch.Tensor]) -> Sizes:
        return _AnySizes({})

    def run(self, key: Key, state: CacheState, feed: Feed) -> Results:
        rows = () if feed.rows is None else tuple(tuple(row) for row in feed.rows.tolist())
        self.ran = key, rows, {name: bool(value) for name, value in feed.predicates.items()}
        if self.branching:
            kept = {r.name: [torch.zeros(1) for value in r.cut for _ in range(value.slots)] for r in self.regions}
            return Results([torch.zeros(1)], kept, {}, {}, {}, {})
        fresh = {r.name: [torch.zeros(2) for _ in r.cut] for r in self.regions if r.name not in key}
        return Results([torch.zeros(1)], fresh, {}, {}, {}, {})


class _AnySizes(Sizes):
    """Where nothing is computed."""

    def of(self, shape: Sequence[Size]) -> tuple[int, ...]:
        return (1,)


def _no_weights(name: str) -> torch.Tensor:
    raise CacheError(f"nothing is computed here, and {name!r} is not needed")
