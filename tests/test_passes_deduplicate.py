"""Deduplicate: common subexpressions of finished programs."""

from __future__ import annotations

import pytest
import torch
from diffcache_fx.passes.deduplicate import Deduplicate
from diffcache_fx.passes.normalize import Normalize
from diffcache_fx.passes.specialize import Specialize
from torch import nn

from diffcache_fx import compile_with_cache, schedules
from diffcache_fx.compile import run_passes

from .conftest import captured, equal, run, sample, text

pytestmark = pytest.mark.usefixtures("one_thread")
X, T = torch.randn(2, 3), torch.tensor(0.5)


class Twice(nn.Module):
    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        halves = [torch.chunk(torch.sin(x * t), 1, 0)[0] for _ in range(2)]
        return torch.relu(halves[0]) + torch.neg(halves[1])


class Different(nn.Module):
    """Alike, and not the same."""

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return x + 1, x + 1.0, x + True, torch.relu(x), torch.relu(x), x / 0.0, x / -0.0


def test_before_and_after() -> None:
    program = Normalize()(captured(Twice(), X, T))
    before = text(program.graph)
    assert before.count("sin(") == 2
    after = Deduplicate()(program)
    shown = text(after.graph)
    assert shown.count("sin(") == shown.count("mul(") == 1
    assert "relu" in shown
    assert "neg" in shown
    assert text(program.graph) == before
    assert text(Deduplicate()(after).graph) == shown
    assert equal(run(after, Twice(), [X, T]).outputs, [Twice()(X, T)])


def test_what_only_looks_alike_stays_and_outputs_share_no_memory() -> None:
    after = Deduplicate()(captured(Different(), X, T))
    shown = text(after.graph)
    assert shown.count("relu(") == 2
    outputs = run(after, Different(), [X, T]).outputs
    assert len({output.data_ptr() for output in outputs}) == len(outputs)
    expected = Different()(X, T)
    assert equal(outputs, list(expected))


def test_what_draws_random_numbers_stays() -> None:
    program = captured(Twice(), X, T)
    graph = program.copy().module.graph
    end = next(reversed(graph.nodes))
    with graph.inserting_before(end):
        drawn = [graph.call_function(torch.ops.aten.rand_like.default, (node,)) for node in 2 * [end.args[0][0]]]
        end.args = ((graph.call_function(torch.ops.aten.sub.Tensor, tuple(drawn)),),)
    after = Deduplicate()(program.replace(module=torch.fx.GraphModule(program.module, graph)))
    assert text(after.graph).count("rand_like(") == 2


def test_a_program_that_writes_stays() -> None:
    program = captured(Twice(), X, T)
    graph = program.copy().module.graph
    found = next(node for node in graph.nodes if "sin" in node.name)
    with graph.inserting_after(found):
        graph.call_function(torch.ops.aten.add_.Tensor, (found, 1.0))
    changed = program.replace(module=torch.fx.GraphModule(program.module, graph))
    assert text(Deduplicate()(changed).graph) == text(changed.graph)


def test_blocks_that_embed_the_same_timestep() -> None:
    """The corpus's DiT embeds the timestep in each block; both programs keep one table of sines, bit for bit."""
    found = sample("DiTTransformer2DModel")
    program = found.with_regions(schedules.fora(2).rules[0].regions)
    whole = run_passes(program, (Specialize(),))
    once = Deduplicate()(whole)
    assert text(whole.graph).count("sin(") > text(once.graph).count("sin(") == 1
    users = found.users(1)
    first, second = (run(entry, found.module, users) for entry in (whole, once))
    assert equal(first.outputs, second.outputs)
    assert equal(list(first.state.values()), list(second.state.values()))


def test_the_eager_backend_runs_it() -> None:
    found = sample("DiTTransformer2DModel")
    cached = compile_with_cache(found.module, "fora", backend="eager", example_inputs=(found.args, found.kwargs))
    with torch.no_grad():
        assert equal(list(cached(*found.args, **found.kwargs).values()), found.reference)
