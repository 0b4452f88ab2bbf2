"""What holding an older value of a region at a step does to the latents that the sampler makes next.

An error inside the model matters as the sampler takes it: past the rest of the model, and with guidance branches
combined. The rest of the model is run at every step on the values of the steps before. What the sampler makes of the
model's outputs is told by two generations in which they are replayed and nothing of the model runs, once as they are
and once with a little noise: samplers combine the rows of a batch linearly.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .call import Call
from .driver import Driver
from .filling import Array
from .probing import holding
from .record import Decision
from .recording import Replay
from .schedule import CacheSchedule
from .state import CacheState
from .step_set import Feed, StepSet
from .trial import ReplayingDriver

if TYPE_CHECKING:
    from .calibration import Calibration

log = logging.getLogger(__name__)
WIDTH = 256  # of the vectors that stand for latents
# What measuring may take: time in uncached generations, and memory for the values of all steps.
MOST_COST, MOST_BYTES = 4.0, 2 << 30
_NOISE = 0.01  # of the outputs, added where they are replayed
_LINEAR = 0.2  # latents that differ by more than this share from what the rows of a batch explain: no such map

# By guidance branch, a tensor of each step.
Steps = dict[str, list[Tensor]]


def effects(measured: Calibration, group: int) -> Array | None:
    """[steps, steps, WIDTH]: e_(t, s) of one selection, for s before t, as far back as forecasts can see. None, and a
    line in the log, where that cannot be told for little: the rest of the model is too large a part of it, or its
    values are; the sampler makes several generations, whose calls cannot be told apart; the model returns several
    tensors, or numbers that are not finite."""
    regions, steps, trial = measured.regions_of(group), measured.steps, measured.trial
    rest = 1 - sum(region.flops for region in regions) / measured.recording.full_flops
    known, far = measured.outputs, measured.history * (measured.longest + 1)
    cost = rest * sum(min(step, far) for step in range(steps)) / steps
    kept = sum(region.nbytes for region in regions) * min(steps, far + 1) * measured.recording.runs
    why = {
        "the sampler makes several generations": len(known) != measured.recording.runs,
        "the model returns several tensors": any(len(outputs[0]) > 1 for outputs in known.values()),
        f"the rest of the model would run for the time of {cost:.1f} generations": cost > MOST_COST,
        f"values of all steps take {kept} bytes": kept > MOST_BYTES,
    }
    for reason, holds in why.items():
        if holds:
            log.info("errors are taken as they are inside the model: %s", reason)
            return None
    names = frozenset(region.name for region in regions)
    table = _Table(known, steps, measured.maps())
    trial.follow(holding({steps - 1}, steps, group, len(measured.groups)))
    with trial.driven(lambda schedule: _Holding(schedule, steps, names, far, table)):
        measured.run(trial, measured.seed)
    if not np.isfinite(table.entries).all():
        log.info("errors are taken as they are inside the model: held values lead to numbers that are not finite")
        return None
    return table.entries


class _Holding(Driver):
    """Computes every step, and beside it what the model would return for each value of the steps before."""

    def __init__(self, schedule: CacheSchedule, num_steps: int, names: frozenset[str], far: int, table: _Table) -> None:
        super().__init__(schedule, num_steps)
        self._names, self._far, self._table = names, far, table
        self._values: dict[str, list[Mapping[str, Sequence[Tensor]]]] = {}

    def _run_specialised(self, call: Call) -> tuple[list[Tensor], Decision]:
        steps, users, branch = call.steps, call.users, call.branch
        computed = steps.run(frozenset(), call.state, Feed(users))
        outputs = [output.clone() for output in computed.users]
        values = {name: [value.clone() for value in found] for name, found in computed.states.items()}
        if call.place.new_generation:
            self._values[branch] = []
        past, rows = self._values[branch], self._rows_of(steps)
        for before in range(max(0, len(past) - self._far), len(past)):
            held = self._held(steps, past[before])
            found = steps.run(self._names, held, Feed(users, rows=rows)).users[0]
            self._table.add(branch, len(past), before, found - outputs[0])
        if len(past) >= self._far:
            past[len(past) - self._far] = {}  # no longer seen
        past.append(values)
        return outputs, call.decision()

    def _held(self, steps: StepSet, values: Mapping[str, Sequence[Tensor]]) -> CacheState:
        """A cache that holds these values as the newest ones."""
        state = CacheState(steps.regions)
        for name in self._names:
            for slots, value in zip(state.histories[name].slots, values[name], strict=True):
                slots[:] = [value] + [torch.zeros_like(value)] * (len(slots) - 1)
        return state

    @staticmethod
    def _rows_of(steps: StepSet) -> Tensor | None:
        width = max((value.slots for region in steps.regions for value in region.cut), default=1)
        if width == 1:
            return None
        device = steps.regions[0].cut[0].device
        rows = torch.zeros(len(steps.regions), width, dtype=torch.float32, device=device)
        rows[:, 0] = 1.0
        return rows


class _Table:
    """What is known of e_(t, s), as vectors of few numbers: sums, with random signs, of what falls on the same of WIDTH
    places. Rows of all guidance branches lie one below the other."""

    def __init__(self, known: Replay, steps: int, maps: Maps | None) -> None:
        sizes = {branch: len(outputs[0][0]) for branch, outputs in known.items()}
        ends = np.cumsum(list(sizes.values())).tolist()
        self._rows = {name: slice(end - size, end) for (name, size), end in zip(sizes.items(), ends, strict=True)}
        self._maps = maps or Maps([torch.eye(ends[-1])])
        self._folding: tuple[Tensor, Tensor] | None = None
        self.entries: Array = np.zeros((steps, steps, WIDTH))

    def add(self, branch: str, step: int, before: int, off: Tensor) -> None:
        """What holding does to one branch's outputs at a step."""
        turn = self._maps.each[min(step, len(self._maps.each) - 1)][:, self._rows[branch]].float()
        values = turn @ _flat(off)[:, : self._maps.elements]
        if self._folding is None:
            source = torch.Generator().manual_seed(0)
            signs = torch.randint(0, 2, (values.numel(),), generator=source, device="cpu").float() * 2 - 1
            self._folding = torch.randint(0, WIDTH, (values.numel(),), generator=source, device="cpu"), signs
        places, signs = self._folding
        found = torch.zeros(WIDTH, dtype=torch.float32, device="cpu").index_add_(0, places, values.reshape(-1) * signs)
        self.entries[step, before] += found.numpy()


