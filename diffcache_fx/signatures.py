"""The captured call signatures of one model: which program serves a call, when a new one is captured, and when the
model has changed so that all are captured again."""

from __future__ import annotations

import inspect
import logging
import threading
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .calling import autocast_state, is_number, leaf_key, number_tensor, quick_flatten, rank_key
from .compile import Captured, Options, Traced, user_shapes
from .errors import CallError, StaleProgramError
from .parameters import difference, fingerprint
from .passes.reach import latent_input, timestep_input
from .plan import Plan
from .program import InputKind
from .recognition import Arguments
from .schedule import CacheSchedule
from .step_set import StepSet

log = logging.getLogger(__name__)
# Least recently used signatures beyond this many are dropped, with their compiled programs.
KEPT = 8


class FlatCall:
    """One call: its leaves in order, and the key that must agree with a captured signature's."""

    __slots__ = ("args", "autocast", "key", "kwargs", "leaves", "structure")

    def __init__(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.args, self.kwargs = args, kwargs
        self.leaves, self.structure = quick_flatten(args, kwargs)
        kind = next((leaf.device.type for leaf in self.leaves if isinstance(leaf, torch.Tensor)), "cpu")
        self.autocast = autocast_state(kind)
        self.key = (self.structure, tuple([leaf_key(leaf) for leaf in self.leaves]), self.autocast)

    def wants_gradients(self) -> bool:
        return torch.is_grad_enabled() and any(
            isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in self.leaves
        )

    def without_sizes(self) -> tuple[Any, ...]:
        return (self.structure, tuple(rank_key(leaf) for leaf in self.leaves), self.autocast)


class Signature:
    """A captured signature, and where its latents, timestep and conditioning lie among the leaves of a call."""

    def __init__(self, captured: Captured, call: FlatCall, mark: tuple[Any, ...]) -> None:
        self.captured = captured
        self.mark = mark
        self.without_sizes = call.without_sizes()
        program = captured.program
        by_name = {entry.name: int(entry.target) for _, entry in program.inputs_of(InputKind.USER)}
        latents, timestep = latent_input(program), timestep_input(program)
        self.tensors = program.signature.tensor_leaves
        first = next(i for i in self.tensors if i not in program.signature.numbers)
        self.latents = by_name[latents.name] if latents is not None else first
        self.timestep = by_name[timestep.name] if timestep is not None else None
        if self.timestep == self.latents:
            self.timestep = None
        batch = program.signature.siblings(self.latents)  # some models take a list of latents, one for each image
        apart = {*batch, self.latents, self.timestep}
        self.conditioning = tuple(i for i in range(len(program.signature.leaves)) if i not in apart)
        # Numbers that reach a shape or a branch are part of the program: their values must agree.
        self.constants = {i: leaf for i, leaf in enumerate(program.signature.leaves) if is_number(leaf)}
        # So are the values of tensors that decide shapes or branches.
        self.values = {i: leaf for i, leaf in enumerate(program.signature.leaves) if isinstance(leaf, torch.Tensor)}

    def serves(self, call: FlatCall) -> bool:
        """Whether a call with this signature's key also has its constants."""
        return all(call.leaves[i] == value for i, value in self.constants.items()) and all(
            torch.equal(call.leaves[i], value) for i, value in self.values.items()
        )

    def place_key(self, call: FlatCall) -> tuple[Any, ...]:
        """What must stay the same within a generation: the call's key, and values that belong to the program."""
        return (*call.key, id(self)) if self.values else call.key

    def serves_sizes(self, call: FlatCall) -> bool:
        """Whether a call of other sizes fits what was captured with symbolic ones."""
        return (
            self.without_sizes == call.without_sizes()
            and self.serves(call)
            and self.captured.rules.accepts(call.leaves)
        )

    def arguments(self, call: FlatCall) -> Arguments:
        """What recognition looks at."""
        leaves = call.leaves
        return Arguments(
            leaves[self.latents],
            leaves[self.timestep] if self.timestep is not None else None,
            tuple([leaves[i] for i in self.conditioning]),
        )

    def users(self, call: FlatCall) -> dict[int, torch.Tensor]:
        """The program's tensor inputs by leaf. Contiguous: programs are compiled for the strides they were captured
        with, and pipelines vary theirs."""
        leaves = call.leaves
        return {
            i: leaf.contiguous() if isinstance(leaf := leaves[i], torch.Tensor) else number_tensor(leaf)
            for i in self.tensors
        }


class Signatures:
    """All captured signatures of one model under one schedule; safe to use from several threads."""

    def __init__(
        self, module: nn.Module, schedule: CacheSchedule, options: Options, like: Signatures | None = None
    ) -> None:
        """like: of the same model; what was traced for it is not traced again."""
        self.module, self.schedule, self.options, self._like = module, schedule, options, like
        self._followed = schedule  # which may be another of the same structure
        self.compilations = 0
        self.recaptures: list[str] = []
        self._known: OrderedDict[Any, list[Signature]] = OrderedDict()
        self._lock = threading.RLock()

    def find(self, call: FlatCall) -> Signature:
        """The signature that serves a call, captured now if none does."""
        found = self._serving(call)
        if found is not None:
            return found
        with self._lock:
            found = self._serving(call)  # another thread may have captured it meanwhile
            if found is not None:
                return found
            if self.options.dynamic:
                every = [signature for known in self._known.values() for signature in known]
                found = next((signature for signature in every if signature.serves_sizes(call)), None)
            if found is None:
                check_call(self.module, call.args, call.kwargs)
                mark = fingerprint(self.module)
                traced = self._like.traced(call, mark, self.options) if self._like is not None else None
                captured = Captured(self.module, self.schedule, self.options, call.args, call.kwargs, traced)
                captured.exchange(self._followed)
                found = Signature(captured, call, mark)
            alike = self._known.setdefault(call.key, [])
            alike.append(found)
            del alike[:-KEPT]
            self._known.move_to_end(call.key)
            while len(self._known) > KEPT:
                self._known.popitem(last=False)
            return found

    def _serving(self, call: FlatCall) -> Signature | None:
        return next((signature for signature in self._known.get(call.key, ()) if signature.serves(call)), None)

    def traced(self, call: FlatCall, mark: Any, options: Options) -> Traced | None:
        """What tracing a call gave, if the model has been the same since and sizes are to vary alike."""
        found = self._serving(call)
        if found is None or found.mark != mark or self.options.dynamic != options.dynamic:
            return None
        return found.captured.traced

    def current(self, signature: Signature, call: FlatCall) -> Signature:
        """The signature itself if the model is still what was captured, else that of a new capture."""
        mark = fingerprint(self.module)
        if mark == signature.mark:
            if call.key in self._known:
                self._known.move_to_end(call.key)
            return signature
        with self._lock:
            newer = self._serving(call)
            if newer is not None and newer.mark == mark:
                return newer
            what = difference(signature.mark, mark)
            log.info("the model changed (%s): capturing it again", what)
            self.recaptures.append(what)
            check_devices(self.module, weights_needed=True)
            self._known.clear()
            return self.find(call)

    def steps(self, signature: Signature, num_steps: int | None) -> StepSet:
        """The compiled programs of a signature for a run of so many steps."""
        found = signature.captured.compiled(num_steps)
        if found is None:
            with self._lock:
                before = signature.captured.programs_compiled
                found = signature.captured.steps(num_steps)
                self.compilations += signature.captured.programs_compiled - before
        return found

    def check(self, schedule: CacheSchedule) -> None:
        """Raises ScheduleError or CalibrationError where a schedule does not fit the model, the run or its calls."""
        steps, made_for = self.options.num_steps, schedule.made_for
        if made_for is not None:
            made_for.check_model(self.module)
            if steps is not None:
                made_for.check_steps(steps)
        for signature in self.every():
            program = signature.captured.program
            if made_for is not None:
                made_for.check_shapes(user_shapes(program))
            if steps is not None or not schedule.needs_num_steps():
                Plan(schedule, program.regions, steps)

    def every(self) -> list[Signature]:
        """All signatures that are known."""
        return [signature for known in self._known.values() for signature in known]

    def exchange(self, schedule: CacheSchedule) -> None:
        """Let all signatures follow another schedule, which needs the same programs."""
        with self._lock:
            self._followed = schedule
            for signature in self.every():
                signature.captured.exchange(schedule)

    def latest(self) -> Signature | None:
        """The signature captured or used last."""
        for known in reversed(self._known.values()):
            return known[-1]
        return None


def check_call(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Raise CallError if the model's forward does not take these arguments."""
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise CallError(f"{type(model).__name__} cannot be called like this: {error}. It takes {signature}") from error


def check_devices(model: nn.Module, weights_needed: bool = False) -> None:
    """Raise where the weights lie on several devices, or some of them (weights_needed: any) on the meta device."""
    places: dict[torch.device, str] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        places.setdefault(tensor.device, name)
    where = ", ".join(f"{name} on {device}" for device, name in list(places.items())[:3])
    if any(device.type == "meta" for device in places) and (len(places) > 1 or weights_needed):
        raise StaleProgramError(
            f"weights are on the meta device ({where}): they are offloaded. Load them all, on one device, first"
        )
    if len(places) > 1:
        raise CallError(f"the model lies on several devices ({where}): move it to one with .to(device) first")
