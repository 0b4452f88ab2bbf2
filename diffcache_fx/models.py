"""The MODEL argument: `digits`, `digit-pairs`, a diffusers folder or hub id, or `package.module:factory`."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .demo.demo import Demo
from .demo.digits import load_digits
from .demo.pairs import load_pairs
from .errors import CacheError

Call = tuple[tuple[Any, ...], dict[str, Any]]
FORMS = "`digits`, `digit-pairs`, a diffusers folder or hub id, or `package.module:factory`"
_INDEX = "model_index.json"
PARTS = ("transformer", "unet", "prior", "decoder")
DEMOS: dict[str, Callable[..., Demo]] = {"digits": load_digits, "digit-pairs": load_pairs}


@dataclass(frozen=True)
class Target:
    """A model to work on.

    inputs: the call of one step, by the step's number; None where nothing can be inferred. varies: whether the calls of
    different steps differ. demo: everything else of the shipped demo, for `digits` and `digit-pairs`.
    """

    name: str
    module: nn.Module
    inputs: Callable[[int], Call] | None
    varies: bool = False
    demo: Demo | None = None

    def example(self) -> Call:
        """The call of step 0. Raises CacheError, saying what to pass instead, where it cannot be inferred."""
        if self.inputs is None:
            raise CacheError(
                f"{self.name} gives {type(self.module).__name__}, but not what it is called with (text widths, image "
                "sizes and extra arguments are the pipeline's): pass MODEL as `package.module:factory`, a function "
                "that returns (module, args, kwargs) for one call"
            )
        return self.inputs(0)


def load_target(text: str) -> Target:
    """Find the model a command line names. Raises CacheError with one sentence if there is none."""
    if text in DEMOS:
        demo = load_demo(text)
        return Target(text, demo.model, demo.example, True, demo)
    folder = Path(text)
    if folder.is_dir():
        return Target(text, _from_folder(folder), None)
    name, colon, factory = text.partition(":")
    if colon:
        return _from_factory(text, name, factory)
    if text.count("/") == 1 and not folder.is_absolute() and not text.startswith("."):
        return Target(text, _from_hub(text), None)
    raise CacheError(f"there is no model {text!r}: give {FORMS}")


def load_demo(name: str, dtype: torch.dtype = torch.float32) -> Demo:
    """One of the shipped demos. Raises CacheError for another name."""
    if name not in DEMOS:
        raise CacheError(f"no demo is called {name!r}: there are {', '.join(DEMOS)}")
    return DEMOS[name](dtype)


def _from_factory(text: str, module_name: str, factory_name: str) -> Target:
    if not all(part.isidentifier() for part in (*module_name.split("."), factory_name)):
        raise CacheError(f"{text!r} is no `package.module:factory`")
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)  # as `python -m` does
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise CacheError(f"cannot import {module_name!r} of MODEL {text!r}: {error}") from error
    factory = getattr(module, factory_name, None)
    if not callable(factory):
        raise CacheError(f"the module {module_name!r} has no function {factory_name!r}")
    try:
        made = factory()
    except Exception as error:
        raise CacheError(
            f"{text} failed when it was called without arguments ({type(error).__name__}: {error}): it must return "
            "(module, args, kwargs) for one call"
        ) from error
    match made:
        case (nn.Module() as model, Mapping() | tuple() | list() as args, Mapping() as kwargs) if not isinstance(
            args, Mapping
        ):
            call = (tuple(args), dict(kwargs))
            return Target(text, model, lambda step: call)
        case (nn.Module() as model, inputs) if callable(inputs):
            return Target(text, model, lambda step: _checked(text, inputs(step)), True)
        case _:
            raise CacheError(
                f"{text} must return (module, args, kwargs) with the arguments of one call, or (module, inputs) where "
                f"inputs(step) gives (args, kwargs); it returned {_shape_of(made)}"
            )


def _checked(text: str, made: Any) -> Call:
    match made:
        case (tuple() | list() as args, Mapping() as kwargs):
            return tuple(args), dict(kwargs)
    raise CacheError(f"inputs(step) of {text} must return (args, kwargs), not {_shape_of(made)}")


def _shape_of(made: Any) -> str:
    if isinstance(made, tuple):
        return "(" + ", ".join(type(entry).__name__ for entry in made) + ")"
    return type(made).__name__


def _from_folder(folder: Path) -> nn.Module:
    """The denoiser in a diffusers pipeline folder, or the model in a diffusers model folder."""
    index = folder / _INDEX
    if index.is_file():
        return _load(str(folder), _denoiser_part(str(folder), index.read_text(encoding="utf-8")))
    if (folder / "config.json").is_file():
        return _load(str(folder), None)
    raise CacheError(f"the folder {folder} holds neither {_INDEX} (a pipeline) nor config.json (a model)")


def _from_hub(name: str) -> nn.Module:
    """The same from the hub: the index first, then only the denoiser's own files."""
    from diffusers import DiffusionPipeline

    try:
        index = DiffusionPipeline.load_config(name)
    except Exception:
        return _load(name, None)
    return _load(name, _denoiser_part(name, json.dumps(dict(index))))


def _denoiser_part(where: str, index: str) -> str:
    parts = [key for key, value in json.loads(index).items() if isinstance(value, list) and value[0]]
    found = next((part for part in PARTS if part in parts), None)
    if found is None:
        raise CacheError(f"the pipeline {where} has no denoiser under {', '.join(PARTS)}; it holds {', '.join(parts)}")
    return found


def _load(where: str, part: str | None) -> nn.Module:
    from diffusers import AutoModel

    try:
        options = {} if part is None else {"subfolder": part}
        return AutoModel.from_pretrained(where, **options).eval().requires_grad_(False)
    except Exception as error:
        said = str(error).strip().splitlines()
        raise CacheError(
            f"cannot load {where}{'' if part is None else f' ({part})'} as a diffusers model: "
            f"{said[0] if said else type(error).__name__}"
        ) from error
