"""The comparison with peers: their decisions can be forced, they then compute what this library does, and a peer that
cannot run says why."""

from __future__ import annotations

import functools
import importlib.util
import io
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiTTransformer2DModel
from rich.console import Console
from torch import Tensor

from bench.peer_cache_dit import CacheDiT, DBCache, DBCacheStatic, DBCacheTaylorSeer
from bench.peer_contenders import Contender, NotRun, Plan, Uncached, held_bytes
from bench.peer_diffusers import FirstBlockCache, MagCache, PyramidAttentionBroadcast, TaylorSeer
from bench.peer_ours import (
    OursAttention,
    OursDBCache,
    OursFirstBlock,
    OursFirstBlockCache,
    OursFirstBlockLine,
    OursMagCache,
    OursPAB,
    OursSublayers,
    OursTaylorSeer,
    OursTrunk,
)
from bench.peer_table import Row, described, left_out, loaded, markdown, plain, terminal, timed
from bench.peer_worker import Stepping, prepare
from bench.peer_workloads import Subject
from bench.peers import kept, write
from diffcache_fx.measure import Ratio, Timings, relative_error

PLAN = Plan(9)
needs_cache_dit = pytest.mark.skipif(
    importlib.util.find_spec("cache_dit") is None, reason="cache-dit is not installed: pip install '.[peers]'"
)


@pytest.fixture(scope="module")
def work() -> Subject:
    """Four blocks of width 16 on 16 tokens; a generation adds up its outputs."""
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=1, num_layers=4, sample_size=8, num_embeds_ada_norm=4
    )
    model.eval().requires_grad_(False)
    labels = torch.tensor([0, 4])

    @torch.no_grad()
    def generate(denoiser: Callable[..., Any], turn: int) -> Tensor:
        state = torch.randn((2, 1, 8, 8), generator=torch.Generator().manual_seed(turn))
        for step in range(PLAN.steps):
            moment = torch.full((2,), 900 - 100 * step)
            state = state - 0.1 * denoiser(state, timestep=moment, class_labels=labels).sample
        return state

    example = (torch.zeros(2, 1, 8, 8),), {"timestep": torch.full((2,), 900), "class_labels": labels}
    return Subject("tiny", model, example, generate, lambda outputs, reference: {})


@functools.cache
def generation(kind: type[Contender], work: Subject) -> tuple[Tensor, dict[str, Any]]:
    """What a contender makes in its second generation, and the facts of its first."""
    contender, facts = prepare(kind, work, PLAN, "eager")
    return work.generate(Stepping(contender), 0), dict(facts)


def check_equal(kind: type[Contender], ours: type[Contender], work: Subject) -> None:
    """Forced to the plan, a peer does what this library's schedule for the same values does, in as many FLOPs."""
    made, facts = generation(kind, work)
    expected, own = generation(ours, work)
    assert tuple(facts["bits"]) == tuple(own["bits"]) == PLAN.bits
    assert relative_error(made, expected) < 1e-5
    assert facts["flops"] == own["flops"]
    assert relative_error(made, work.generate(Stepping(Uncached(work.model, PLAN)), 0)) > 1e-4, "nothing was reused"
    assert facts["held"] >= own["held"] > 0


def test_plan() -> None:
    assert Plan(9).bits == (1, 1, 1, 0, 0, 1, 0, 0, 1)
    assert Plan(5, every=2, warm_up=1).bits == (1, 0, 1, 0, 1)


@pytest.mark.parametrize(
    ("kind", "ours"),
    [
        (FirstBlockCache, OursFirstBlock),
        (MagCache, OursTrunk),
        (TaylorSeer, OursSublayers),
        (PyramidAttentionBroadcast, OursAttention),
    ],
)
def test_hooks_of_diffusers_follow_the_plan(kind: type[Contender], ours: type[Contender], work: Subject) -> None:
    check_equal(kind, ours, work)


@pytest.mark.parametrize(
    ("kind", "ours"),
    [
        (OursFirstBlockCache, OursFirstBlock),
        (OursDBCache, OursFirstBlockLine),
        (OursTaylorSeer, OursSublayers),
        (OursMagCache, OursTrunk),
        (OursPAB, OursAttention),
    ],
)
def test_methods_of_this_library_follow_the_plan(kind: type[Contender], ours: type[Contender], work: Subject) -> None:
    check_equal(kind, ours, work)


@needs_cache_dit
@pytest.mark.parametrize("kind", [DBCache, DBCacheStatic])
def test_cache_dit_follows_the_plan(kind: type[CacheDiT], work: Subject) -> None:
    check_equal(kind, OursFirstBlock, work)


@needs_cache_dit
def test_cache_dit_taylorseer_follows_the_plan(work: Subject) -> None:
    _, facts = generation(DBCacheTaylorSeer, work)
    assert tuple(facts["bits"]) == PLAN.bits


