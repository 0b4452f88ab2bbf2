"""MeasureChanges: the full step also tells how the values of its regions change, for calibration."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from diffcache_fx.errors import RegionError
from diffcache_fx.program import Input, InputKind, Output, OutputKind, StepProgram, output_node, returned
from diffcache_fx.references import Reference

from .emit import history_target, placeholder, safe, set_outputs
from .inline import inline
from .reach import latent_input
from .references import References

QUANTITY = "quantity"


@dataclass(frozen=True)
class MeasureChanges:
    """Add to a program that refreshes all regions what calibration records of each cut value F, against each of the
    past values H in its history.

    width: of the sketches, best a prime. quantities: reference quantities of guards that are measured against the step
    before; those that the model does not have are left out.

    For each value, outputs of kind SIGNAL, "region/index/NAME", float32:
        change [slots]: mean |F - H|. size []: mean |F|. growth [slots]: mean over the last axis of |F| / |H|.
        sketch [samples, width]: sums of F's elements with random signs (count sketch; Charikar, Chen, Farach-Colton,
        2002), linear in F, so that norms of any weighted sum of values are those of sketches up to a relative error of
        about 1 / sqrt(width). One for each sample where the first axis is the batch, else one.
    For each quantity, "quantity/NAME/change" and "quantity/NAME/size" [], and the quantity itself as an output and an
    input of kind MEMORY, "quantity/NAME".

    Before:  ...; return head(b), b                          region: block1, cut: b
    After:   (h0, h1) ...; return head(b), b, [mean|b - h0|, mean|b - h1|], mean|b|, ..., sketch(b)

    Rules:
    1. The program refreshes all regions (Specialize with none reused); sizes are known.
    2. What is measured flows nowhere else: the model's outputs stay as they are.
    """

    width: int = 251
    quantities: tuple[tuple[str, Reference], ...] = ()

    def __call__(self, program: StepProgram) -> StepProgram:
        if program.reused or not any(output.kind is OutputKind.STATE for output in program.outputs):
            raise RegionError("only a program that refreshes all of its regions is measured: Specialize it with none")
        return _Writer(program, self).run()


class _Writer:
    def __init__(self, program: StepProgram, options: MeasureChanges) -> None:
        self.program, self.options = program, options
        self.result = program.copy()
        self.graph = self.result.graph
        self.inputs, self.outputs = list(program.inputs), list(program.outputs)
        self.values: list[fx.Node] = list(returned(self.graph))
        self.constants = dict(program.constants)
        self.signs: dict[int, fx.Node] = {}
        latents = latent_input(program)
        self.batch = int(latents.meta["val"].shape[0]) if latents is not None else 1

    def run(self) -> StepProgram:
        for node, output in zip(list(self.values), list(self.outputs), strict=True):
            if output.kind is OutputKind.STATE:
                self._cut_value(node, output.target)
        for name, reference in self.options.quantities:
            self._quantity(name, reference)
        set_outputs(self.graph, self.values)
        self.graph.lint()
        self.result.module.recompile()
        return self.result.replace(inputs=tuple(self.inputs), outputs=tuple(self.outputs), constants=self.constants)

    def _cut_value(self, node: fx.Node, target: str) -> None:
        name, _, index = target.rpartition("/")
        cut = self.program.region(name).cut[int(index)]
        past = {}
        for slot in range(cut.slots):
            entry = placeholder(self.graph, f"h_{safe(name)}_{index}_{slot}", cut.shape, cut.dtype, cut.device)
            self.inputs.append(Input(InputKind.HISTORY, entry.name, history_target(name, int(index), slot)))
            past[str(slot)] = entry
        if not cut.dtype.is_floating_point:  # masks, say
            return
        shape = node.meta["val"].shape
        samples = self.batch if len(shape) > 1 and shape[0] == self.batch else 1
        signs = self._signs(math.prod(shape) // samples, cut.device)
        width = self.options.width

        def measure(value: dict[str, Tensor], past: dict[str, Tensor]) -> dict[str, Tensor]:
            now = value["now"].float()
            before = [entry.float() for entry in past.values()]
            return {
                "change": torch.stack([(now - entry).abs().mean() for entry in before]),
                "size": now.abs().mean(),
                "growth": torch.stack([_growth(now, entry) for entry in before]),
                "sketch": _sketch(now.reshape(samples, -1), value["signs"], width),
            }

        self._measured(target, inline_at_end(self.graph, measure, {"now": node, "signs": signs}, past))

    def _signs(self, count: int, device: torch.device) -> fx.Node:
        """+1 and -1 at random, as many as a sample has elements, padded with zeros to whole rows of the sketch."""
        if count not in self.signs:
            width = self.options.width
            padded = -(-count // width) * width
            table = torch.randint(0, 2, (padded,), generator=torch.Generator().manual_seed(count), dtype=torch.int8)
            table = (2 * table - 1).to(device)
            node = placeholder(self.graph, f"signs_{count}", table.shape, table.dtype, device)
            self.constants[node.name] = table
            self.inputs.append(Input(InputKind.CONSTANT, node.name, node.name))
            self.signs[count] = node
        return self.signs[count]

    def _quantity(self, name: str, reference: Reference) -> None:
        try:
            found, base = References(self.program).find(reference)
        except RegionError:
            return
        nodes = self.result.named_nodes()
        value = {"now": nodes[found.name]} | ({"base": nodes[base.name]} if base is not None else {})
        example = value["now"].meta["val"]
        kept = placeholder(self.graph, f"kept_{safe(name)}", example.shape, torch.float32, example.device)
        target = f"{QUANTITY}/{name}"
        self.inputs.append(Input(InputKind.MEMORY, kept.name, target))

        def measure(value: dict[str, Tensor], past: dict[str, Tensor]) -> dict[str, Tensor]:
            now = value["now"].float() - (value["base"].float() if "base" in value else 0.0)
            return {"change": (now - past["kept"]).abs().mean(), "size": now.abs().mean(), "value": now.contiguous()}

        measured = inline_at_end(self.graph, measure, value, {"kept": kept})
        self.values.append(measured.pop("value"))
        self.outputs.append(Output(OutputKind.MEMORY, target))
        self._measured(target, measured)

    def _measured(self, target: str, found: dict[str, fx.Node]) -> None:
        for name, node in found.items():
            self.values.append(node)
            self.outputs.append(Output(OutputKind.SIGNAL, f"{target}/{name}"))


def inline_at_end(graph: fx.Graph, function: object, *arguments: dict[str, fx.Node]) -> dict[str, fx.Node]:
    with graph.inserting_before(output_node(graph)):
        return inline(graph, function, *arguments)  # type: ignore[arg-type, no-any-return]


def _growth(now: Tensor, before: Tensor) -> Tensor:
    """Mean over the last axis' vectors of |now| / |before|."""
    norms = [value.norm(dim=-1) if value.dim() else value.abs() for value in (now, before)]
    return (norms[0] / norms[1].clamp_min(torch.finfo(torch.float32).tiny)).mean()


def _sketch(rows: Tensor, signs: Tensor, width: int) -> Tensor:
    """Each row's elements times their signs, folded to `width` sums."""
    padded = torch.nn.functional.pad(rows, (0, len(signs) - rows.shape[1]))
    return (padded * signs).reshape(len(rows), -1, width).sum(1)
