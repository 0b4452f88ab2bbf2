"""The adaptive guards: relative change, a probe block, the output, draft and verify."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch

from .arithmetic import Number, at_least, both, divide, either, where
from .errors import ScheduleError
from .judgement import (
    Adaptive,
    Judgement,
    Kept,
    Numbers,
    Tensors,
    as_numbers,
    check_threshold,
    distance,
    mean_abs,
    polynomial,
    relative_l1,
)
from .references import REFERENCES, BlocksOutput, Latents, ModelOutput, Reference, TrunkInput


@dataclass(frozen=True)
class RelativeChange(Adaptive):
    """Reuse while the relative change of one quantity, mean |p - p'| / mean |p'|, stays below the threshold.

    of: the quantity p. since: p' is that of the last refreshed step ("refresh"; FBCache, DBCache) or of the step before
    ("step"; TeaCache, DiCache). accumulate: the changes since the last refresh are added up. coefficients: of a
    polynomial that each change goes through first, highest power first (TeaCache).

    FBCache: ParaAttention (Cheng, 2024). TeaCache: Liu et al., CVPR 2025, arXiv 2411.19108.
    """

    kind: ClassVar[str] = "relative_change"
    of: Reference = field(default_factory=BlocksOutput)
    threshold: float = 0.08
    since: str = "refresh"
    accumulate: bool = False
    coefficients: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check_threshold(self.threshold)
        if self.since not in ("refresh", "step"):
            raise ScheduleError(f"since must be 'refresh' or 'step', not {self.since!r}")
        if isinstance(self.of, ModelOutput):
            raise ScheduleError("the model's output is known only after the decision: watch another quantity")
        coefficients = as_numbers(self.coefficients)
        if coefficients is None or not all(math.isfinite(c) for c in coefficients):
            raise ScheduleError(f"coefficients must be finite numbers, highest power first, not {self.coefficients!r}")
        object.__setattr__(self, "coefficients", coefficients)
        if not isinstance(self.of, REFERENCES):
            names = ", ".join(kind.__name__ for kind in REFERENCES)
            raise ScheduleError(f"of must be a quantity ({names}), not {self.of!r}")

    @property
    def references(self) -> dict[str, Reference]:
        return {"p": self.of}

    @property
    def kept(self) -> dict[str, Kept]:
        return {"p": Kept("p", self.since)}

    @property
    def carried(self) -> tuple[str, ...]:
        return ("total",) if self.accumulate else ()

    def before(self, now: Tensors, kept: Tensors) -> dict[str, torch.Tensor]:
        return {"change": relative_l1(now["p"], kept["p"])}

    def decide(self, measured: Numbers, memory: Numbers, force: Number | bool, moment: Sequence[Number]) -> Judgement:
        signal = polynomial(self.coefficients, measured["change"])
        if self.accumulate:
            signal = memory["total"] + signal
        refresh = either(force, at_least(signal, self.threshold))
        carried = {"total": where(refresh, 0.0, signal)} if self.accumulate else {}
        return Judgement(refresh, signal, self.threshold, carried)


@dataclass(frozen=True)
class ProbeChange(Adaptive):
    """DiCache (Bu et al., 2025): the first blocks are a probe; their output's relative change from step to step is
    added up while reusing, and the residual is rescaled by how far the probe has moved (forecast `ProbeRatio`).

    depth: blocks of the probe. minus_input: take |change of the probe's output - change of its input| instead.
    The ratio is |p - p2| / |p1 - p2| with p the probe's residual now, p1 and p2 at the last two refreshed steps.
    """

    kind: ClassVar[str] = "probe_change"
    offers: ClassVar[tuple[str, ...]] = ("ratio",)
    threshold: float = 0.4
    depth: int = 1
    minus_input: bool = False

    def __post_init__(self) -> None:
        check_threshold(self.threshold)
        BlocksOutput(self.depth)

    @property
    def references(self) -> dict[str, Reference]:
        found: dict[str, Reference] = {
            "y": BlocksOutput(self.depth, residual=False),
            "p": BlocksOutput(self.depth, residual=True),
        }
        return {**found, "x": TrunkInput()} if self.minus_input else found

    @property
    def kept(self) -> dict[str, Kept]:
        found = {"y": Kept("y", "step"), "p2": Kept("p1"), "p1": Kept("p")}
        return {**found, "x": Kept("x", "step")} if self.minus_input else found

    @property
    def carried(self) -> tuple[str, ...]:
        return ("total",)

    def before(self, now: Tensors, kept: Tensors) -> dict[str, torch.Tensor]:
        change = relative_l1(now["y"], kept["y"])
        if self.minus_input:
            change = (change - relative_l1(now["x"], kept["x"])).abs()
        moved, apart = distance(now["p"], kept["p2"]), distance(kept["p1"], kept["p2"])
        return {"change": change, "ratio": divide(moved, apart)}  # type: ignore[dict-item]

    def decide(self, measured: Numbers, memory: Numbers, force: Number | bool, moment: Sequence[Number]) -> Judgement:
        signal = memory["total"] + measured["change"]
        refresh = either(force, at_least(signal, self.threshold))
        return Judgement(refresh, signal, self.threshold, {"total": where(refresh, 0.0, signal)})


@dataclass(frozen=True)
class OutputChange(Adaptive):
    """EasyCache (Zhou et al., 2025): the output's change is predicted from the input's and added up while reusing.

    k = |v - v'| / |x - x'| between the last two refreshed steps; each step adds k |x - x_before| / |v'|, with x_before
    the input of the step before and v' the output of the last refreshed step; |.| is the mean absolute value.
    """

    kind: ClassVar[str] = "output_change"
    threshold: float = 0.05

    def __post_init__(self) -> None:
        check_threshold(self.threshold)

    @property
    def references(self) -> dict[str, Reference]:
        return {"x": Latents(), "v": ModelOutput()}

    @property
    def kept(self) -> dict[str, Kept]:
        return {"x": Kept("x", "step"), "x_full": Kept("x"), "v_full": Kept("v")}

    @property
    def carried(self) -> tuple[str, ...]:
        return ("total", "k", "norm")

    def before(self, now: Tensors, kept: Tensors) -> dict[str, torch.Tensor]:
        return {"moved": distance(now["x"], kept["x"])}

    def after(self, now: Tensors, kept: Tensors) -> dict[str, torch.Tensor]:
        k = divide(distance(now["v"], kept["v_full"]), distance(now["x"], kept["x_full"]))
        return {"k": k, "norm": mean_abs(now["v"])}  # type: ignore[dict-item]

    def decide(self, measured: Numbers, memory: Numbers, force: Number | bool, moment: Sequence[Number]) -> Judgement:
        signal = memory["total"] + memory["k"] * divide(measured["moved"], memory["norm"])
        unknown = at_least(1.5, memory["refreshes"])  # k needs two refreshed steps
        refresh = either(either(force, unknown), at_least(signal, self.threshold))
        carried = {"total": where(refresh, 0.0, signal), "k": memory["k"], "norm": memory["norm"]}
        return Judgement(refresh, signal, self.threshold, carried)

    def settle(self, measured: Numbers, memory: dict[str, Number], refreshed: Number | bool) -> dict[str, Number]:
        return {name: where(refreshed, measured[name], memory[name]) for name in ("k", "norm")} | {
            "total": memory["total"]
        }


@dataclass(frozen=True)
class DraftError(Adaptive):
    """SpeCa (Liu et al., 2025, arXiv 2509.11628): draft by forecast, verify by computing the last region of the rule on
    its forecast input; a relative L1 error of at least tau makes the next step a full one.

    tau = max(threshold * decay**progress, floor), progress = share of the run that the step completes. least: drafts in
    a row that are trusted unseen. The error here is mean |forecast - computed| / mean |computed|; the authors' code
    averages the relative errors of the elements, which small ones dominate.
    """

    kind: ClassVar[str] = "draft_error"
    threshold: float = 0.1
    decay: float = 0.01
    floor: float = 0.01
    least: int = 2

    def __post_init__(self) -> None:
        check_threshold(self.threshold)
        check_threshold(self.floor, "floor")
        if as_numbers([self.decay]) is None or not 0.0 < self.decay <= 1.0:
            raise ScheduleError(f"decay must be a number above 0 and at most 1, not {self.decay!r}")
        if not isinstance(self.least, int) or isinstance(self.least, bool) or self.least < 0:
            raise ScheduleError(f"least must be a whole number of steps from 0, not {self.least!r}")

    @property
    def references(self) -> dict[str, Reference]:
        return {}

    @property
    def carried(self) -> tuple[str, ...]:
        return ("error", "drafts")

    @property
    def checks(self) -> bool:
        return True

    def needs_num_steps(self) -> bool:
        return self.decay != 1.0

    def decide(self, measured: Numbers, memory: Numbers, force: Number | bool, moment: Sequence[Number]) -> Judgement:
        tau = self.threshold * self.decay ** moment[1]
        tau = where(at_least(tau, self.floor), tau, self.floor)
        counts = at_least(memory["drafts"], float(self.least + 1))
        refresh = either(force, both(counts, at_least(memory["error"], tau)))
        return Judgement(refresh, memory["error"], tau, {name: memory[name] for name in self.carried})

    def settle(self, measured: Numbers, memory: dict[str, Number], refreshed: Number | bool) -> dict[str, Number]:
        return {
            "error": where(refreshed, 0.0, measured["error"]),
            "drafts": where(refreshed, 0.0, memory["drafts"] + 1.0),
        }


AdaptiveGuard = RelativeChange | ProbeChange | OutputChange | DraftError
ADAPTIVE: tuple[type, ...] = (RelativeChange, ProbeChange, OutputChange, DraftError)
