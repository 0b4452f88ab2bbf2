"""DropState: a schedule that never reuses becomes the plain step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffcache_fx.export.manifest import read_manifest
from diffcache_fx.passes.drop_state import DropState
from diffcache_fx.passes.specialize import Specialize

from diffcache_fx import Blocks, compile_with_cache, export, schedules
from diffcache_fx.compile import run_passes
from diffcache_fx.errors import RegionError
from diffcache_fx.program import OutputKind

from .conftest import equal, run, sample, text

pytestmark = pytest.mark.usefixtures("one_thread")
MODEL = "DiTTransformer2DModel"


def test_before_and_after() -> None:
    found = sample(MODEL)
    before = run_passes(found.with_regions(Blocks(first=1, each=True)), (Specialize(),))
    names = [region.name for region in before.regions]
    assert len(names) > 2
    shown = text(before.graph)
    some = run_passes(before, (DropState(frozenset(names[:-1])),))
    assert [o.target for o in some.outputs if o.kind is OutputKind.STATE] == [f"{names[-1]}/0"]
    none = run_passes(before, (DropState(frozenset(names)),))
    assert text(none.graph) == text(found.program.graph)  # the uncached step
    assert text(before.graph) == shown


def test_equal_outputs() -> None:
    found = sample(MODEL)
    before = run_passes(found.with_regions(Blocks(first=1, each=True)), (Specialize(),))
    after = run_passes(before, (DropState(frozenset(region.name for region in before.regions)),))
    users = found.users(1)
    assert equal(run(after, found.module, users).outputs, run(before, found.module, users).outputs)


def test_an_unknown_region() -> None:
    before = run_passes(sample(MODEL).with_regions(Blocks(first=1, each=True)), (Specialize(),))
    with pytest.raises(RegionError, match="no region is called 'nowhere'"):
        DropState(frozenset({"nowhere"}))(before)


def test_an_uncached_export_has_no_state(tmp_path: Path) -> None:
    found = sample(MODEL)
    cached = compile_with_cache(
        found.module, schedules.always(), backend="eager", num_steps=4, example_inputs=(found.args, found.kwargs)
    )
    folder = export.to_onnx(cached, tmp_path / "bundle")
    manifest = read_manifest(folder)
    assert [port.kind for program in manifest.programs.values() for port in program.outputs] == ["user"]
    loaded = export.load_bundle(folder)
    with torch.no_grad():
        torch.testing.assert_close(loaded(*found.args, **found.kwargs)[0], found.reference[0], rtol=1e-4, atol=1e-5)
    assert loaded.stats().reused == 0
