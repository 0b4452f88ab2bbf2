"""The samplers that are compared, made from a demo's own scheduler: each a diffusers scheduler over its noise levels.

All start where the training noise is largest (trailing timesteps) and end at clean samples.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    UniPCMultistepScheduler,
)

from diffcache_fx import LagrangeScheduler

Made = Callable[[Any], Any]


def is_flow(own: Any) -> bool:
    """Whether a scheduler is of flow matching."""
    return isinstance(own, FlowMatchEulerDiscreteScheduler)


def first_order(own: Any) -> Any:
    """DDIM, or Euler's method for flows. One node is both; diffusers' own DDIM goes wrong on trailing timesteps where
    the number of steps does not divide 1000."""
    return LagrangeScheduler.from_config(_options(own, LagrangeScheduler), nodes=1)


def heun(own: Any) -> Any:
    """On the noise levels of Karras et al. (2022); for flows on those of the scheduler itself."""
    if is_flow(own):
        return FlowMatchHeunDiscreteScheduler(own.config.num_train_timesteps, own.config.shift)
    return HeunDiscreteScheduler.from_config(_options(own), use_karras_sigmas=True)


def _options(own: Any, kind: type | None = None) -> dict[str, Any]:
    """Of a scheduler, defaults included, which differ from class to class; those only that `kind` knows."""
    given = {name: value for name, value in own.config.items() if not name.startswith("_")}
    given |= {} if is_flow(own) else {"timestep_spacing": "trailing"}
    known = given if kind is None else inspect.signature(kind).parameters
    return {name: value for name, value in given.items() if name in known}


def _flow_options(own: Any) -> dict[str, Any]:
    return {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": own.config.shift}


def multistep(kind: Any, **options: Any) -> Made:
    """A multistep solver of diffusers."""

    def make(own: Any) -> Any:
        if is_flow(own):
            return kind(num_train_timesteps=own.config.num_train_timesteps, **_flow_options(own), **options)
        return kind.from_config(_options(own), **options)

    return make


def lagrange(nodes: int, refinements: int, **options: Any) -> Made:
    """Ours."""

    def make(own: Any) -> Any:
        extra = {} if is_flow(own) else {"variable": "angle"}
        return LagrangeScheduler.from_config(
            _options(own, LagrangeScheduler), nodes=nodes, refinements=refinements, **extra, **options
        )

    return make


SAMPLERS: dict[str, Made] = {
    "DDIM or Euler": first_order,
    "Heun": heun,
    "DPM-Solver++(2M)": multistep(DPMSolverMultistepScheduler, solver_order=2),
    "DPM-Solver++(3M)": multistep(DPMSolverMultistepScheduler, solver_order=3),
    "UniPC": multistep(UniPCMultistepScheduler),
    "Lagrange(2, 1)": lagrange(2, 1),
    "Lagrange(3, 1)": lagrange(3, 1),
    "Lagrange(3, 2)": lagrange(3, 2),
    "Lagrange(4, 3)": lagrange(4, 3),
}


def steps_for(make: Made, own: Any, calls: int) -> int:
    """The most steps with which a sampler calls the model at most so often. Raises ValueError where one step is too
    much."""
    found = 0
    for steps in range(1, calls + 1):
        made = make(own)
        made.set_timesteps(steps)
        if len(made.timesteps) > calls:
            break
        found = steps
    if not found:
        raise ValueError(f"one step of {type(make(own)).__name__} needs more than {calls} calls")
    return found
