"""Programs over the outputs of two guidance branches: their difference by frequency, and one branch from the other."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from diffcache_fx.errors import RegionError
from diffcache_fx.program import Input, InputKind, Output, OutputKind, StepProgram, output_node, returned

from .emit import fake_mode_of, set_outputs
from .inline import inline


def difference_program(program: StepProgram, radius: float) -> StepProgram:
    """(conditional, unconditional) -> low and high frequencies of unconditional - conditional, each shaped like the
    model's output, float32. Refuses a model with several outputs, or whose output has no two spatial axes at its
    end."""

    def split(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        apart = values["uncond"].float() - values["cond"].float()
        low = low_frequencies(apart, radius)
        return {"low": low, "high": apart - low}

    return _program(program, ("cond", "uncond"), split, OutputKind.LIVE)


def rebuild_program(program: StepProgram) -> StepProgram:
    """(conditional, low, high, weights [2]) -> conditional + weights[0] low + weights[1] high."""

    def combine(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        weights, cond = values["weights"], values["cond"]
        rebuilt = cond.float() + weights[0] * values["low"] + weights[1] * values["high"]
        return {"0": rebuilt.to(cond.dtype)}

    return _program(program, ("cond", "low", "high", "weights"), combine, OutputKind.USER)


def low_frequencies(value: torch.Tensor, radius: float) -> torch.Tensor:
    """What is left of [..., height, width] inside a circle of the spectrum, its radius that share of the shorter
    side."""
    height, width = value.shape[-2:]
    reach = int(min(height, width) * radius)
    # By the cosines and sines of these few frequencies: a Fourier transform is complex, which no exporter takes.
    down, across = (_waves(length, reach, value) for length in (height, width))
    both = down @ value @ across.mT
    first, last = slice(0, 2 * reach + 1), slice(2 * reach + 1, None)
    frequency = torch.arange(-reach, reach + 1, device=value.device)
    inside = frequency[:, None] ** 2 + frequency[None, :] ** 2 <= reach**2
    real = torch.where(inside, both[..., first, first] - both[..., last, last], 0.0)
    imaginary = torch.where(inside, both[..., last, first] + both[..., first, last], 0.0)
    spectrum = torch.cat([torch.cat([real, imaginary], -1), torch.cat([imaginary, -real], -1)], -2)
    return (down.mT @ spectrum @ across) / (height * width)


def _waves(length: int, reach: int, like: torch.Tensor) -> torch.Tensor:
    """[2 (2 reach + 1), length]: cosines, then sines, of the frequencies from -reach to reach."""
    frequency = torch.arange(-reach, reach + 1, device=like.device)
    turns = (frequency[:, None] * torch.arange(length, device=like.device)) % length
    angle = turns.to(like.dtype) * (2 * math.pi / length)
    return torch.cat([angle.cos(), angle.sin()])


def _program(program: StepProgram, names: tuple[str, ...], function: Any, kind: OutputKind) -> StepProgram:
    results = [value for value in returned(program.graph) if isinstance(value, fx.Node)]
    users = [results[i].meta["val"] for i, _ in program.outputs_of(OutputKind.USER)]
    if len(users) != 1 or users[0].dim() < 4:
        raise RegionError(
            "one guidance branch is rebuilt from another by spatial frequency: that takes a model with a single output "
            f"[batch, channels, ..., height, width], and this one returns {[tuple(user.shape) for user in users]}"
        )
    root = fx.GraphModule(torch.nn.Module(), fx.Graph())
    graph = root.graph
    nodes = {name: graph.placeholder(name) for name in names}
    with fake_mode_of(program.graph):
        for name, node in nodes.items():
            like = users[0] if name in ("cond", "uncond") else users[0].float()
            node.meta["val"] = torch.empty_like(like)
            if name == "weights":
                node.meta["val"] = torch.empty(2, dtype=torch.float32, device=users[0].device)
    graph.output(())
    with graph.inserting_before(output_node(graph)):
        found = inline(graph, function, nodes)
    set_outputs(graph, list(found.values()))
    graph.lint()
    root.recompile()
    inputs = tuple(
        Input(InputKind.ROWS if n == "weights" else InputKind.LIVE, node.name, n) for n, node in nodes.items()
    )
    outputs = tuple(Output(kind, name) for name in found)
    return program.replace(module=root, inputs=inputs, outputs=outputs, regions=(), measured=())
