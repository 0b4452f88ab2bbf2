"""The demo's denoiser, its sampler, and what is needed to score its samples, read from the files beside this one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from diffcache_fx.demo.classifier import DigitClassifier

DESCRIPTION = "digits.json"
WEIGHTS = "digits.safetensors"
CLASSIFIER = "digit_classifier.safetensors"
REFERENCE = "digit_reference.safetensors"


@dataclass(frozen=True)
class Demo:
    """A trained class-conditional denoiser of handwritten digits.

    Attributes:
        model: the denoiser in eval mode, on the CPU; called as ``model(hidden_states, timestep=, class_labels=)`` with
            images [N, 1, 32, 32] in [-1, 1], timesteps [N] int64 in [0, 1000) and classes [N] int64 in [0, 10].
        scheduler_class: the diffusers scheduler the model was trained for.
        scheduler_config: that scheduler's arguments.
        classifier: reads the digit in an image, float32, in eval mode.
        reference_features: the classifier's features of 10,000 real test digits, [10000, 64] float32.
        reference_labels: the classes of those digits, [10000] int64.
        guidance_scale: the default scale of classifier-free guidance; 1 means none.
        num_classes: how many classes there are.
        null_class: the class that means "no class", the unconditional side of the guidance.
        image_shape: channels, height, width.
        training: how the weights came about.
    """

    model: nn.Module
    scheduler_class: type
    scheduler_config: dict[str, Any]
    classifier: DigitClassifier
    reference_features: Tensor
    reference_labels: Tensor
    guidance_scale: float
    num_classes: int
    null_class: int
    image_shape: tuple[int, int, int]
    training: dict[str, Any]

    def scheduler(self) -> Any:
        """A fresh scheduler; each one keeps the state of one generation only."""
        return self.scheduler_class(**self.scheduler_config)


def read_tensors(name: str) -> dict[str, Tensor]:
    """The tensors of one shipped safetensors file, by name, in the dtype they are stored in."""
    with resources.as_file(resources.files("diffcache_fx.demo") / name) as path:
        return load_file(path)


def read_description() -> dict[str, Any]:
    """The contents of ``digits.json``: the model's and the scheduler's class and arguments, and the training facts."""
    text = (resources.files("diffcache_fx.demo") / DESCRIPTION).read_text(encoding="utf-8")
    return json.loads(text)


def build(config: dict[str, Any]) -> tuple[type, dict[str, Any]]:
    """The diffusers class that a config names under ``_class_name``, and the arguments for it."""
    name = config["_class_name"]
    found = getattr(diffusers, name, None)
    if not isinstance(found, type):
        raise ValueError(f"the installed diffusers {diffusers.__version__} has no class {name!r}")
    return found, {key: value for key, value in config.items() if not key.startswith("_")}


def load_classifier() -> DigitClassifier:
    """The classifier in eval mode, float32, on the CPU, its parameters without gradient."""
    classifier = DigitClassifier()
    classifier.load_state_dict(read_tensors(CLASSIFIER), strict=True)
    return classifier.eval().requires_grad_(False)


def load_model(dtype: torch.dtype = torch.float32, weights: Path | None = None) -> nn.Module:
    """The denoiser in eval mode, in ``dtype``, on the CPU, its parameters without gradient.

    ``weights`` names another safetensors file with the same tensors in place of the shipped one.
    """
    model_class, arguments = build(read_description()["model"])
    model: nn.Module = model_class(**arguments)
    model.load_state_dict(read_tensors(WEIGHTS) if weights is None else load_file(weights), strict=True)
    return nn.Module.to(model, dtype).eval().requires_grad_(False)  # every parameter, without diffusers' exceptions


def load_digits(dtype: torch.dtype = torch.float32) -> Demo:
    """Everything of the demo; ``dtype`` is the denoiser's, the classifier and the features stay float32."""
    description = read_description()
    scheduler_class, scheduler_config = build(description["scheduler"])
    reference = read_tensors(REFERENCE)
    channels, height, width = description["image_shape"]
    return Demo(
        model=load_model(dtype),
        scheduler_class=scheduler_class,
        scheduler_config=scheduler_config,
        classifier=load_classifier(),
        reference_features=reference["features"].float(),
        reference_labels=reference["labels"].long(),
        guidance_scale=float(description["guidance_scale"]),
        num_classes=int(description["num_classes"]),
        null_class=int(description["null_class"]),
        image_shape=(channels, height, width),
        training=description["training"],
    )
