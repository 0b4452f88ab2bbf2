"""The demo models' shipped files, which lie beside this one."""

from __future__ import annotations

import json
from importlib import resources
from typing import Any

import diffusers
from safetensors.torch import load_file
from torch import Tensor


def read_tensors(name: str) -> dict[str, Tensor]:
    """The tensors of one shipped safetensors file, by name, in the dtype they are stored in."""
    with resources.as_file(resources.files("diffcache_fx.demo") / name) as path:
        return load_file(path)


def read_description(name: str) -> dict[str, Any]:
    """The contents of a shipped JSON file: the model's and the scheduler's class and arguments, and the training."""
    text = (resources.files("diffcache_fx.demo") / name).read_text(encoding="utf-8")
    return json.loads(text)


def build(config: dict[str, Any]) -> tuple[type, dict[str, Any]]:
    """The diffusers class that a config names under ``_class_name``, and the arguments for it."""
    name = config["_class_name"]
    found = getattr(diffusers, name, None)
    if not isinstance(found, type):
        raise ValueError(f"the installed diffusers {diffusers.__version__} has no class {name!r}")
    return found, {key: value for key, value in config.items() if not key.startswith("_")}
