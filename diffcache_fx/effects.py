"""What holding an older value of a region at a step does to the latents that the sampler makes next.

An error inside the model matters as the sampler takes it: past the rest of the model, and with guidance branches
combined. The rest of the model is run at every step on the values of the steps before. What the sampler makes of the
model's outputs is told by a generation whose outputs are replayed with a little noise added, in which nothing of the
model runs: samplers combine the rows of a batch linearly.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .driver import Driver
from .filling import Array
from .plan import Reused
from .probing import holding
from .recognition import Place
from .record import Decision
from .recording import Replay
from .schedule import CacheSchedule
from .state import CacheState
from .step_set import Feed, StepSet

if TYPE_CHECKING:
    from .calibration import Calibration

WIDTH = 256  # of the vectors that stand for latents
# What measuring may take: of a run's steps in full, and of memory for the values of all steps.
MOST_COST, MOST_BYTES = 2.0, 2 << 30
_NOISE = 0.01  # of the outputs, added where they are replayed
_LINEAR = 0.2  # latents that differ by more than this share from what the rows of a batch explain: no such map

# By guidance branch, a tensor of each step.
Steps = dict[str, list[Tensor]]


def effects(measured: Calibration, group: int) -> Array | None:
    """[steps, steps, WIDTH]: e_(t, s) of one selection, for s before t. None where that cannot be told for
    little: the rest of the model is too large a part of it, or its values are."""
    regions, steps, trial = measured.regions_of(group), measured.steps, measured.trial
    rest = 1 - sum(region.flops for region in regions) / measured.recording.full_flops
    known = measured.outputs
    if rest * (steps - 1) / 2 > MOST_COST or sum(region.nbytes for region in regions) * steps > MOST_BYTES or not known:
        return None
    leaf, far = measured.latents, measured.history * (measured.longest + 1)
    table = _Table(known, steps, _maps(measured, known, leaf))
    names = frozenset(region.name for region in regions)
    trial.follow(holding({steps - 1}, steps, group, len(measured.groups)))
    with trial.driven(lambda schedule: _Holding(schedule, steps, names, far, table)):
        measured.run(trial, measured.seed)
    return table.entries


class _Holding(Driver):
    """Computes every step, and beside it what the model would return for each value of the steps before."""

    def __init__(self, schedule: CacheSchedule, num_steps: int, names: frozenset[str], far: int, table: _Table) -> None:
        super().__init__(schedule, num_steps)
        self._names, self._far, self._table = names, far, table
        self._values: dict[str, list[Mapping[str, Sequence[Tensor]]]] = {}

    def _run_specialised(
        self,
        steps: StepSet,
        place: Place,
        allowed: Reused,
        reason: str,
        state: CacheState,
        users: Mapping[int, Tensor],
    ) -> tuple[list[Tensor], Decision]:
        computed = steps.run(frozenset(), state, Feed(users))
        branch, true = place.context.name, computed.users[0].clone()
        if place.new_generation:
            self._values[branch] = []
        past, rows = self._values[branch], self._rows_of(steps)
        for before in range(max(0, len(past) - self._far), len(past)):
            held = self._held(steps, past[before])
            found = steps.run(self._names, held, Feed(users, rows=rows)).users[0]
            self._table.add(branch, len(past), before, found - true)
        past.append({name: [v.clone() for v in values] for name, values in computed.states.items()})
        return computed.users, self._decision(steps, place, frozenset(), reason)

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
        rows = torch.zeros(len(steps.regions), width, device=steps.regions[0].cut[0].device)
        rows[:, 0] = 1.0
        return rows


class _Table:
    """What is known of e_(t, s), as vectors of few numbers: sums, with random signs, of what falls on the same of WIDTH
    places. Rows of all guidance branches lie one below the other."""

    def __init__(self, known: Replay, steps: int, maps: list[Tensor] | None) -> None:
        sizes = {branch: len(outputs[0][0]) for branch, outputs in known.items()}
        ends = np.cumsum(list(sizes.values())).tolist()
        self._rows = {name: slice(end - size, end) for (name, size), end in zip(sizes.items(), ends, strict=True)}
        self._maps = maps or [torch.eye(ends[-1])]
        self._folding: tuple[Tensor, Tensor] | None = None
        self.entries: Array = np.zeros((steps, steps, WIDTH))

    def add(self, branch: str, step: int, before: int, off: Tensor) -> None:
        """What holding does to one branch's outputs at a step."""
        turn = self._maps[min(step, len(self._maps) - 1)][:, self._rows[branch]].float()
        values = turn @ _flat(off)
        if self._folding is None:
            source = torch.Generator().manual_seed(0)
            signs = torch.randint(0, 2, (values.numel(),), generator=source).float() * 2 - 1
            self._folding = torch.randint(0, WIDTH, (values.numel(),), generator=source), signs
        places, signs = self._folding
        found = torch.zeros(WIDTH).index_add_(0, places, values.reshape(-1) * signs)
        self.entries[step, before] += found.numpy()


# --- what the sampler makes of outputs -------------------------------------------------------------------------------


class _Replaying(Driver):
    """Says what it is told to, and notes the latents it is given."""

    def __init__(self, schedule: CacheSchedule, num_steps: int, said: Replay, leaf: int, seen: Steps) -> None:
        super().__init__(schedule, num_steps)
        self._said, self._leaf, self._seen = said, leaf, seen

    def _run_specialised(
        self,
        steps: StepSet,
        place: Place,
        allowed: Reused,
        reason: str,
        state: CacheState,
        users: Mapping[int, Tensor],
    ) -> tuple[list[Tensor], Decision]:
        branch = place.context.name
        seen = self._seen.setdefault(branch, [])
        said = self._said[branch][len(seen)]
        seen.append(users[self._leaf].detach().float().cpu().clone())
        return [output.clone() for output in said], self._decision(steps, place, frozenset(), "replayed")


def _maps(measured: Calibration, known: Replay, leaf: int) -> list[Tensor] | None:
    """Of each step but the last, [rows of latents, rows of outputs]: how the latents of the next step follow from the
    outputs, rows of all guidance branches one below the other. None where they do not follow like this."""
    source = torch.Generator().manual_seed(measured.seed)
    noise: Steps = {
        branch: [torch.randn(o[0].shape, generator=source).to(o[0]) * (_NOISE * o[0].std()) for o in outputs]
        for branch, outputs in known.items()
    }
    noisy = {
        branch: [[o[0] + added, *o[1:]] for o, added in zip(known[branch], noise[branch], strict=True)]
        for branch in known
    }
    latents = [_replayed(measured, said, leaf) for said in (known, noisy)]
    off = [_flat(after - before) for before, after in zip(*latents, strict=True)]
    return linear_maps(off, [_flat(entry)[:, : off[0].shape[1]] for entry in _stacked(noise)])


def _replayed(measured: Calibration, said: Replay, leaf: int) -> list[Tensor]:
    """The latents of each step of a generation in which the model says this."""
    seen: Steps = {}
    with measured.trial.driven(lambda schedule: _Replaying(schedule, measured.steps, said, leaf, seen)):
        measured.run(measured.trial, measured.seed)
    return _stacked(seen)


def linear_maps(off: Sequence[Tensor], added: Sequence[Tensor]) -> list[Tensor] | None:
    """Of each step but the last, the matrix [rows, rows] by which rows of `added` enter the next entry of `off`, beside
    what goes on of the two entries before it and of what was added in the two steps before. off, added: of each step
    [rows, elements]. None where a fifth or more of some step stays unexplained."""
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


__all__ = ["effects", "linear_maps"]