# --- what the sampler makes of outputs -------------------------------------------------------------------------------


class _Noting(ReplayingDriver):
    """Says what it is told to, and notes the latents it is given."""

    def __init__(self, schedule: CacheSchedule, num_steps: int, said: Replay, leaf: int, seen: Steps) -> None:
        super().__init__(schedule, num_steps, said, num_steps)
        self._leaf, self._seen = leaf, seen

    def _run_specialised(self, call: Call) -> tuple[list[Tensor], Decision]:
        self._seen.setdefault(call.branch, []).append(call.users[self._leaf].detach().float().cpu().clone())
        return super()._run_specialised(call)


@dataclass(frozen=True)
class Maps:
    """each: of each step but the last, [rows of latents, rows of outputs], how the latents of the next step follow from
    the outputs, rows of all guidance branches one below the other. elements: of a row of outputs, those that count (the
    first ones; None: all)."""

    each: list[Tensor]
    elements: int | None = None


def sampler_maps(measured: Calibration) -> Maps | None:
    """From two generations that are replayed, one of them with noise. None, and a line in the log, where the latents do
    not follow like this."""
    known, leaf = measured.outputs, measured.latents
    source = torch.Generator().manual_seed(measured.seed)
    noise: Steps = {branch: [] for branch in known}
    noisy: dict[str, list[list[Tensor]]] = {branch: [] for branch in known}
    for branch, outputs in known.items():
        for first, *others in outputs:
            # As much as can be told from rounding, and no more, since samplers may clip.
            share = _NOISE if first.dtype in (torch.float32, torch.float64) else 1.0
            drawn = torch.randn(first.shape, generator=source, device="cpu") * (share * float(first.float().std()))
            said = first + drawn.to(first)
            noise[branch].append(said.float() - first.float())
            noisy[branch].append([said, *others])
    before, after = (_replayed(measured, said, leaf) for said in (known, noisy))
    off = [_flat(b) - _flat(a) for a, b in zip(before, after, strict=True)]
    added = [_flat(entry) for entry in _stacked(noise)]
    elements = min(off[0].shape[1], added[0].shape[1])
    found = linear_maps([entry[:, :elements] for entry in off], [entry[:, :elements] for entry in added])
    if found is None:
        log.info("guidance branches are not combined: the latents do not follow linearly from the model's outputs")
        return None
    return Maps(found, elements)


def _replayed(measured: Calibration, said: Replay, leaf: int) -> list[Tensor]:
    """The latents of each step of a generation in which the model says this."""
    seen: Steps = {}
    with measured.trial.driven(lambda schedule: _Noting(schedule, measured.steps, said, leaf, seen)):
        measured.run(measured.trial, measured.seed)
    return _stacked(seen)


def linear_maps(off: Sequence[Tensor], added: Sequence[Tensor]) -> list[Tensor] | None:
    """Of each step but the last, the matrix [rows, rows] by which rows of `added` enter the next entry of `off`, beside
    what goes on of the two entries before it and of what was added in the two steps before. off, added: of each step
    [rows, elements]. None where more than a fifth of some step stays unexplained."""
    elements = added[0].shape[1]
    if off[0].shape[1] != elements or elements < 2 * (len(added[0]) + 4):
        return None
    found: list[Tensor] = []
    entered: list[Tensor] = []  # what each step's rows made
    for step in range(len(off) - 1):
        basis, turn = torch.linalg.qr(added[step].double().T)
        target = off[step + 1].double()
        before = torch.stack([entry.double() for entry in (*off[max(step - 1, 0) : step + 1], *entered[-2:])], 1)
        left, left_before = (entry - (entry @ basis) @ basis.T for entry in (target, before))
        goes_on = torch.linalg.lstsq(left_before.swapaxes(1, 2), left.unsqueeze(2), driver="gelsd").solution
        rest = target - (goes_on.swapaxes(1, 2) @ before)[:, 0]
        made = torch.linalg.solve_triangular(turn, (rest @ basis).T, upper=True).T
        unexplained = (rest - made @ added[step].double()).norm(dim=1)
        if bool((unexplained > _LINEAR * target.norm(dim=1)).any()):
            return None
        found.append(made)
        entered.append(made @ added[step].double())
    return found


def _stacked(steps: Steps) -> list[Tensor]:
    """Of each step, the rows of all guidance branches."""
    return [torch.cat([entry.detach().float().cpu() for entry in step]) for step in zip(*steps.values(), strict=True)]


def _flat(entry: Tensor) -> Tensor:
    return entry.detach().float().cpu().flatten(1)


__all__ = ["Maps", "effects", "linear_maps", "sampler_maps"]
