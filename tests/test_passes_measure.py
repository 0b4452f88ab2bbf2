"""MeasureChanges: the full step tells how its regions change."""

from __future__ import annotations

import pytest
import torch
from diffcache_fx.passes.measure import MeasureChanges
from diffcache_fx.passes.specialize import Specialize
from torch import nn

from diffcache_fx.compile import run_passes
from diffcache_fx.errors import RegionError
from diffcache_fx.parameters import Parameters
from diffcache_fx.program import InputKind, OutputKind, StepProgram
from diffcache_fx.references import ModelOutput, ModulatedInput
from diffcache_fx.selection import Trunk

from .conftest import captured, equal, text, with_regions

pytestmark = pytest.mark.usefixtures("one_thread")
X, T = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)), torch.tensor(0.5)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.inner(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = x * timestep
        for block in self.blocks:
            x = block(x)
        return x


MODEL = Model().eval()
MEASURE = MeasureChanges(16, (("output", ModelOutput()), ("modulated_input", ModulatedInput())))


@pytest.fixture(scope="module")
def refreshing() -> StepProgram:
    program = with_regions(captured(MODEL, X, T), Trunk(first=1), storage="residual", slots=2)
    return run_passes(program, (Specialize(frozenset()),))


def told(program: StepProgram, past: list[torch.Tensor], output: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a run of the program measures, and its other outputs, by target."""
    given, parameters, users = [], Parameters(MODEL), iter((X, T))
    for entry in program.inputs:
        if entry.kind is InputKind.HISTORY:
            given.append(past[int(entry.target.rsplit("/", 1)[1])])
        elif entry.kind is InputKind.MEMORY:
            given.append(output)
        elif entry.kind is InputKind.CONSTANT:
            given.append(program.constants[entry.target])
        else:
            given.append(next(users) if entry.kind is InputKind.USER else parameters(entry.target))
    with torch.no_grad():
        results = program.module(*given)
    return {entry.target: value for entry, value in zip(program.outputs, results, strict=True)}


def test_before_and_after(refreshing: StepProgram) -> None:
    before = text(refreshing.graph)
    after = run_passes(refreshing, (MEASURE,))
    assert text(refreshing.graph) == before
    assert before.count("linear(") == text(after.graph).count("linear(") == 3
    signals = [output.target for _, output in after.outputs_of(OutputKind.SIGNAL)]
    region = after.regions[0].name
    assert signals == [
        *(f"{region}/0/{name}" for name in ("change", "size", "growth", "sketch")),
        *(f"quantity/output/{name}" for name in ("change", "size")),  # nothing here is modulated
    ]
    assert len(list(after.inputs_of(InputKind.HISTORY))) == 2


def test_it_measures_and_leaves_the_outputs_alone(refreshing: StepProgram) -> None:
    after = run_passes(refreshing, (MEASURE,))
    region = after.regions[0].name
    with torch.no_grad():
        entered = MODEL.blocks[0](X * T)
        left = MODEL.blocks[2](MODEL.blocks[1](entered))
    value = left - entered
    past, kept = [value + 1, value * 2], left - 0.25
    found = told(after, past, kept)
    assert equal([found["0"]], [left])
    assert torch.allclose(found[f"{region}/0"], value, atol=1e-6)
    change, growth, sketch = (found[f"{region}/0/{name}"] for name in ("change", "growth", "sketch"))
    assert torch.allclose(change, torch.stack([torch.tensor(1.0), value.abs().mean()]), atol=1e-5)
    assert torch.allclose(found[f"{region}/0/size"], value.abs().mean())
    assert float(growth[1]) == pytest.approx(0.5, rel=1e-4)
    assert float(found["quantity/output/change"]) == pytest.approx(0.25, rel=1e-4)
    assert sketch.shape == (2, 16)


def test_sketches_are_linear_and_keep_norms(refreshing: StepProgram) -> None:
    after = run_passes(refreshing, (MeasureChanges(4096),))  # wider than the values: nothing is folded
    region = after.regions[0].name
    found = told(after, [X, X], X)
    value, sketch = found[f"{region}/0"], found[f"{region}/0/sketch"]
    assert torch.allclose(sketch.norm(dim=1), value.flatten(1).norm(dim=1), rtol=1e-4)


def test_refusals(refreshing: StepProgram) -> None:
    program = with_regions(captured(MODEL, X, T), Trunk(first=1))
    for wrong in (program, run_passes(program, (Specialize(frozenset({program.regions[0].name})),))):
        with pytest.raises(RegionError, match="refreshes all of its regions"):
            MEASURE(wrong)
