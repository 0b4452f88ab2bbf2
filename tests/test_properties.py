"""The invariants as properties, on random residual networks and random plans."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffcache_fx.passes.cut import ComputeCut, RuleStorage
from diffcache_fx.passes.flops import program_flops
from diffcache_fx.passes.guard import InsertGuards
from diffcache_fx.passes.regions import SelectRegions
from diffcache_fx.passes.specialize import Specialize
from diffcache_fx.passes.verify import Verify
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from diffcache_fx import (
    CachedDenoiser,
    CacheSchedule,
    Hold,
    Interval,
    Linear,
    Listed,
    Mask,
    Modules,
    Rule,
    compile_with_cache,
)
from diffcache_fx.compile import Captured
from diffcache_fx.plan import Plan, choose_programs
from diffcache_fx.program import InputKind, StepProgram, returned

from .conftest import captured, equal, flat_users, history, hold_rows, run, storages, with_regions, worst

pytestmark = pytest.mark.usefixtures("one_thread")


def check(examples: int) -> Callable[[Any], Any]:
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large],
    )


DIM = 6


@dataclass(frozen=True)
class Part:
    """One block: how it computes, which earlier value it also reads (-1: none), and whether it is nested."""

    kind: str  # "residual", "gated", "branches", "cat" (no residual), "wide" (a residual around two layers)
    skip: int = -1
    nested: bool = False


@dataclass(frozen=True)
class Recipe:
    parts: tuple[Part, ...]
    outputs: tuple[str, ...] = ("head",)
    seed: int = 0


class RandomBlock(nn.Module):
    def __init__(self, part: Part) -> None:
        super().__init__()
        self.part = part
        self.first = nn.Linear(2 * DIM if part.kind == "cat" else DIM, DIM)
        self.second = nn.Linear(DIM, DIM)
        self.norm = nn.LayerNorm(DIM)
        self.inner = nn.ModuleList(nn.Sequential(nn.Linear(DIM, DIM), nn.Tanh()) for _ in range(2 * part.nested))

    def forward(self, h: torch.Tensor, emb: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
        kind = self.part.kind
        x = self.norm(h) + emb[:, None]
        for layer in self.inner:
            x = layer(x)
        if kind == "cat":
            return torch.tanh(self.first(torch.cat([x, skip], dim=-1)))
        if kind == "gated":
            return h + torch.sigmoid(emb[:, None]) * self.first(x * skip.mean())
        if kind == "branches":
            return h + (self.first(x).chunk(2, dim=-1)[0].repeat(1, 1, 2) + torch.tanh(self.second(skip)))
        if kind == "wide":
            return h + self.second(torch.relu(self.first(x)))
        return h + self.first(torch.tanh(x))


Step = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class RandomNet(nn.Module):
    """Blocks in nested containers, reading earlier values, with one or several outputs of several shapes."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.seed)
            self.enter = nn.Linear(3, DIM)
            self.time = nn.Linear(2, DIM)
            self.blocks = nn.ModuleList(RandomBlock(part) for part in recipe.parts)
            self.head = nn.Linear(DIM, 3)
        self.eval()

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> Any:
        return self.walk(x, t, lambda i, h, emb, skip: self.blocks[i](h, emb, skip))

    def walk(self, x: torch.Tensor, t: torch.Tensor, step: Step) -> Any:
        """The forward pass with another way of running block i."""
        angle = t[:, None] * 0.01
        emb = self.time(torch.cat([torch.sin(angle), torch.cos(angle)], dim=-1))
        h = self.enter(x)
        seen = [h]
        for i, part in enumerate(self.recipe.parts):
            h = step(i, h, emb, seen[part.skip % len(seen)] if part.skip >= 0 else seen[0])
            seen.append(h)
        results: dict[str, Any] = {}
        for name in self.recipe.outputs:
            if name == "head":
                results[name] = self.head(h)
            elif name == "features":
                results[name] = h[:, 1:]
            elif name == "middle":
                results[name] = seen[len(seen) // 2]
            else:
                results[name] = (h.mean(dim=1), seen[-1].transpose(1, 2))
        return results


KINDS = ("residual", "gated", "branches", "cat", "wide")


@st.composite
def recipes(draw: st.DrawFn, kinds: tuple[str, ...] = KINDS, least: int = 3) -> Recipe:
    count = draw(st.integers(least, 6))
    parts = tuple(
        Part(draw(st.sampled_from(kinds)), draw(st.integers(-1, count)), draw(st.booleans())) for _ in range(count)
    )
    more = draw(st.lists(st.sampled_from(["features", "middle", "pair"]), max_size=3, unique=True))
    return Recipe(parts, ("head", *more), draw(st.integers(0, 3)))


def inputs(seed: int, t: float = 500.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 4, 3, generator=generator), torch.full((2,), t)


@st.composite
def groupings(draw: st.DrawFn, count: int) -> list[list[int]]:
    """Disjoint groups of blocks; a group may have gaps, so that its region need not be convex."""
    owner = draw(st.lists(st.integers(0, 3), min_size=count, max_size=count).filter(lambda o: any(o)))
    return [[i for i in range(count) if owner[i] == group] for group in (1, 2, 3) if group in owner]


def listed(groups: list[list[int]]) -> Listed:
    return Listed(tuple(tuple(f"blocks.{i}" for i in group) for group in groups), fill=False)


def leaves(output: Any) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def names_of(program: StepProgram) -> frozenset[str]:
    return frozenset(region.name for region in program.regions)


@check(25)
@given(st.data())
def test_identity_consistency_deadness(data: st.DataObject) -> None:
    recipe = data.draw(recipes())
    groups = data.draw(groupings(len(recipe.parts)))
    storage, slots = data.draw(st.sampled_from([("value", 1), ("value", 2), ("auto", 1), ("auto", 2)]))
    net = RandomNet(recipe)
    program = with_regions(captured(net, *inputs(0)), listed(groups), storage=storage, slots=slots)
    users = flat_users(net, inputs(0), {}, program)
    with torch.no_grad():
        expected = leaves(net(*inputs(0)))

    refresh = Verify()(Specialize(frozenset())(program))
    full = run(refresh, net, users)
    assert equal(full.outputs, expected)
    assert not storages(full.state.values()) & storages(full.outputs)
    reused = frozenset(data.draw(st.sets(st.sampled_from(sorted(names_of(program))), min_size=1)))
    reuse = Verify()(Specialize(reused)(program))
    again = run(reuse, net, users, history(program, full.state), hold_rows(program))
    if (storage, slots) == ("value", 1):
        assert equal(again.outputs, expected)
    else:
        assert worst(again.outputs, expected) < 1e-4
    assert not storages(again.outputs) & storages(full.state.values())

    gone = {node for region in program.regions if region.name in reused for node in region.nodes}
    assert not gone & {node.name for node in reuse.graph.nodes}
    read = {entry.target for entry in reuse.inputs if entry.kind is InputKind.PARAMETER}
    assert read == parameters_needed(program, reused)
    assert program_flops(reuse) < program_flops(refresh)


def parameters_needed(program: StepProgram, reused: frozenset[str]) -> set[str]:
    """By walking back from outputs and kept state, stopping at the cuts of reused regions."""
    nodes = program.named_nodes()
    cuts = {value.node: value for r in program.regions if r.name in reused for value in r.cut}
    stack = list(returned(program.graph))
    for region in program.regions:
        if region.name not in reused:
            stack += [nodes[value.node] for value in region.cut]
            stack += [nodes[value.base] for value in region.cut if value.base is not None]
    seen = set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        cut = cuts.get(node.name)
        if cut is None:
            stack.extend(node.all_input_nodes)
        elif cut.base is not None:
            stack.append(nodes[cut.base])
    wanted = {node.name for node in seen}
    return {e.target for e in program.inputs if e.kind is InputKind.PARAMETER and e.name in wanted}


@check(15)
@given(st.data())
def test_guarded_programs_agree_with_specialised_ones(data: st.DataObject) -> None:
    recipe = data.draw(recipes())
    net = RandomNet(recipe)
    slots = data.draw(st.integers(1, 2))
    apart = data.draw(st.booleans())
    if apart:  # single blocks are convex; decide each on its own
        chosen = sorted(data.draw(st.sets(st.integers(0, len(recipe.parts) - 1), min_size=2)))
        selection: Any = Modules(tuple(f"blocks.{i}" for i in chosen))
    else:
        selection = listed(data.draw(groupings(len(recipe.parts))))
    program = with_regions(captured(net, *inputs(0)), selection, storage="auto", slots=slots)
    names = sorted(names_of(program))
    groups = tuple((region.name,) for region in program.regions) if apart else None
    guarded = Verify()(InsertGuards(groups)(program))
    refreshing = Specialize(frozenset())(program)
    users = flat_users(net, inputs(0), {}, program)
    old = history(program, run(refreshing, net, flat_users(net, inputs(1), {}, program)).state)
    rows = hold_rows(program)
    wanted = [frozenset(names), frozenset()]
    if apart:
        wanted.append(frozenset(data.draw(st.sets(st.sampled_from(names)))))
    for reused in wanted:
        expected = run(Specialize(reused)(program), net, users, old, rows)
        predicates = {
            entry.target: entry.target not in reused for entry in guarded.inputs if entry.kind is InputKind.PREDICATE
        }
        got = run(guarded, net, users, old, rows, predicates)
        assert equal(got.outputs, expected.outputs)
        for region in program.regions:
            for index, value in enumerate(region.cut):
                key = f"{region.name}/{index}"
                kept = [old[f"{key}/{slot}"] for slot in range(value.slots)]
                if region.name not in reused:
                    kept = [expected.state[key], *kept[:-1]]
                assert all(torch.equal(got.state[f"{key}/{slot}"], kept[slot]) for slot in range(value.slots))
        assert not storages(got.state.values()) & storages([*got.outputs, *old.values()])


# --- plans, and the driver ---


def reference(net: RandomNet, rows: list[set[int]], calls: list[Any], linear: bool, residual: set[int]) -> list[Any]:
    """The plan in plain Python: at each step, blocks in the row are continued from their history, others computed."""
    past: dict[int, list[tuple[float, torch.Tensor]]] = {}
    outputs = []
    for number, (reused, call) in enumerate(zip(rows, calls, strict=True)):

        def step(
            i: int, h: torch.Tensor, emb: torch.Tensor, skip: torch.Tensor, reused: set[int] = reused, now: int = number
        ) -> torch.Tensor:
            if i not in reused:
                value = net.blocks[i](h, emb, skip)
                past[i] = [(float(now), value - h if i in residual else value), *past.get(i, [])][:2]
                return value
            (position, newest), *older = past[i]
            if linear and older:
                before, oldest = older[0]
                newest = newest + (now - position) / (position - before) * (newest - oldest)
            return h + newest if i in residual else newest

        with torch.no_grad():
            outputs.append(leaves(net.walk(*call, step)))
    return outputs


@st.composite
def plans(draw: st.DrawFn, regions: int) -> tuple[tuple[bool, ...], ...]:
    steps = draw(st.integers(2, 7))
    row = st.lists(st.booleans(), min_size=regions, max_size=regions).map(tuple)
    rows = draw(st.lists(row, min_size=steps - 1, max_size=steps - 1))
    return ((True,) * regions, *rows)  # type: ignore[return-value]


def generation(cached: CachedDenoiser, calls: list[Any]) -> list[list[torch.Tensor]]:
    with torch.no_grad():
        return [[value.clone() for value in leaves(cached(*call))] for call in calls]


@check(18)
@given(st.data())
def test_the_driver_does_what_the_plan_says(data: st.DataObject) -> None:
    residual = data.draw(st.booleans())
    recipe = data.draw(recipes(kinds=("residual", "wide", "gated") if residual else KINDS))
    chosen = sorted(data.draw(st.sets(st.integers(0, len(recipe.parts) - 1), min_size=1)))
    linear = data.draw(st.booleans())
    bits = data.draw(plans(len(chosen)))
    cap = data.draw(st.sampled_from([None, 1, 2, 3]))
    net = RandomNet(recipe)
    rule = Rule(
        Modules(tuple(f"blocks.{i}" for i in chosen)),
        Mask(bits),
        Linear() if linear else Hold(),
        "residual" if residual else "value",
    )
    schedule = CacheSchedule(rules=(rule,))
    calls = [inputs(step, 900.0 - 100 * step) for step in range(len(bits))]
    cached = compile_with_cache(
        net, schedule, backend="eager", num_steps=len(bits), max_programs=cap, example_inputs=(calls[0], {})
    )
    got = generation(cached, calls)
    taken = [{int(name.split(".")[1]) for name in d.reused} for d in cached.stats().decisions]
    planned = [{chosen[j] for j, bit in enumerate(row) if not bit} for row in bits]
    assert all(ours <= plan for ours, plan in zip(taken, planned, strict=True))
    if cap is None:
        assert taken == planned
    elif len({frozenset(row) for row in planned} | {frozenset()}) > cap:
        assert len({frozenset(row) for row in taken}) <= cap
    compiled = len(cached._captured()._lowered)  # type: ignore[union-attr]
    assert cap is None or compiled <= cap

    expected = reference(net, taken, calls, linear, set(chosen) if residual else set())
    for ours, theirs in zip(got, expected, strict=True):
        assert worst(ours, theirs) < 1e-4

    second = generation(cached, calls)
    assert all(equal(a, b) for a, b in zip(got, second, strict=True))
    if cap is None:
        graph = compile_with_cache(net, schedule, backend="eager", num_steps=len(bits), decide="graph")
        for ours, theirs in zip(generation(graph, calls), got, strict=True):
            assert worst(ours, theirs) < 1e-5
        assert [d.reused for d in graph.stats().decisions] == [d.reused for d in cached.stats().decisions]


@check(8)
@given(st.data())
def test_host_and_graph_decide_alike_over_groups(data: st.DataObject) -> None:
    """Rules with intervals of their own: the regions of one rule share a decision."""
    recipe = data.draw(recipes(least=4))
    net = RandomNet(recipe)
    half = len(recipe.parts) // 2
    forecast = data.draw(st.sampled_from([Hold(), Linear()]))
    rules = []
    for low, high in ((0, half), (half, len(recipe.parts))):
        patterns = tuple(f"blocks.{i}" for i in range(low, high))
        rules.append(Rule(Modules(patterns), Interval(data.draw(st.integers(1, 4))), forecast, "auto"))
    limit = data.draw(st.sampled_from([None, 1, 2]))
    schedule = CacheSchedule(rules=tuple(rules), warm_up=data.draw(st.integers(1, 3)), longest_reuse=limit)
    calls = [inputs(step, 900.0 - 100 * step) for step in range(8)]
    host = compile_with_cache(net, schedule, backend="eager", max_programs=None)
    graph = compile_with_cache(net, schedule, backend="eager", decide="graph")
    for ours, theirs in zip(generation(graph, calls), generation(host, calls), strict=True):
        assert worst(ours, theirs) < 1e-5
    assert [d.reused for d in graph.stats().decisions] == [d.reused for d in host.stats().decisions]
    rows = Plan(schedule, Captured(net, schedule, host._own["options"], calls[0], {}).program.regions).rows()
    assert [frozenset(d.reused) for d in host.stats().decisions] == rows[:8]


@check(60)
@given(st.data())
def test_merging_rows_only_ever_refreshes_more(data: st.DataObject) -> None:
    names = [f"r{i}" for i in range(data.draw(st.integers(1, 5)))]
    weight = {name: float(data.draw(st.integers(0, 100))) for name in names}
    rows = data.draw(st.lists(st.sets(st.sampled_from(names)).map(frozenset), min_size=1, max_size=20))
    cap = data.draw(st.sampled_from([None, 1, 2, 3, 4]))
    choice = choose_programs(rows, weight, sum(weight.values()) + 10, cap)
    assert frozenset() in choice.programs
    assert len(set(choice.programs)) == len(choice.programs)
    distinct = set(rows) | {frozenset()}
    assert cap is None or len(choice.programs) <= cap
    if cap is None or len(distinct) <= cap:
        assert set(choice.programs) == distinct
        assert choice.extra == 0.0
    for row in rows:
        served = choice.serve(row, weight)
        assert served <= row
        assert all(
            sum(map(weight.__getitem__, served)) >= sum(map(weight.__getitem__, program))
            for program in choice.programs
            if program <= row
        )
    spent = sum(sum(weight.values()) + 10 - sum(map(weight.__getitem__, row)) for row in rows)
    merged = sum(sum(weight.values()) + 10 - sum(map(weight.__getitem__, choice.serve(row, weight))) for row in rows)
    assert merged <= spent * (1 + choice.extra) + 1e-6


@check(15)
@given(st.data())
def test_a_cut_is_never_larger_than_the_boundary(data: st.DataObject) -> None:
    recipe = data.draw(recipes())
    net = RandomNet(recipe)
    storage = data.draw(st.sampled_from(["value", "auto"]))
    raw = captured(net, *inputs(0))
    bare = SelectRegions((listed(data.draw(groupings(len(recipe.parts)))),))(raw)
    cut = ComputeCut((RuleStorage(storage, 1),))(bare)
    nodes = bare.named_nodes()
    for before, after in zip(bare.regions, cut.regions, strict=True):
        boundary = [nodes[name] for name in before.nodes if any(u.name not in before.nodes for u in nodes[name].users)]
        limit = sum(math.prod(node.meta["val"].shape) * node.meta["val"].dtype.itemsize for node in boundary)
        assert sum(value.nbytes for value in after.cut) <= limit
        assert before.nodes <= after.nodes
        # the cut separates the region from the rest: what is used outside is in the cut
        used = {name for name in after.nodes if any(user.name not in after.nodes for user in nodes[name].users)}
        assert used <= {value.node for value in after.cut}
    held = [name for region in cut.regions for name in region.nodes]
    assert len(held) == len(set(held))
