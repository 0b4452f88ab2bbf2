"""`LagrangeScheduler`: the probability-flow ODE by Lagrange interpolation and successive refinement."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from torch import Tensor

from .collocation import Table, table
from .errors import CallError, ScheduleError
from .probability_flow import FLOW, VARIABLES, VARIANCE_PRESERVING, FlowMatching, ProbabilityFlow


@dataclass(frozen=True)
class _Call:
    """One evaluation of the model: at a node of an outer interval, in a round of refinement (0: none yet)."""

    interval: int
    node: int
    round: int


class LagrangeScheduler(SchedulerMixin, ConfigMixin):
    """A sampler of higher order: K nodes in each step, and N rounds of refinement.

    Sourced (Li, Zhou, Wei, Chen 2025, arXiv 2506.24042, abstract): training-free; the integral of the probability-flow
    ODE is approximated by Lagrange interpolation of order K, the interpolated values being refined in succession.
    Reconstructed here, as the full text was not at hand: the variable that is integrated over, where the nodes lie, how
    many rounds there are, and in which order a round goes.

    What is integrated is du/ds = F(u, s). Where the noising preserves variance, u = x / sqrt(alpha_bar),
    s = sqrt((1 - alpha_bar) / alpha_bar) and F is the predicted noise; for flow matching u = x, s = sigma and F is the
    velocity. In a step from s to s + h, round 0 takes F at the first node for all; each round then evaluates F at the
    other nodes, where the interpolation of what is known leads; the step is the integral of the last interpolation.
    The order grows by one a round up to K (to 4 with three nodes). nodes=2, refinements=1, sweep="jacobi",
    reuse_last=False, final="euler" is Heun's method.

    nodes: K >= 1 (1: Euler, which is DDIM). refinements: N >= 1 rounds.
    placing: "uniform" or "chebyshev". sweep: "gauss-seidel" (a node sees those refined before it) or "jacobi".
    reuse_last: the last evaluation of a step is the first of the next: N (K - 1) model calls a step and not 1 more.
    final: the last step ends at s = 0, where there may be nothing to evaluate: "open" places all nodes before it,
        "euler" takes one Euler step.
    variable: what is integrated over where the noising preserves variance: "noise_to_signal", the s above, or "angle",
        its arc tangent, with u = x and F the v of v-prediction, which does not grow without bound towards pure noise.
        None: "noise_to_signal" up to two nodes, which makes them DDIM and Heun, and "angle" beyond.
    prediction_type: "epsilon", "v_prediction", "sample", or "flow_prediction".
    The other arguments are those of diffusers' DDIMScheduler, and with flow matching of
    FlowMatchEulerDiscreteScheduler, which set the outer grid; `LagrangeScheduler.from_config(pipe.scheduler.config)`
    takes them over.

    `num_inference_steps` counts steps, `timesteps` holds one entry for each model call, `order` is their ratio (the
    last step aside). A call's sample is a node's; inner nodes lie at fractional timesteps. Sampling is deterministic.
    """

    _compatibles: ClassVar[list[str]] = []
    init_noise_sigma = 1.0
    # Of the step under way: where it started, what is known of its slopes, and those of this round.
    _start: Any
    _slopes: list[Tensor]
    _fresh: dict[int, Tensor]

    @register_to_config
    def __init__(
        self,
        nodes: int = 3,
        refinements: int = 2,
        placing: str = "uniform",
        sweep: str = "gauss-seidel",
        reuse_last: bool = True,
        final: str = "open",
        variable: str | None = None,
        prediction_type: str = "epsilon",
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Any = None,
        timestep_spacing: str = "leading",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
        set_alpha_to_one: bool = True,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float = 0.5,
        max_shift: float = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        shift_terminal: float | None = None,
        time_shift_type: str = "exponential",
    ) -> None:
        for name, count in (("nodes", nodes), ("refinements", refinements)):
            if not isinstance(count, int) or count < 1:
                raise ScheduleError(f"{name} must be a whole number of at least 1, not {count!r}")
        for name, value, known in (
            ("placing", placing, ("uniform", "chebyshev")),
            ("sweep", sweep, ("gauss-seidel", "jacobi")),
            ("final", final, ("open", "euler")),
            ("variable", variable, (None, *VARIABLES)),
            ("prediction_type", prediction_type, (*VARIANCE_PRESERVING, FLOW)),
        ):
            if value not in known:
                raise ScheduleError(f"{name} must be one of {', '.join(map(str, known))}, not {value!r}")
        over = VARIABLES[variable or ("angle" if nodes > 2 else "noise_to_signal")]
        self.flow: ProbabilityFlow = FlowMatching(self.config) if self.is_flow else over(self.config)
        self.num_inference_steps: int | None = None
        self._calls: list[_Call] = []
        self.timesteps = torch.from_numpy(np.arange(num_train_timesteps)[::-1].copy().astype(np.float32))
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._forget()

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As every scheduler's, taking over also what was left at another class's defaults; a configuration that knows
        of shifts and of no betas is of flow matching. Raises ScheduleError for one whose time runs backwards."""
        if config is not None and config.get("invert_sigmas"):
            raise ScheduleError("invert_sigmas is not offered: this model's time runs from data to noise")
        if isinstance(config, Mapping):
            config = {name: value for name, value in config.items() if name != "_use_default_values"}
        if config is not None and "prediction_type" not in config and "beta_start" not in config and "shift" in config:
            kwargs.setdefault("prediction_type", FLOW)
        return super().from_config(config, return_unused_kwargs, **kwargs)

    @property
    def is_flow(self) -> bool:
        return bool(self.config.prediction_type == FLOW)

    @property
    def calls_per_step(self) -> int:
        """Model calls of a step between the first and the last."""
        rounds = self.config.refinements * (self.config.nodes - 1)
        return max(rounds + (0 if self.config.reuse_last else 1), 1)

    @property
    def order(self) -> int:
        """Model calls per step, as pipelines count."""
        return self.calls_per_step

    @property
    def step_index(self) -> int | None:
        """The number of the next model call."""
        return self._step_index

    @property
    def rounds(self) -> tuple[int, ...]:
        """The round of refinement of each model call, in the order of `timesteps`; 0: what a step starts from."""
        return tuple(call.round for call in self._calls)

    @property
    def begin_index(self) -> int | None:
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """The model call a run begins with. `step` refuses one that is not the first of a step; with reuse_last=False
        every `order`-th is."""
        self._begin_index = begin_index

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Any = None,
        mu: float | None = None,
    ) -> None:
        """Lay out the steps and their model calls. sigmas, mu: with flow matching only, as for
        FlowMatchEulerDiscreteScheduler. Raises CallError."""
        outer = self.flow.outer(num_inference_steps, sigmas, mu)
        self.num_inference_steps = len(outer) - 1
        self._outer = outer
        self._calls = self._layout()
        places = np.array([self._place(call) for call in self._calls])
        self.sigmas = torch.from_numpy(places).float()
        self.timesteps = torch.from_numpy(self.flow.moments(places)).to(device=device, dtype=torch.float32)
        self._step_index = self._begin_index = None
        self._forget()

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Nothing to scale: samples are the model's own."""
        return sample

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True, **_: Any
    ) -> SchedulerOutput | tuple[Tensor]:
        """From the model's output at a node to the sample at the next: `prev_sample`, in the sample's shape and dtype.

        model_output: at `sample` and `timestep`, guidance included. Raises CallError before set_timesteps, or after the
        last call.
        """
        index = self._index(timestep)
        if index >= len(self._calls):
            raise CallError(f"all {len(self._calls)} model calls of this run are done: call set_timesteps again")
        call = self._calls[index]
        weights, width = self._table(call.interval), self._width(call.interval)
        place = self._place(call)
        wide = torch.promote_types(sample.dtype, torch.float32)
        slope = self.flow.slope(model_output.to(wide), sample.to(wide), place)
        if call.round == 0:
            self._start, self._slopes = self.flow.unscaled(sample.to(wide), place), [slope] * len(weights.nodes)
        else:
            if self._start is None:
                raise CallError(
                    "a run begins at the first call of a step: make the scheduler with reuse_last=False, where every "
                    f"step has one, and begin at a multiple of its order (this is call {index})"
                )
            self._fresh[call.node] = slope
            if self.config.sweep == "gauss-seidel":
                self._slopes[call.node] = slope
            elif call.node == len(weights.nodes) - 1:
                self._slopes = [self._fresh.get(node, known) for node, known in enumerate(self._slopes)]
        following = self._calls[index + 1] if index + 1 < len(self._calls) else None
        if following is None or following.interval != call.interval:
            self._start = self._start + width * _sum(weights.whole, self._slopes)
            end = float(self._outer[call.interval + 1])
            result = self.flow.scaled(self._start, end)
            if following is not None and following.round > 0:  # its first node was evaluated already
                self._slopes = [slope] * len(self._table(following.interval).nodes)
                result = self._at(following)
            self._fresh = {}
        else:
            result = self._at(following)
        self._step_index = index + 1
        result = result.to(sample.dtype)
        return SchedulerOutput(prev_sample=result) if return_dict else (result,)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Samples as they are at these timesteps, one for each."""
        places = torch.from_numpy(self.flow.places(timesteps.detach().double().cpu().numpy())).to(original_samples)
        return self.flow.noised(original_samples, noise, places.reshape(-1, *[1] * (original_samples.dim() - 1)))

    def __len__(self) -> int:
        return int(self.config.num_train_timesteps)

    # --- the layout of a run ---------------------------------------------------------------------------------------

    def _layout(self) -> list[_Call]:
        calls: list[_Call] = []
        held = False  # whether the interval's first node was evaluated as the last of the one before
        for interval in range(len(self._outer) - 1):
            weights = self._table(interval)
            if not held:
                calls.append(_Call(interval, 0, 0))
            rounds = range(1, self.config.refinements + 1)
            inner = [_Call(interval, node, r) for r in rounds for node in range(1, len(weights.nodes))]
            calls += inner
            held = bool(self.config.reuse_last and inner and weights.closed)
            if len(self._table(interval + 1).nodes) == 1:
                held = False  # the step after it is a plain one, which starts with an evaluation of its own
        return calls

    def _table(self, interval: int) -> Table:
        at_end = interval >= len(self._outer) - 2 and self._outer[-1] == 0
        if at_end and self.config.final == "euler":
            return table(1)
        return table(self.config.nodes, self.config.placing, open_end=at_end)

    def _width(self, interval: int) -> float:
        return float(self._outer[interval + 1] - self._outer[interval])

    def _place(self, call: _Call) -> float:
        return float(
            self._outer[call.interval] + self._table(call.interval).nodes[call.node] * self._width(call.interval)
        )

    # --- one step --------------------------------------------------------------------------------------------------

    def _forget(self) -> None:
        self._start, self._slopes, self._fresh = None, [], {}

    def _index(self, timestep: Any) -> int:
        if self.num_inference_steps is None:
            raise CallError("set_timesteps comes before step")
        if self._step_index is None:
            if self._begin_index is not None:
                self._step_index = self._begin_index
            else:
                moment = float(timestep)
                found = (self.timesteps.cpu() - moment).abs()
                self._step_index = int(found.argmin())
        return self._step_index

    def _at(self, call: _Call) -> Tensor:
        """The sample where the interpolation leads at a node."""
        weights = self._table(call.interval)
        moved = self._start + self._width(call.interval) * _sum(weights.inner[call.node], self._slopes)
        return self.flow.scaled(moved, self._place(call))


def _sum(weights: tuple[float, ...], values: list[Tensor]) -> Any:
    return sum((weight * value for weight, value in zip(weights, values, strict=True)), start=torch.zeros(()))
