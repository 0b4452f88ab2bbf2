"""The probability-flow ODE of a diffusion model as du/ds = F(u, s): its coordinates, and the grids of diffusers' own
schedulers on them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from .errors import CallError

VARIANCE_PRESERVING = ("epsilon", "v_prediction", "sample")
FLOW = "flow_prediction"
_GRID = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "timestep_spacing"),
    *("steps_offset", "rescale_betas_zero_snr", "set_alpha_to_one"),
)
_FLOW_GRID = (
    *("num_train_timesteps", "shift", "use_dynamic_shifting", "base_shift", "max_shift", "base_image_seq_len"),
    *("max_image_seq_len", "shift_terminal", "time_shift_type"),
)
# The least signal that is divided by, as diffusers' Euler scheduler takes for schedules that end in pure noise.
_LEAST_SIGNAL = 2.0**-24


class ProbabilityFlow(ABC):
    """Coordinates u and s of samples x at timesteps t."""

    @abstractmethod
    def outer(self, steps: int | None, sigmas: Any, mu: float | None) -> np.ndarray:
        """s at the ends of all steps, descending; float64 [steps + 1]."""

    @abstractmethod
    def moments(self, places: np.ndarray) -> np.ndarray:
        """Timesteps of values of s, fractional ones between those of training."""

    @abstractmethod
    def places(self, moments: np.ndarray) -> np.ndarray:
        """s at timesteps."""

    @abstractmethod
    def slope(self, output: Tensor, sample: Tensor, place: float) -> Tensor:
        """F, of what the model returned for a sample."""

    @abstractmethod
    def unscaled(self, sample: Tensor, place: Any) -> Tensor:
        """u of x."""

    @abstractmethod
    def scaled(self, value: Tensor, place: Any) -> Tensor:
        """x of u."""

    @abstractmethod
    def noised(self, original: Tensor, noise: Tensor, place: Tensor) -> Tensor:
        """x of a clean sample and noise."""


class VariancePreserving(ProbabilityFlow):
    """u = x / sqrt(alpha_bar), s = sqrt((1 - alpha_bar) / alpha_bar), F the predicted noise."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._kind = config["prediction_type"]
        self._grid = DDIMScheduler(**{name: config[name] for name in _GRID})
        signal = self._grid.alphas_cumprod.double().clamp(min=_LEAST_SIGNAL)
        self._noise = ((1 - signal) / signal).sqrt().numpy()  # s of each training timestep
        self._end = 0.0 if config["set_alpha_to_one"] else float(self._noise[0])

    def outer(self, steps: int | None, sigmas: Any, mu: float | None) -> np.ndarray:
        if sigmas is not None or mu is not None:
            raise CallError(f"sigmas and mu belong to flow matching: prediction_type is {self._kind!r}")
        if steps is None:
            raise CallError("num_inference_steps is missing: how many steps?")
        self._grid.set_timesteps(steps)
        return np.append(self._noise[self._grid.timesteps.numpy()], self._end)

    def moments(self, places: np.ndarray) -> np.ndarray:
        return np.interp(np.log(places), np.log(self._noise), np.arange(len(self._noise)))

    def places(self, moments: np.ndarray) -> np.ndarray:
        return np.exp(np.interp(moments, np.arange(len(self._noise)), np.log(self._noise)))

    def slope(self, output: Tensor, sample: Tensor, place: float) -> Tensor:
        if self._kind == "epsilon":
            return output
        signal, noise = (1 / (1 + place**2)) ** 0.5, place / (1 + place**2) ** 0.5
        if self._kind == "v_prediction":
            return signal * output + noise * sample
        return (sample - signal * output) / noise

    def unscaled(self, sample: Tensor, place: Any) -> Tensor:
        return sample * (1 + place**2) ** 0.5

    def scaled(self, value: Tensor, place: Any) -> Tensor:
        return value / (1 + place**2) ** 0.5

    def noised(self, original: Tensor, noise: Tensor, place: Tensor) -> Tensor:
        return self.scaled(original + place * noise, place)


class Angular(VariancePreserving):
    """The same on a circle: x = cos(s) x0 + sin(s) noise, u = x, F = cos(s) noise - sin(s) x0, the v of v-prediction.
    Where there is hardly any signal left, sqrt((1 - alpha_bar) / alpha_bar) grows without bound and s does not, so that
    nodes at equal distances go where something changes."""

    def outer(self, steps: int | None, sigmas: Any, mu: float | None) -> np.ndarray:
        return np.arctan(super().outer(steps, sigmas, mu))

    def moments(self, places: np.ndarray) -> np.ndarray:
        return super().moments(np.tan(places))

    def places(self, moments: np.ndarray) -> np.ndarray:
        return np.arctan(super().places(moments))

    def slope(self, output: Tensor, sample: Tensor, place: float) -> Tensor:
        signal, noise = math.cos(place), math.sin(place)
        if self._kind == "epsilon":
            return (output - noise * sample) / signal
        if self._kind == "v_prediction":
            return output
        return (signal * sample - output) / noise

    def unscaled(self, sample: Tensor, place: Any) -> Tensor:
        return sample

    def scaled(self, value: Tensor, place: Any) -> Tensor:
        return value

    def noised(self, original: Tensor, noise: Tensor, place: Tensor) -> Tensor:
        return place.cos() * original + place.sin() * noise


class FlowMatching(ProbabilityFlow):
    """u = x = (1 - s) x0 + s noise, F the velocity noise - x0."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._grid = FlowMatchEulerDiscreteScheduler(**{name: config[name] for name in _FLOW_GRID})
        self._count = config["num_train_timesteps"]

    def outer(self, steps: int | None, sigmas: Any, mu: float | None) -> np.ndarray:
        if steps is None and sigmas is None:
            raise CallError("num_inference_steps is missing: how many steps?")
        self._grid.set_timesteps(steps, sigmas=sigmas, mu=mu)
        return np.asarray(self._grid.sigmas.double().numpy())

    def moments(self, places: np.ndarray) -> np.ndarray:
        return places * self._count

    def places(self, moments: np.ndarray) -> np.ndarray:
        return moments / self._count

    def slope(self, output: Tensor, sample: Tensor, place: float) -> Tensor:
        return output

    def unscaled(self, sample: Tensor, place: Any) -> Tensor:
        return sample

    def scaled(self, value: Tensor, place: Any) -> Tensor:
        return value

    def noised(self, original: Tensor, noise: Tensor, place: Tensor) -> Tensor:
        return torch.lerp(original, noise, place)


VARIABLES: dict[str, type[VariancePreserving]] = {"noise_to_signal": VariancePreserving, "angle": Angular}
