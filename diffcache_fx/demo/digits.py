"""The first demo: single digits by class, a diffusion transformer."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from .classifier import DigitClassifier
from .demo import Demo
from .files import build, read_description, read_tensors
from .sampling import by_class

DESCRIPTION = "digits.json"
WEIGHTS = "digits.safetensors"
CLASSIFIER = "digit_classifier.safetensors"
REFERENCE = "digit_reference.safetensors"


def load_classifier() -> DigitClassifier:
    """The classifier in eval mode, float32, on the CPU, its parameters without gradient."""
    classifier = DigitClassifier()
    classifier.load_state_dict(read_tensors(CLASSIFIER), strict=True)
    return classifier.eval().requires_grad_(False)


def load_model(dtype: torch.dtype = torch.float32, weights: Path | None = None) -> nn.Module:
    """The denoiser in eval mode, in ``dtype``, on the CPU, its parameters without gradient.

    ``weights`` names another safetensors file with the same tensors in place of the shipped one.
    """
    model_class, arguments = build(read_description(DESCRIPTION)["model"])
    model: nn.Module = model_class(**arguments)
    model.load_state_dict(read_tensors(WEIGHTS) if weights is None else load_file(weights), strict=True)
    return nn.Module.to(model, dtype).eval().requires_grad_(False)  # every parameter, without diffusers' exceptions


def load_digits(dtype: torch.dtype = torch.float32) -> Demo:
    """Everything of the demo; ``dtype`` is the denoiser's, the classifier and the features stay float32. The model is
    called as ``model(images, timestep=, class_labels=)`` with timesteps and classes [N] int64."""
    description = read_description(DESCRIPTION)
    scheduler_class, scheduler_config = build(description["scheduler"])
    reference = read_tensors(REFERENCE)
    channels, height, width = description["image_shape"]
    classifier = load_classifier()
    classes = int(description["num_classes"])
    return Demo(
        name="digits",
        model=load_model(dtype),
        scheduler_class=scheduler_class,
        scheduler_config=scheduler_config,
        condition=by_class,
        read=classifier.predict,
        classifier=classifier,
        reference_features=reference["features"].float(),
        reference_labels=reference["labels"].long(),
        guidance_scale=float(description["guidance_scale"]),
        num_classes=classes,
        null_class=int(description["null_class"]),
        shown=tuple(range(classes)),
        image_shape=(channels, height, width),
        training=description["training"],
    )
