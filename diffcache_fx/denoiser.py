"""`CachedDenoiser`: the model's own calls, answered by compiled step programs and a cache."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from .compile import Captured, Options
from .driver import Driver
from .errors import CacheError, CallError, StaleProgramError
from .generations import Generations
from .parameters import difference, fingerprint
from .report import Explanation, Stats, explain, summarize
from .schedule import CacheSchedule
from .signatures import FlatCall, Signature, Signatures, check_devices

_NOTHING = "nothing is captured yet: pass example_inputs=(args, kwargs) to compile_with_cache, or call once"


class CachedDenoiser(Generations, nn.Module):
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
        like: CachedDenoiser | None = None,
    ) -> None:
        """like: another one of the same model, whose traces this one takes over."""
        super().__init__()
        if not isinstance(model, nn.Module):
            raise CallError(f"compile_with_cache takes the denoiser, an nn.Module, not {type(model).__name__}")
        if isinstance(model, CachedDenoiser):
            raise CallError("this denoiser is cached already: compile the original, `cached.model`, again")
        check_devices(model)
        self.training = False
        self._modules["model"] = model
        # In one dictionary: every other attribute is the model's.
        object.__setattr__(
            self,
            "_own",
            {
                "schedule": schedule,
                "options": options,
                "signatures": Signatures(model, schedule, options, like._signatures if like is not None else None),
                "local": threading.local(),
            },
        )
        if example_inputs is not None:
            if not (
                isinstance(example_inputs, (tuple, list))
                and len(example_inputs) == 2
                and isinstance(example_inputs[0], (tuple, list))
                and isinstance(example_inputs[1], Mapping)
            ):
                raise CallError("example_inputs must be (args, kwargs) of one call, for example ((x, t), {})")
            self._signatures.find(FlatCall(tuple(example_inputs[0]), example_inputs[1]))

    # --- calling ---------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """One step: the model's own arguments in, the model's own output out."""
        call = FlatCall(args, kwargs)
        if call.wants_gradients():
            raise CallError(
                "an input requires gradients, and a cached step has none (parts of it come from earlier steps): call "
                "under torch.no_grad(), or train the original model, `cached.model`"
            )
        signatures, driver = self._signatures, self._driver
        signature = signatures.find(call)
        place = driver.locate(signature.arguments(call), signature.place_key(call), self._hints)
        if place.new_generation or driver.bound is None:
            signature = signatures.current(signature, call)
        steps = signatures.steps(signature, place.context.num_steps or driver.recognizer.num_steps)
        if place.new_generation or driver.bound is not steps:
            steps.bind()
            driver.bound = steps
        users = signature.users(call)
        with torch.no_grad():
            if call.autocast[0]:
                kind = next(iter(users.values())).device.type
                with torch.autocast(kind, enabled=False):  # the captured graph holds autocast's casts already
                    outputs = driver.step(steps, place, users)
            else:
                outputs = driver.step(steps, place, users)
        return signature.captured.program.signature.unflatten(outputs)

    @property
    def _signatures(self) -> Signatures:
        return self._own["signatures"]

    def _local(self) -> threading.local:
        return self._own["local"]

    def _make_driver(self) -> Driver:
        options: Options = self._own["options"]
        return Driver(self._own["schedule"], options.num_steps, options.refinement, lagged=options.decide == "lagged")

    # --- asking ----------------------------------------------------------------------------------------------------

    def stats(self) -> Stats:
        """Statistics of this thread's generation under way, or of the one that just ended."""
        signatures = self._signatures
        return Stats.of(self._driver.record, signatures.compilations, tuple(signatures.recaptures))

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
        signature = self._signatures.latest()
        if signature is None:
            raise CacheError(_NOTHING)
        self._signatures.steps(signature, self._own["options"].num_steps)

    def current_signature(self) -> Signature:
        """The signature captured or used last, for exporters. Raises CacheError if there is none, and StaleProgramError
        if the model has changed since."""
        signature = self._signatures.latest()
        if signature is None:
            raise CacheError(_NOTHING)
        what = difference(signature.mark, fingerprint(self.model))
        if what:
            raise StaleProgramError(f"the model changed since it was captured ({what}): call once, then export")
        return signature

    def _captured(self, required: bool = True) -> Captured | None:
        signature = self._signatures.latest()
        if signature is None and required:
            raise CacheError(_NOTHING)
        return signature.captured if signature is not None else None

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
        return CachedDenoiser(copy.deepcopy(self.model, memo), self._own["schedule"], self._own["options"])

    def extra_repr(self) -> str:
        return f"schedule={self._own['schedule'].name!r}, backend={self._own['options'].backend!r}"
