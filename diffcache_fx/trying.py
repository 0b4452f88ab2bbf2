"""What plans do in generations: each is drawn once from each noise, and its errors kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .allotment import JointPlan
from .errors import CalibrationError, NotFiniteError
from .recording import RecordingDenoiser, Replay
from .targets import Psnr, RelativeL1

if TYPE_CHECKING:
    from .calibration import Calibration


@dataclass(frozen=True)
class Outcome:
    """What a plan does to the samples of one noise. errors: by the kind of target that asks for them, of each sample,
    [N] float64."""

    errors: Mapping[type[Psnr | RelativeL1], Tensor]

    @property
    def moved(self) -> float:
        """Mean square error of the samples."""
        return float(self.errors[Psnr].mean())

    @property
    def level(self) -> float:
        """Mean logarithm of the mean square error of each sample: what mean PSNR tells. Unlike the mean it does not
        hang on the one sample that a plan happens to turn to something else."""
        each = self.errors[Psnr]
        return float(each.clamp_min(torch.finfo(each.dtype).tiny).log().mean())


class Tries:
    """Of one calibration. recorder, reference: that of the noise it was made with, and the samples it drew."""

    def __init__(self, measured: Calibration, recorder: RecordingDenoiser, reference: Tensor) -> None:
        self._measured, self._recorder = measured, recorder
        self._references = {measured.seed: reference}
        self._said: dict[int, Replay] = {measured.seed: recorder.outputs()}
        self._outcomes: dict[tuple[JointPlan, int], Outcome] = {}

    def said(self, seed: int) -> Replay:
        """What the uncached model returns in the generation from this noise, as far as it was drawn."""
        return self._said.get(seed, {})

    def known(self, plan: JointPlan, seed: int) -> bool:
        return (plan, seed) in self._outcomes

    def outcome(self, plan: JointPlan, seed: int) -> Outcome:
        """Of a plan, from the uncached samples of the same noise."""
        if (plan, seed) not in self._outcomes:
            reference = self._reference(seed)
            try:
                samples = self._measured.tried(plan, seed)
            except NotFiniteError:  # a forecast that ran away; other plans may do
                samples = torch.full_like(reference, torch.inf)
            errors = {kind: kind.error(samples, reference) for kind in (Psnr, RelativeL1)}
            self._outcomes[plan, seed] = Outcome(errors)
        return self._outcomes[plan, seed]

    def _reference(self, seed: int) -> Tensor:
        if seed not in self._references:
            self._recorder.forget()
            found = self._measured.run(self._recorder, seed)
            if any(found.shape == other.shape and torch.equal(found, other) for other in self._references.values()):
                raise CalibrationError(
                    f"the sampler gives the same samples for seed {seed} as for another: let its noise depend on the "
                    "seed it is called with, so that plans can be judged on noise they were not made for"
                )
            self._references[seed] = found
            self._said[seed] = self._recorder.outputs()
        return self._references[seed]


__all__ = ["Outcome", "Tries"]
