"""What a calibrated schedule was made for, and whether a run is that."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .errors import CalibrationError
from .version import __version__

# Elements of each weight that its hash looks at.
_SAMPLED = 64
_AGAIN = "calibrate for this one, or take a schedule that was not calibrated"


@dataclass(frozen=True)
class Provenance:
    """model: class name. weights: a hash of names, shapes and sampled values, the same in any precision. steps: of a
    generation. timesteps: of each step, empty where they could not be read. shapes: of the call's tensors. sampler: in
    the caller's words. version: of this library.
    """

    model: str
    weights: str
    steps: int
    timesteps: tuple[float, ...] = ()
    shapes: tuple[tuple[int, ...], ...] = ()
    sampler: str = ""
    version: str = ""

    @classmethod
    def of(
        cls,
        model: nn.Module,
        timesteps: Sequence[float | None],
        shapes: Sequence[tuple[int, ...]],
        sampler: str = "",
    ) -> Provenance:
        """Of a run of this model. timesteps: one for each step, None where it could not be read."""
        known = tuple(float(t) for t in timesteps if t is not None)
        return cls(
            model=type(model).__name__,
            weights=hash_of_weights(model),
            steps=len(timesteps),
            timesteps=known if len(known) == len(timesteps) else (),
            shapes=tuple(shapes),
            sampler=sampler,
            version=__version__,
        )

    def check_model(self, model: nn.Module) -> None:
        """Raises CalibrationError where the model is another."""
        name = type(model).__name__
        if name != self.model:
            raise CalibrationError(f"this schedule was calibrated for a {self.model} and this is a {name}: {_AGAIN}")
        if hash_of_weights(model) != self.weights:
            raise CalibrationError(
                f"this schedule was calibrated for a {self.model} with other weights (or another size): {_AGAIN}"
            )

    def check_shapes(self, shapes: Sequence[tuple[int, ...]]) -> None:
        """Raises CalibrationError where tensors differ in more than the size of their first axis, the batch."""
        for before, now in zip(self.shapes, shapes, strict=False):
            if before[1:] != now[1:] or len(before) != len(now):
                raise CalibrationError(
                    f"this schedule was calibrated for inputs of shape {list(before)} and this call has {list(now)}: "
                    f"{_AGAIN}"
                )

    def check_steps(self, steps: int) -> None:
        """Raises CalibrationError for a run of another length."""
        if steps != self.steps:
            raise CalibrationError(
                f"this schedule was calibrated for {self.steps} steps and this run has {steps}: {_AGAIN}"
            )

    def check_step(self, step: int, timestep: float | None) -> None:
        """Raises CalibrationError where another sampler's timesteps come, as far as they can be read without a sync."""
        if timestep is None or step >= len(self.timesteps):
            return
        known = self.timesteps[step]
        if not math.isclose(known, timestep, rel_tol=1e-3, abs_tol=1e-3):
            raise CalibrationError(
                f"this schedule was calibrated for {self.sampler or 'a sampler'} whose timestep at step {step} is "
                f"{known:g}, and here it is {timestep:g}: {_AGAIN}"
            )


def hash_of_weights(model: nn.Module) -> str:
    """SHA-256 over the names, shapes and some values of all parameters. Values are rounded to bfloat16 first."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(tensor.shape)};".encode())
        if tensor.device.type == "meta":
            continue
        flat = tensor.detach().reshape(-1)
        count = min(len(flat), _SAMPLED)
        places = torch.arange(count) * (len(flat) - 1) // max(count - 1, 1)
        sampled = flat[places.to(flat.device)].to("cpu", torch.bfloat16)
        digest.update(sampled.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()
