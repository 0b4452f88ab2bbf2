"""`CachedDenoiser`: the model's own calls, answered by compiled step programs and a cache."""

from __future__ import annotations

import inspect
import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from .calling import autocast_state, is_number, leaf_key, number_tensor, quick_flatten, rank_key
from .compile import Captured, Options
from .driver import Driver, StepSet
from .errors import CacheError, CallError, StaleProgramError
from .parameters import difference, fingerprint
from .passes.reach import latent_input, timestep_input
from .program import InputKind
from .recognition import Arguments, Hints
from .report import Explanation, Stats, explain, summarize
from .schedule import CacheSchedule

log = logging.getLogger(__name__)
_KEPT_SIGNATURES = 8


class _Entry:
    """A captured signature together with where its latents, timestep and conditioning lie among the leaves."""

    def __init__(self, captured: Captured, mark: tuple[Any, ...]) -> None:
        self.captured = captured
        self.mark = mark
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
        self.rest = tuple(
            i for i in range(len(program.signature.leaves)) if i not in batch and i not in (self.latents, self.timestep)
        )
        self.numbers = {
            i: leaf for i, leaf in enumerate(program.signature.leaves) if is_number(leaf)
        }  # numbers that stayed constants


class CachedDenoiser(nn.Module):
    """A drop-in for the denoiser it wraps; made by `compile_with_cache`.

    It has the model's call signature and outputs, and hands every other attribute through (`config`, `dtype`, ...).
    Each thread has cache state of its own. Calls run without gradients.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: CacheSchedule,
        options: Options,
        example_inputs: tuple[tuple[Any, ...], Mapping[str, Any]] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise CallError(f"compile_with_cache takes the denoiser, an nn.Module, not {type(model).__name__}")
        if isinstance(model, CachedDenoiser):
            raise CallError("this denoiser is cached already: compile the original, `cached.model`, again")
        _check_devices(model)
        self.training = False
        object.__setattr__(self, "_own", {})
        self._modules["model"] = model
        own = self._own
        own["schedule"], own["options"] = schedule, options
        own["entries"] = OrderedDict()
        own["lock"] = threading.RLock()
        own["local"] = threading.local()
        own["compilations"] = 0
        own["recaptures"] = []
        if example_inputs is not None:
            args, kwargs = example_inputs
            self._entry(*_flatten(model, args, kwargs), args, kwargs)

    # --- calling ---------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """One step: the model's own arguments in, the model's own output out."""
        model = self._modules["model"]
        assert model is not None
        leaves, key = _flatten(model, args, kwargs)
        if torch.is_grad_enabled() and any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in leaves):
            raise CallError(
                "an input requires gradients, and a cached step has none (parts of it come from earlier steps): call "
                "under torch.no_grad(), or train the original model, `cached.model`"
            )
        driver = self._driver
        entry = self._entry(leaves, key, args, kwargs)
        arguments = Arguments(
            leaves[entry.latents],
            leaves[entry.timestep] if entry.timestep is not None else None,
            tuple(leaves[i] for i in entry.rest),
        )
        local = self._own["local"]
        hints = local.hints[-1] if getattr(local, "hints", None) else None
        place = driver.locate(arguments, key, hints)
        if place.new_generation or driver.bound is None:
            entry = self._current(entry, leaves, key, args, kwargs)
        total = place.context.num_steps or driver.recognizer.num_steps
        steps = self._steps(entry, total)
        if place.new_generation or driver.bound is not steps:
            steps.bind()
            driver.bound = steps
        users = {
            # Contiguous: programs are compiled for the strides they were captured with, and pipelines vary theirs.
            i: leaf.contiguous() if isinstance(leaf := leaves[i], torch.Tensor) else number_tensor(leaf)
            for i in entry.tensors
        }
        kind = arguments.latents.device.type
        with torch.no_grad():
            if autocast_state(kind)[0]:
                with torch.autocast(kind, enabled=False):  # the captured graph holds autocast's casts already
                    outputs = driver.step(steps, place, users)
            else:
                outputs = driver.step(steps, place, users)
        return entry.captured.program.signature.unflatten(outputs)

    def _steps(self, entry: _Entry, total: int | None) -> StepSet:
        sets = entry.captured._sets
        found = sets.get(total)
        if found is None:
            with self._own["lock"]:
                before = len(entry.captured._lowered)
                found = entry.captured.steps(total)
                self._own["compilations"] += len(entry.captured._lowered) - before
        return found

    def _entry(self, leaves: list[Any], key: tuple[Any, ...], args: Any, kwargs: Any) -> _Entry:
        entries: OrderedDict[Any, list[_Entry]] = self._own["entries"]
        for entry in entries.get(key, ()):
            if all(leaves[i] == value for i, value in entry.numbers.items()):
                return entry
        with self._own["lock"]:
            if self._own["options"].dynamic:
                for known in list(entries.values()):
                    for entry in known:
                        if _rank(leaves, entry, key) and entry.captured.rules.accepts(leaves):
                            entries.setdefault(key, []).append(entry)
                            return entry
            entry = self._capture(args, kwargs)
            entries.setdefault(key, []).append(entry)
            entry_key = (key, tuple(rank_key(leaf) for leaf in leaves))
            entry.captured.ranks = entry_key  # type: ignore[attr-defined]
            while len(entries) > _KEPT_SIGNATURES:
                entries.popitem(last=False)
            return entry

    def _capture(self, args: Any, kwargs: Any) -> _Entry:
        model = self._modules["model"]
        assert model is not None
        _check_call(model, args, kwargs)
        captured = Captured(model, self._own["schedule"], self._own["options"], args, kwargs)
        return _Entry(captured, fingerprint(model))

    def _current(self, entry: _Entry, leaves: list[Any], key: tuple[Any, ...], args: Any, kwargs: Any) -> _Entry:
        """The entry itself if the model is still what was captured, else a new one."""
        model = self._modules["model"]
        assert model is not None
        mark = fingerprint(model)
        if mark == entry.mark:
            return entry
        with self._own["lock"]:
            what = difference(entry.mark, mark)
            log.info("the model changed (%s): capturing it again", what)
            self._own["recaptures"].append(what)
            _check_devices(model)
            self._own["entries"].clear()
            return self._entry(leaves, key, args, kwargs)

    # --- generations and contexts ----------------------------------------------------------------------------------

    @property
    def _driver(self) -> Driver:
        local = self._own["local"]
        found = getattr(local, "driver", None)
        if found is None:
            options: Options = self._own["options"]
            found = local.driver = Driver(self._own["schedule"], options.num_steps, options.refinement)
        return found

    def reset(self) -> None:
        """End the generation: the next call starts from an empty cache. Statistics stay readable until then."""
        self._driver.reset()

    def _reset_stateful_cache(self, *args: Any, **kwargs: Any) -> None:
        """Called by diffusers pipelines at the end of each run."""
        self.reset()

    @contextmanager
    def cache_context(self, name: str, **hints: Any) -> Iterator[None]:
        """Name the guidance branch of the calls inside ("cond", "uncond", ...), as diffusers pipelines do.

        Hints that are used: step_index (0 starts a generation), num_inference_steps, timestep, refinement (the sampler
        calls more than once at one timestep). Others are accepted and ignored.
        """
        if not isinstance(name, str) or not name or name.startswith("#"):
            raise CallError(f"a cache context needs a name that does not begin with '#', not {name!r}")
        local = self._own["local"]
        if not hasattr(local, "hints"):
            local.hints = []
        local.hints.append(
            Hints(
                name,
                step_index=hints.get("step_index"),
                num_steps=hints.get("num_inference_steps"),
                timestep=hints.get("timestep"),
                refinement=bool(hints.get("refinement", False)),
            )
        )
        model = self._modules["model"]
        try:
            yield
        finally:
            local.hints.pop()
            del model

    # --- asking ----------------------------------------------------------------------------------------------------

    def stats(self) -> Stats:
        """Statistics of this thread's generation under way, or of the one that just ended."""
        return Stats.of(self._driver.record, self._own["compilations"], tuple(self._own["recaptures"]))

    def summary(self) -> str:
        """In words: what was refreshed and reused in the last generation, and why."""
        return summarize(self.stats(), self._own["schedule"], self._captured(required=False))

    def explain(self) -> Explanation:
        """Regions, cuts, bytes, FLOPs and programs, before anything runs or compiles. Needs a captured signature: pass
        example_inputs to compile_with_cache, or call once."""
        captured = self._captured()
        assert captured is not None
        return explain(captured)

    def program(self) -> str:
        """The guarded step program as readable code."""
        captured = self._captured()
        assert captured is not None
        return captured.guarded().code()

    def prepare(self) -> None:
        """Compile now rather than at the first call. Needs example_inputs."""
        captured = self._captured()
        assert captured is not None
        before = len(captured._lowered)
        captured.steps(self._own["options"].num_steps)
        self._own["compilations"] += len(captured._lowered) - before

    def _captured(self, required: bool = True) -> Captured | None:
        entries = [entry for known in self._own["entries"].values() for entry in known]
        if entries:
            return entries[-1].captured
        if required:
            raise CacheError(
                "nothing is captured yet: pass example_inputs=(args, kwargs) to compile_with_cache, or call once"
            )
        return None

    # --- being the model -------------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        if name == "_own":
            raise AttributeError(name)
        model = self.__dict__["_modules"].get("model")
        if name == "model":
            return model
        return getattr(model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        model = self.__dict__.get("_modules", {}).get("model")
        if model is None or name == "training" or name.startswith(("_hf_", "_old_")) or name in vars(self):
            object.__setattr__(self, name, value)
        elif name in ("forward", "model") or isinstance(value, (nn.Module, nn.Parameter)):
            raise CallError(f"cannot set {name!r} on a cached denoiser: set it on the original, `cached.model`")
        else:
            setattr(model, name, value)

    def train(self, mode: bool = True) -> CachedDenoiser:
        if mode:
            raise CallError("a cached denoiser is for inference: train the original model, `cached.model`")
        self._modules["model"].train(False)  # type: ignore[union-attr]
        return self

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self._modules["model"].state_dict(*args, **kwargs)  # type: ignore[union-attr]

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self._modules["model"].load_state_dict(*args, **kwargs)  # type: ignore[union-attr]

    def __deepcopy__(self, memo: dict[int, Any]) -> CachedDenoiser:
        import copy

        return CachedDenoiser(copy.deepcopy(self.model, memo), self._own["schedule"], self._own["options"])

    def extra_repr(self) -> str:
        return f"schedule={self._own['schedule'].name!r}, backend={self._own['options'].backend!r}"


def _flatten(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[list[Any], tuple[Any, ...]]:
    """The leaves of a call and the key of the program that serves it."""
    leaves, structure = quick_flatten(args, kwargs)
    kind = next((leaf.device.type for leaf in leaves if isinstance(leaf, torch.Tensor)), "cpu")
    return leaves, (structure, tuple([leaf_key(leaf) for leaf in leaves]), autocast_state(kind))


def _rank(leaves: list[Any], entry: _Entry, key: tuple[Any, ...]) -> bool:
    (structure, _, autocast), ranks = entry.captured.ranks  # type: ignore[attr-defined]
    same_numbers = all(leaves[i] == value for i, value in entry.numbers.items())
    return bool(
        structure == key[0]
        and autocast == key[2]
        and ranks == tuple(rank_key(leaf) for leaf in leaves)
        and same_numbers
    )


def _check_call(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise CallError(f"{type(model).__name__} cannot be called like this: {error}. It takes {signature}") from error


def _check_devices(model: nn.Module) -> None:
    places: dict[torch.device, str] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        places.setdefault(tensor.device, name)
    if len(places) > 1:
        where = ", ".join(f"{name} on {device}" for device, name in list(places.items())[:3])
        if any(device.type == "meta" for device in places):
            raise StaleProgramError(
                f"some weights are on the meta device ({where}): they are offloaded. Load them all before compiling"
            )
        raise CallError(f"the model lies on several devices ({where}): move it to one with .to(device) first")
    if any(device.type == "meta" for device in places) and not any(
        isinstance(tensor, FakeTensor) for tensor in model.parameters()
    ):
        log.info("the model's weights are on the meta device: it can be explained, not run")
