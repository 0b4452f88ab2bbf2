"""Correct: the scale and the shift of each reused value, looked up by the number of the step."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from diffcache_fx.correction import ScaleShift
from diffcache_fx.errors import RegionError
from diffcache_fx.program import CutValue, Input, InputKind, Region, StepProgram, value_of

from .emit import call, placeholder, safe
from .inline import inline

TARGET = "step"


@dataclass(frozen=True)
class CorrectReuse:
    """Add what a reused value is scaled by and shifted by, and note it in the cut; Specialize and InsertGuards apply
    it.

    corrections: one for each rule, None for those without.

    Rules:
    1. One constant [steps, 2, channels] for each floating-point cut value of the rule; one input of kind MOMENT.
    2. Scale and shift are computed from these two alone, in float32, shaped so that they go with the value.
    3. Nothing uses them yet: a step that refreshes stays as it was.

    Before:  a = block0(x); b = block1(a); return head(b)                     region: block1, cut: b
    After:   (table, moment) row = table[moment[0]]; s = row[0]; t = row[1]; ... as before; cut: b, scale s, shift t

    Refuses: a value without an axis of channels of known size; a table for another number of values or channels.
    """

    corrections: tuple[ScaleShift | None, ...]

    def __call__(self, program: StepProgram) -> StepProgram:
        if not any(self.corrections):
            return program
        result = program.copy()
        nodes, writer = result.named_nodes(), _Writer(result, list(program.inputs), dict(program.constants))
        regions = list(program.regions)
        for rule, correction in enumerate(self.corrections):
            if correction is not None:
                own = [i for i, region in enumerate(regions) if region.rule == rule]
                for index, made in zip(own, writer.rule([regions[i] for i in own], correction, nodes), strict=True):
                    regions[index] = made
        result.graph.lint()
        result.module.recompile()
        return result.replace(inputs=tuple(writer.inputs), constants=writer.constants, regions=tuple(regions))


@dataclass
class _Writer:
    program: StepProgram
    inputs: list[Input]
    constants: dict[str, Tensor]
    moment: fx.Node | None = None

    def rule(self, regions: list[Region], correction: ScaleShift, nodes: dict[str, fx.Node]) -> list[Region]:
        """The regions of one rule, with corrected cuts."""
        values = [(r, i, v) for r in regions for i, v in enumerate(r.cut) if v.dtype.is_floating_point]
        examples = [value_of(nodes[value.node]) for _, _, value in values]
        axes = [channel_axis(example) for example in examples]
        sizes = [None if axis is None else e.shape[axis] for e, axis in zip(examples, axes, strict=True)]
        for (region, _, value), size in zip(values, sizes, strict=True):
            if not isinstance(size, int):
                raise RegionError(
                    f"region {region.name!r} hands on {value.node}, which has no channels of a known number: it cannot "
                    "be scaled and shifted by channel; use a rule without correction"
                )
        tables = correction.tables() or tuple(identity(correction.steps, size) for size in sizes if size is not None)
        if [table.shape[2] for table in tables] != sizes:
            raise RegionError(
                f"the correction is for values of {_list([table.shape[2] for table in tables])} channels, and the "
                f"regions of its rule hand on values of {_list(sizes)}: fit it again for this model and these regions"
            )
        made = {region.name: list(region.cut) for region in regions}
        for (region, index, value), axis, table in zip(values, axes, tables, strict=True):
            assert axis is not None
            made[region.name][index] = self.value(region, index, value, nodes[value.node], axis, table)
        return [dataclasses.replace(region, cut=tuple(made[region.name])) for region in regions]

    def value(self, region: Region, index: int, value: CutValue, node: fx.Node, axis: int, table: Tensor) -> CutValue:
        graph, device = self.program.graph, value.device
        if self.moment is None:
            self.moment = placeholder(graph, "moment", (2,), torch.float32, device)
            self.inputs.append(Input(InputKind.MOMENT, self.moment.name, TARGET))
        held = placeholder(graph, constant_name(region.name, index), table.shape, torch.float32, device)
        self.inputs.append(Input(InputKind.CONSTANT, held.name, held.name))
        self.constants[held.name] = table.to(device)
        shape, last = [1] * value_of(node).dim(), len(table) - 1
        shape[axis] = table.shape[2]

        def look_up(given: list[Tensor]) -> tuple[Tensor, Tensor]:
            table, moment = given
            step = moment[0].clamp(0, last).to(torch.int64).reshape(1)
            # Looked up apart: operands of a conditional must not share memory.
            scale, shift = (table[:, kind].index_select(0, step) for kind in range(2))
            return scale.reshape(shape), shift.reshape(shape)

        first = next(n for n in graph.nodes if n.op != "placeholder")
        with graph.inserting_before(first):
            scale, shift = inline(graph, look_up, [held, self.moment])
        return dataclasses.replace(value, scale=scale.name, shift=shift.name)


def constant_name(region: str, index: int) -> str:
    """What the table of a cut value is called among the constants of a program."""
    return f"correction_{safe(region)}_{index}"


def _list(sizes: list[int | None]) -> str:
    return ", ".join(str(size) for size in sizes[:6]) + (", ..." if len(sizes) > 6 else "")


def identity(steps: int, channels: int) -> Tensor:
    """The table that changes nothing, [steps, 2, channels]."""
    return torch.tensor([1.0, 0.0]).reshape(1, 2, 1).repeat(steps, 1, channels)


def channel_axis(value: object) -> int | None:
    """Where a value's channels lie: the second axis of images and videos, the last of anything else; None for a value
    of fewer than two axes."""
    if not isinstance(value, torch.Tensor) or value.dim() < 2:
        return None
    return 1 if value.dim() >= 4 else value.dim() - 1


def corrected(graph: fx.Graph, filled: fx.Node, value: CutValue, scale: fx.Node, shift: fx.Node) -> fx.Node:
    """scale * filled + shift, in float32, in the dtype of the value."""
    wide = call(graph, torch.ops.aten._to_copy.default, filled, dtype=torch.float32)
    moved = call(graph, torch.ops.aten.mul.Tensor, wide, scale)
    moved = call(graph, torch.ops.aten.add.Tensor, moved, shift)
    return call(graph, torch.ops.aten._to_copy.default, moved, dtype=value.dtype)
