"""Methods whose schedule is known before the generation: what to hold, and when to refresh it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .hooks import Arguments, Keywords, Reference, Span, timestep


class Held(Reference):
    """Groups of submodules whose outputs are held, each group with decisions of its own."""

    groups: Mapping[str, Sequence[str]]

    def reset(self) -> None:
        super().reset()
        self.decisions = {name: [] for name in self.groups}
        self.fresh: dict[str, bool] = {}
        self.stored: dict[str, Any] = {}

    def hold(self, group: str, store: Callable[[Tensor], Tensor] = lambda value: value) -> None:
        """Compute the submodules of a group when it is fresh, and pass on what was stored then when it is not."""

        def forward(path: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            if not self.fresh[group]:
                return self.stored[path]
            value = original(*args, **kwargs)
            self.stored[path] = store(value)
            return value

        for path in self.groups[group]:
            self.wrap(path, lambda original, *a, path=path, **k: forward(path, original, *a, **k))

    def run(self, args: Arguments, kwargs: Keywords) -> Any:
        for group, decisions in self.decisions.items():
            self.fresh[group] = self.must_refresh(decisions) or self.refresh(group, args, kwargs)
            decisions.append(self.fresh[group])
        return super().run(args, kwargs)

    def refresh(self, group: str, args: Arguments, kwargs: Keywords) -> bool:
        raise NotImplementedError


class DeepCache(Reference):
    """A U-Net of which only the outermost level runs between full steps (https://arxiv.org/abs/2312.00858).

    Refresh if ``step % interval == 0``. Between, the last resnet of the last up block takes the hidden states of the
    last refresh, and beside them skip connection 0, the output of conv_in, which is fresh; all deeper modules do not
    run. `last_resnet` is its path, such as "up_blocks.2.resnets.1".
    """

    def __init__(self, model: nn.Module, last_resnet: str, interval: int, **limits: Any) -> None:
        self.interval = interval
        super().__init__(model, **limits)
        up, index = last_resnet.split(".resnets.")
        level = int(up.rsplit(".", 1)[1])
        inner = [f"{up}.{kind}.{i}" for kind in ("resnets", "attentions") for i in range(int(index))]
        deep = [f"down_blocks.{i}" for i in range(len(model.down_blocks))]
        deep += ["mid_block"] if getattr(model, "mid_block", None) is not None else []
        deep += [f"up_blocks.{i}" for i in range(level)]
        deep += [path for path in inner if hasattr(model.get_submodule(up), path.split(".")[-2])]
        for path in deep:
            self.wrap(path, lambda original, *a, path=path, **k: self.deeper(path, original, *a, **k))

    def reset(self) -> None:
        super().reset()
        self.stored: dict[str, Any] = {}

    def deeper(self, path: str, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.decisions[-1]:
            self.stored[path] = original(*args, **kwargs)
        return self.stored[path]

    def run(self, args: Arguments, kwargs: Keywords) -> Any:
        self.record(self.forced or self.step % self.interval == 0)
        return super().run(args, kwargs)


class FORA(Held):
    """Outputs of attention and feed-forward, before their gates, held for an interval (arXiv 2407.01425).

    Refresh if ``step % interval == 0``. With `from_end`, as the authors' code counts: steps down to 0, so that the
    steps with ``(num_steps - 1 - step) % interval == 0`` and the first one refresh.
    """

    def __init__(
        self, model: nn.Module, interval: int, paths: Sequence[str], from_end: bool = False, **limits: Any
    ) -> None:
        self.interval, self.from_end, self.groups = interval, from_end, {"all": paths}
        super().__init__(model, **limits)
        self.hold("all")

    def reset(self) -> None:
        super().reset()
        self.decisions = []

    def run(self, args: Arguments, kwargs: Keywords) -> Any:
        place = self.num_steps - 1 - self.step if self.from_end else self.step
        self.fresh["all"] = self.forced or place % self.interval == 0
        self.record(self.fresh["all"])
        return self.model(*args, **kwargs)


class DeltaDiT(Reference):
    """The residual of the rear blocks held until the gate, then that of the front blocks (arXiv 2406.01125).

    Before `gate_step`: the rear is refreshed if ``step % interval == 0``, the front computed. From `gate_step` on: the
    front is refreshed if ``(step - gate_step) % interval == 0``, the rear computed.
    """

    def __init__(
        self, model: nn.Module, interval: int, gate_step: int, rear: Sequence[str], front: Sequence[str], **limits: Any
    ) -> None:
        self.interval, self.gate_step = interval, gate_step
        super().__init__(model, **limits)
        for part, paths in {"front": front, "rear": rear}.items():
            Span(
                self,
                paths,
                fill=lambda *_, part=part, **__: None if self.decisions[part][-1] else self.residual[part],
                keep=lambda residual, part=part: self.residual.update({part: residual}),
            )

    def reset(self) -> None:
        super().reset()
        self.decisions = {"front": [], "rear": []}
        self.residual: dict[str, Tensor] = {}

    def run(self, args: Arguments, kwargs: Keywords) -> Any:
        later = self.step >= self.gate_step
        due = (self.step - self.gate_step * later) % self.interval == 0
        for part, computed in {"front": not later, "rear": later}.items():
            self.decisions[part].append(computed or due or self.must_refresh(self.decisions[part]))
        return super().run(args, kwargs)


class PAB(Held):
    """Attention outputs broadcast over a range of steps inside a window of timesteps (arXiv 2408.12588).

    A group is reused if ``step % ranges[group] != 0`` and ``window[0] < t < window[1]``, both strictly.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Mapping[str, Sequence[str]],
        ranges: Mapping[str, int],
        window: tuple[float, float],
        **limits: Any,
    ) -> None:
        self.groups, self.ranges, self.window = groups, ranges, window
        super().__init__(model, **limits)
        for group in groups:
            self.hold(group)

    def refresh(self, group: str, args: Arguments, kwargs: Keywords) -> bool:
        inside = self.window[0] < timestep(args, kwargs) < self.window[1]
        return self.step % self.ranges[group] == 0 or not inside


