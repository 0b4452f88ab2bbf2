"""CorrectReuse: reused values scaled and shifted by tables of the run's steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from diffcache_fx.passes.correct import CorrectReuse
from diffcache_fx.passes.guard import InsertGuards
from diffcache_fx.passes.specialize import Specialize
from torch import nn

from diffcache_fx import Blocks, CacheSchedule, Mask, Modules, RegionError, Rule, ScheduleError, compile_with_cache
from diffcache_fx.compile import run_passes
from diffcache_fx.correction import ScaleShift
from diffcache_fx.program import InputKind, OutputKind, StepProgram

from .conftest import captured, equal, history, run, text, with_regions

pytestmark = pytest.mark.usefixtures("one_thread")
STEPS = 3
X, T = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)), torch.tensor(0.5)
TABLES = [
    torch.tensor([1.0, 0.0])[:, None] + 0.1 * torch.randn(STEPS, 2, 8, generator=torch.Generator().manual_seed(n))
    for n in range(2)
]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = x * timestep
        for block in self.blocks:
            x = block(x)
        return x


MODEL = Model().eval()


def program(storage: str = "residual", tables: list[torch.Tensor] = TABLES) -> StepProgram:
    base = with_regions(captured(MODEL, X, T), Blocks(first=0, each=True), storage=storage)
    return run_passes(base, (CorrectReuse((ScaleShift.of(tables),)),))


def names(made: StepProgram) -> tuple[str, str]:
    first, second = (region.name for region in made.regions)
    return first, second


def test_the_program_before_and_after() -> None:
    base = with_regions(captured(MODEL, X, T), Blocks(first=1, each=True), storage="residual")
    made = CorrectReuse((ScaleShift.of(TABLES[1:]),))(base)
    assert text(made.graph) == "\n".join(
        [
            "select = select(moment, 0, 0)",
            "clamp = clamp(select, 0, 2)",
            "_to_copy = _to_copy(clamp, dtype=torch.int64)",
            "view = view(_to_copy, [1])",
            "select_1 = select(correction_blocks_1_0, 1, 0)",
            "index_select = index_select(select_1, 0, view)",
            "select_2 = select(correction_blocks_1_0, 1, 1)",
            "index_select_1 = index_select(select_2, 0, view)",
            "view_1 = view(index_select, [1, 1, 8])",
            "view_2 = view(index_select_1, [1, 1, 8])",
            *text(base.graph).split("\n"),
        ]
    )
    (value,) = made.regions[0].cut
    assert (value.scale, value.shift) == ("view_1", "view_2")
    refreshing, plain = (Specialize(frozenset())(entry) for entry in (made, base))
    assert text(refreshing.graph) == text(plain.graph)
    assert refreshing.inputs == plain.inputs


@pytest.mark.parametrize("storage", ["residual", "value"])
@pytest.mark.parametrize("step", [0, 2, 7])
def test_a_reuse_is_scaled_and_shifted_by_the_row_of_its_step(storage: str, step: int) -> None:
    made = program(storage)
    _, second = names(made)
    fresh = run(Specialize(frozenset())(made), MODEL, [X, T]).state
    later = X + 1.0
    reuse = Specialize(frozenset({second}))(made)
    found = run(reuse, MODEL, [later, T], history(made, fresh), step=step).outputs
    with torch.no_grad():
        entering = MODEL.blocks[0](later * T)
    scale, shift = TABLES[1][min(step, STEPS - 1)]
    expected = fresh[f"{second}/0"] * scale + shift + (entering if storage == "residual" else 0.0)
    torch.testing.assert_close(found[0], expected)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("hoist", [False, True])
def test_conditionals_do_the_same(groups: int, hoist: bool) -> None:
    made = program()
    together = names(made)
    parts = (together,) if groups == 1 else tuple((name,) for name in together)
    guarded = run_passes(made, (InsertGuards(parts, None, hoist),))
    state = history(made, run(Specialize(frozenset())(made), MODEL, [X, T]).state)
    predicates = dict.fromkeys((part[0] for part in parts), False)
    found = run(guarded, MODEL, [X + 1.0, T], state, predicates=predicates, step=1).outputs
    expected = run(Specialize(frozenset(together))(made), MODEL, [X + 1.0, T], state, step=1).outputs
    assert equal(found, expected)


def test_no_correction_changes_nothing() -> None:
    base = with_regions(captured(MODEL, X, T), Blocks(first=0, each=True))
    assert CorrectReuse((None,))(base) is base
    rule = Rule(Blocks(first=0, each=True), Mask(((True,), (False,), (False,))), storage="residual")
    plain, identity = (
        compile_with_cache(MODEL, CacheSchedule(rules=entry), backend="eager")
        for entry in (rule, replace(rule, correction=ScaleShift(STEPS)))
    )
    for step in range(STEPS):
        args = X + step, torch.tensor(1.0 - 0.1 * step)
        assert torch.equal(plain(*args), identity(*args))


def test_what_is_reused_beside_what_is_computed() -> None:
    made = program()
    first, second = names(made)
    fresh = run(Specialize(frozenset())(made), MODEL, [X, T]).state
    reuse = Specialize(frozenset({first, second}), compare=True)(made)
    inputs, later = [], X + 1.0
    state = history(made, fresh)
    found = run(reuse, MODEL, [later, T], state, step=1)
    plain = run(Specialize(frozenset({first, second}))(made), MODEL, [later, T], state, step=1)
    assert equal(found.outputs, plain.outputs)
    parameters = dict(MODEL.named_parameters())
    for entry in reuse.inputs:
        if entry.kind is InputKind.USER:
            inputs.append(later if entry.target == "0" else T)
        elif entry.kind is InputKind.HISTORY:
            inputs.append(state[entry.target])
        elif entry.kind is InputKind.CONSTANT:
            inputs.append(reuse.constants[entry.target])
        elif entry.kind is InputKind.MOMENT:
            inputs.append(torch.tensor([1.0, 0.0]))
        else:
            inputs.append(parameters[entry.target])
    with torch.no_grad():
        results = reuse.module(*inputs)
        scale, shift = TABLES[0][1]
        entering = later * T + fresh[f"{first}/0"] * scale + shift  # into the second block, corrected
        computed = MODEL.blocks[1](entering) - entering
    signals = {o.target: r for o, r in zip(reuse.outputs, results, strict=True) if o.kind is OutputKind.SIGNAL}
    moments = signals[f"{second}/0/moments"]
    h, f = fresh[f"{second}/0"].reshape(-1, 8), computed.reshape(-1, 8)
    expected = torch.stack(
        (h.mean(0), f.mean(0), h.var(0, False), ((h - h.mean(0)) * (f - f.mean(0))).mean(0), f.var(0, False))
    )
    torch.testing.assert_close(moments, expected, rtol=1e-4, atol=1e-5)


class TestRefusals:
    def test_tables_of_another_model(self) -> None:
        with pytest.raises(
            RegionError, match="values of 7, 7 channels, and the regions of its rule hand on values of 8"
        ):
            program(tables=[torch.ones(STEPS, 2, 7)] * 2)
        with pytest.raises(RegionError, match="fit it again for this model"):
            program(tables=TABLES[:1])

    def test_a_value_without_channels(self) -> None:
        class Total(nn.Module):
            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return torch.sin(x.sum())

        class Outer(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.total = Total()

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return x * self.total(x)

        base = with_regions(captured(Outer(), X), Modules(("total",)))
        with pytest.raises(RegionError, match="no channels of a known number"):
            CorrectReuse((ScaleShift(STEPS),))(base)

    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            ({"steps": 0}, "whole numbers from 1"),
            ({"steps": 2, "channels": (3,), "data": "AAAAAA=="}, "must be 12 finite numbers"),
            ({"steps": 2, "channels": (3,), "data": "no base64"}, "not base64"),
            ({"steps": 1, "channels": (1,), "data": "AADAfwAAgD8="}, "finite"),
        ],
    )
    def test_data_that_do_not_fit(self, fields: dict[str, object], words: str) -> None:
        with pytest.raises(ScheduleError, match=words):
            ScaleShift(**fields)  # type: ignore[arg-type]

    def test_no_tables(self) -> None:
        with pytest.raises(ScheduleError, match="needs a table"):
            ScaleShift.of([])


def test_tables_survive_the_file() -> None:
    rule = Rule(Blocks(first=0, each=True), storage="residual", correction=ScaleShift.of(TABLES))
    loaded = CacheSchedule.from_json(CacheSchedule(rules=rule).to_json())
    assert loaded == CacheSchedule(rules=rule)
    correction = loaded.rules[0].correction
    assert correction is not None
    assert equal(correction.tables(), TABLES)
