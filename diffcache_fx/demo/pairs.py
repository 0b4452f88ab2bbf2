"""The second demo: pairs of digits by prompt, a U-Net with cross-attention, trained with flow matching."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .classifier import DigitClassifier
from .demo import Demo
from .digits import REFERENCE, load_classifier
from .files import build, read_description, read_tensors
from .prompts import PromptEncoder, tokens_of

DESCRIPTION = "pairs.json"
WEIGHTS = "pairs.safetensors"
CLASSES = 100
# Each digit once on either side.
SHOWN = (12, 25, 37, 40, 51, 64, 76, 83, 98, 9)


def prompt_of(label: int) -> str:
    """`3 7` for 37; the empty prompt for 100."""
    return "" if label == CLASSES else f"{label // 10} {label % 10}"


class Reader:
    """Reads pairs [N, 1, 32, 64] with a classifier of single digits."""

    def __init__(self, classifier: DigitClassifier) -> None:
        self.classifier = classifier

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The pair seen in each image [N] int64, from 0 to 99, and the features of both halves [N, 128]."""
        halves = [self.classifier.predict(half.contiguous()) for half in images.chunk(2, dim=3)]
        (left, first), (right, second) = halves
        return 10 * left + right, torch.cat((first, second), dim=1)


def load_parts(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, PromptEncoder]:
    """The denoiser in ``dtype`` and the prompt encoder in float32, in eval mode, their parameters without gradient."""
    model_class, arguments = build(read_description(DESCRIPTION)["model"])
    parts: tuple[nn.Module, PromptEncoder] = model_class(**arguments), PromptEncoder()
    tensors = read_tensors(WEIGHTS)
    for part, prefix in zip(parts, ("denoiser.", "prompts."), strict=True):
        own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        part.load_state_dict(own, strict=True)
        part.eval().requires_grad_(False)
    return nn.Module.to(parts[0], dtype), parts[1].float()


def load_pairs(dtype: torch.dtype = torch.float32) -> Demo:
    """Everything of the demo; ``dtype`` is the denoiser's. The model is called as ``model(images, timestep=,
    encoder_hidden_states=)`` with timesteps [N] float32 and hidden states [N, 4, 64]. A real pair is two of the real
    test digits, taken at random."""
    description = read_description(DESCRIPTION)
    scheduler_class, scheduler_config = build(description["scheduler"])
    model, encoder = load_parts(dtype)
    classifier = load_classifier()
    reference = read_tensors(REFERENCE)
    features, labels = reference["features"].float(), reference["labels"].long()
    left, right = (torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))

    def condition(wanted: Tensor) -> dict[str, Tensor]:
        tokens = tokens_of([prompt_of(label) for label in wanted.tolist()])
        with torch.no_grad():
            return {"encoder_hidden_states": encoder(tokens).to(dtype)}

    channels, height, width = description["image_shape"]
    return Demo(
        name="digit-pairs",
        model=model,
        scheduler_class=scheduler_class,
        scheduler_config=scheduler_config,
        condition=condition,
        read=Reader(classifier),
        classifier=classifier,
        reference_features=torch.cat((features[left], features[right]), dim=1),
        reference_labels=10 * labels[left] + labels[right],
        guidance_scale=float(description["guidance_scale"]),
        num_classes=CLASSES,
        null_class=CLASSES,
        shown=SHOWN,
        image_shape=(channels, height, width),
        training=description["training"],
    )