class TGATE(Held):
    """Cross-attention frozen from a gate on, self-attention held at an interval before it (arXiv 2404.02747).

    `gate_step` steps compute cross-attention, 0 to gate_step - 1; from step gate_step on it is the value of step
    gate_step - 1. Self-attention is computed up to and including step `warm_up`, at ``step % self_interval == 0``
    before the gate, at step gate_step - 1, and at ``step % later_interval == 0`` from gate_step on.
    `halves`: the batch holds both guidance branches, and what is stored at step gate_step - 1 is their mean, for both.
    """

    def __init__(
        self,
        model: nn.Module,
        cross: Sequence[str],
        own: Sequence[str],
        gate_step: int,
        self_interval: int,
        warm_up: int = 2,
        later_interval: int = 1,
        halves: bool = True,
        **limits: Any,
    ) -> None:
        self.groups = {"cross": cross, "self": own}
        self.gate_step, self.self_interval, self.later_interval = gate_step, self_interval, later_interval
        self.head, self.halves = warm_up, halves
        super().__init__(model, **limits)
        self.hold("cross", self.store)
        self.hold("self", self.store)

    def store(self, value: Tensor) -> Tensor:
        if not self.halves or self.step != self.gate_step - 1:
            return value
        first, second = value.chunk(2)
        return torch.cat([(first + second) / 2] * 2)

    def refresh(self, group: str, args: Arguments, kwargs: Keywords) -> bool:
        if group == "cross":
            return self.step < self.gate_step
        if self.step >= self.gate_step:
            return self.step % self.later_interval == 0
        return self.step <= self.head or self.step % self.self_interval == 0 or self.step == self.gate_step - 1


class SmoothCache(Held):
    """Outputs by type of component, refreshed where a schedule made beforehand has a 1 (arXiv 2411.10510).

    Steps past the end of a schedule are computed.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Mapping[str, Sequence[str]],
        schedule: Mapping[str, Sequence[int]],
        **limits: Any,
    ) -> None:
        self.groups, self.schedule = groups, schedule
        super().__init__(model, **limits)
        for group in groups:
            self.hold(group)

    def refresh(self, group: str, args: Arguments, kwargs: Keywords) -> bool:
        bits = self.schedule[group]
        return self.step >= len(bits) or bool(bits[self.step])


class BlockCaching(Reference):
    """The residual of every block, refreshed where ``bits[step][block]`` is 1 (arXiv 2312.03209)."""

    def __init__(self, model: nn.Module, blocks: Sequence[str], bits: Sequence[Sequence[int]], **limits: Any) -> None:
        self.blocks, self.bits = blocks, bits
        super().__init__(model, **limits)
        for path in blocks:
            Span(
                self,
                [path],
                fill=lambda *_, path=path, **__: None if self.decisions[path][-1] else self.residual[path],
                keep=lambda residual, path=path: self.residual.update({path: residual}),
            )

    def reset(self) -> None:
        super().reset()
        self.decisions = {path: [] for path in self.blocks}
        self.residual: dict[str, Tensor] = {}

    def run(self, args: Arguments, kwargs: Keywords) -> Any:
        for path, bit in zip(self.blocks, self.bits[self.step], strict=True):
            self.decisions[path].append(self.must_refresh(self.decisions[path]) or bool(bit))
        return super().run(args, kwargs)