@needs_cache_dit
def test_signals_that_are_read_are_counted(work: Subject) -> None:
    """One read for each step whose signal decides, and none where a plan or numbers of the host do."""

    def reads(kind: type[Contender]) -> tuple[int, int]:
        facts = generation(kind, work)[1]
        return facts["reads"], facts["every_read"]

    reused = PLAN.steps - sum(PLAN.bits)
    assert reads(Uncached) == reads(DBCacheStatic) == (0, 0)
    assert reads(FirstBlockCache) == (PLAN.steps - 1, PLAN.steps - 1)
    assert reads(DBCache) == (reused, reused)
    assert reads(MagCache)[0] == 0 < reads(MagCache)[1]
    assert reads(OursFirstBlock)[0] == 0 < reads(OursFirstBlockCache)[0] <= PLAN.steps


def test_weights_are_shared_and_the_model_is_left_alone(work: Subject) -> None:
    contender, _ = prepare(FirstBlockCache, work, PLAN, "eager")
    assert all(a is b for a, b in zip(contender.model.parameters(), work.model.parameters(), strict=True))
    assert not any(hasattr(module, "_diffusers_hook") for module in work.model.modules())


def test_held_bytes_count_each_storage_once() -> None:
    whole, model = torch.zeros(10), torch.nn.Linear(2, 2)
    assert held_bytes([{"a": [whole, whole[:3]], "b": (torch.zeros(4),)}, model, 3]) == 4 * 14
    assert held_bytes([whole], {whole.untyped_storage().data_ptr()}) == 0


def rows_of(work: Subject, kinds: list[type[Contender]]) -> list[Row]:
    """Rows with made-up seconds; what cannot run is left out."""
    facts, rows = {}, []
    for kind in kinds:
        try:
            facts[kind.name] = generation(kind, work)[1]
        except NotRun as reason:
            rows.append(left_out(kind, "eager", str(reason)))
    seconds = {f"{name} eager": np.array([1.0, 2.0, 3.0]) / (1 + place) for place, name in enumerate(facts)}
    timings = Timings(seconds, "uncached eager")
    for kind in kinds:
        if kind.name in facts:
            own = facts[kind.name]
            row = described(kind, "eager", PLAN, own, own, facts["uncached"])
            rows.append(timed(row, timings, {"error": 0.5}, None))
    return rows


def test_a_missing_peer_says_so_and_the_rest_goes_on(work: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    class Absent(DBCache):  # a class of its own: another test may have run the one it stands for
        pass

    monkeypatch.setitem(sys.modules, "cache_dit", None)
    rows = rows_of(work, [Uncached, FirstBlockCache, Absent, OursFirstBlock])
    lost = next(row for row in rows if row.name == DBCache.name)
    assert lost.why.startswith("not run: cache-dit cannot be imported here")
    console = Console(file=io.StringIO(), width=220)
    console.print(terminal("tiny", rows))
    assert "not run: cache-dit" in console.file.getvalue()  # type: ignore[attr-defined]
    assert f"| {DBCache.name} | eager | not run: cache-dit" in markdown("tiny", rows)
    data = json.loads(json.dumps([plain(row) for row in rows]))
    assert [entry["why"][:8] for entry in data] == ["not run:", "", "", ""]


def test_figures_of_a_row(work: Subject) -> None:
    rows = {row.name: row for row in rows_of(work, [Uncached, FirstBlockCache, OursFirstBlock])}
    peer = rows[FirstBlockCache.name]
    assert peer.to_ours is not None
    assert (peer.seconds, peer.to_ours.value) == (1.0, pytest.approx(1.5))
    assert peer.speedup is not None
    assert peer.speedup.value == pytest.approx(2.0)
    assert peer.share is not None
    assert peer.share.value == pytest.approx(2.0 / peer.ideal)
    assert 1.4 < peer.ideal < 1.5  # 5 steps in full, 4 with one block of four
    assert peer.adapter_lines > rows[OursFirstBlock.name].adapter_lines > 0


def test_other_decisions_are_marked(work: Subject) -> None:
    class Wayward(FirstBlockCache):
        def force(self, step: int) -> None:
            self.found()[0].threshold = -1.0

    row = rows_of(work, [Uncached, Wayward])[1]
    assert not row.decisions_equal
    assert f"{PLAN.steps} ≠" in markdown("tiny", [row])
    assert "≠" not in markdown("tiny", [replace(row, decisions_equal=True)])


def test_the_other_model_of_an_earlier_run_stays(tmp_path: Path) -> None:
    ratio = Ratio(2.0, 1.9, 2.1)
    rows = [Row("a", "b", "c", "eager", seconds=1.0, speedup=ratio, share=ratio), left_out(Uncached, "eager", "gone")]
    made_with = {"versions": {"torch": "2"}, "rounds": 3}
    path = tmp_path / "peers.json"
    assert kept(path, made_with) == {}
    write(path, {**made_with, "models": {"digits": {"title": "the digits", "rows": [plain(row) for row in rows]}}})
    known = kept(path, made_with)
    assert [loaded(row) for row in known["digits"]["rows"]] == rows
    assert kept(path, {**made_with, "rounds": 5}) == {}
    blocks = {"title": "the blocks", "rows": [plain(rows[1])]}
    write(path, {**made_with, "models": {"blocks28": blocks, **known}})
    assert list(json.loads(path.read_text())["models"]) == ["digits", "blocks28"]
    sheet = path.with_suffix(".md").read_text()
    assert sheet.index("the digits") < sheet.index("the blocks")
    assert "not run: gone" in sheet
