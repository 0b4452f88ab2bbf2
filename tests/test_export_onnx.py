"""ONNX bundles: every form against the denoiser it was exported from, over whole generations in ONNX Runtime."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from diffcache_fx.export.manifest import read_manifest

from bench import exports
from bench.exports import decisions
from diffcache_fx import (
    CachedDenoiser,
    CacheSchedule,
    Interval,
    Linear,
    Rule,
    Sublayers,
    compile_with_cache,
    export,
    schedules,
)
from diffcache_fx.errors import BundleError, CacheError, ExportError
from diffcache_fx.measure import relative_error

from .conftest import sample

pytestmark = [pytest.mark.usefixtures("one_thread")]

# All of the corpus: `python -m bench.exports`.
FEW = ("DiTTransformer2DModel", "UNet2DConditionModel", "FluxTransformer2DModel", "WanTransformer3DModel")
STEPS = 20
# What a schedule is exported as: by form, the schedule and how its decisions are taken.
CASES: dict[str, tuple[CacheSchedule, str]] = {
    "pair": (schedules.interval(3, forecast=Linear()), "host"),
    "branch": (schedules.interval(3, forecast=Linear()), "graph"),
    "split": (schedules.first_block_cache(0.1), "host"),
}


def generation(denoiser: Any, name: str, steps: int = STEPS) -> list[torch.Tensor]:
    """All outputs of a generation with an entry of the corpus."""
    return exports.generation(denoiser, sample(name).entry, steps)


def cached(name: str, schedule: CacheSchedule, decide: Any = "host", steps: int | None = STEPS) -> CachedDenoiser:
    found = sample(name)
    return compile_with_cache(
        found.module,
        schedule,
        backend="eager",
        decide=decide,
        num_steps=steps,
        example_inputs=(found.args, found.kwargs),
    )


@pytest.mark.parametrize(("name", "form"), [(n, f) for n in FEW for f in CASES if not (f == "split" and "UNet" in n)])
def test_a_generation_in_onnx_runtime(name: str, form: str, tmp_path: Path) -> None:
    schedule, decide = CASES[form]
    denoiser = cached(name, schedule, decide)
    expected = generation(denoiser, name)
    taken = decisions(denoiser)
    folder = export.to_onnx(denoiser, tmp_path / "bundle", form)
    loaded = export.load_bundle(folder)
    found = generation(loaded, name)
    assert max(relative_error(a, b) for a, b in zip(found, expected, strict=True)) < 1e-4
    assert decisions(loaded) == taken
    assert any(reused for _, reused in taken)
    check_files(folder, denoiser)


def check_files(folder: Path, denoiser: CachedDenoiser) -> None:
    """What every bundle must be: no path of this machine in it, weights once, as many `If` nodes as explained."""
    manifest = read_manifest(folder)
    home = str(Path(__file__).parents[1]).encode()
    for path in folder.iterdir():
        content = path.read_bytes()
        assert home not in content, path
        assert b"site-packages" not in content, path
        assert b".py" not in content, path
    for program in manifest.programs.values():
        model = onnx.load(folder / program.file, load_external_data=False)
        inner = graphs(model.graph)[1:]
        assert not any(graph.initializer for graph in inner)
        found = sum(node.op_type == "If" for graph in graphs(model.graph) for node in graph.node)
        assert found == program.conditionals == (denoiser.explain().conditionals if manifest.form == "branch" else 0)
        assert {port.name for port in program.outputs} == {value.name for value in model.graph.output}
        assert {value.name for value in model.graph.input} <= {port.name for port in program.inputs}


def graphs(graph: onnx.GraphProto) -> list[onnx.GraphProto]:
    found = [graph]
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                found += graphs(attribute.g)
    return found


def test_adaptive_branch_decides_inside_the_file(tmp_path: Path) -> None:
    """The accumulators are state of the file: nothing but what it returned goes back in."""
    name = FEW[0]
    denoiser = cached(name, schedules.first_block_cache(0.1, forecast=Linear()), "graph")
    expected = generation(denoiser, name)
    folder = export.to_onnx(denoiser, tmp_path / "bundle", "branch")
    loaded = export.load_bundle(folder)
    found = generation(loaded, name)
    verdicts = [[v.refresh for d in x.stats().decisions for v in d.verdicts] for x in (denoiser, loaded)]
    assert verdicts[0] == verdicts[1]
    assert True in verdicts[0]
    assert False in verdicts[0]
    assert max(relative_error(a, b) for a, b in zip(found, expected, strict=True)) < 1e-4
    (program,) = read_manifest(folder).programs.values()
    kinds = {port.kind for port in program.inputs}
    assert {"memory", "force", "moment", "history"} <= kinds
    returned = {port.target for port in program.outputs if port.kind == "memory"}
    assert returned == {port.target for port in program.inputs if port.kind == "memory"}


def test_several_rules_give_several_conditionals(tmp_path: Path) -> None:
    name = FEW[0]
    schedule = CacheSchedule(
        rules=(
            Rule(Sublayers(kinds=("attention",)), Interval(2)),
            Rule(Sublayers(kinds=("mlp",)), Interval(3)),
        )
    )
    denoiser = cached(name, schedule, "graph")
    expected = generation(denoiser, name)
    folder = export.to_onnx(denoiser, tmp_path / "bundle", "branch")
    found = generation(export.load_bundle(folder), name)
    assert max(relative_error(a, b) for a, b in zip(found, expected, strict=True)) < 1e-4
    assert denoiser.explain().conditionals > 1
    check_files(folder, denoiser)


def test_weights_lie_in_one_file_for_all_programs(tmp_path: Path) -> None:
    name = FEW[0]
    denoiser = cached(name, schedules.interval(3))
    folder = export.to_onnx(denoiser, tmp_path / "pair")
    alone = export.to_onnx(denoiser, tmp_path / "branch", "branch")
    weights = sum(p.numel() * p.element_size() for p in sample(name).module.parameters())
    assert (folder / "weights.bin").stat().st_size < 1.1 * weights + 8192 * len(list(sample(name).module.parameters()))
    reuse = onnx.load(folder / "reuse.onnx", load_external_data=False)
    refresh = onnx.load(folder / "refresh.onnx", load_external_data=False)
    names = [{v.name for v in model.graph.initializer if v.external_data} for model in (reuse, refresh)]
    assert names[0] < names[1]
    assert max(len(v.raw_data) for v in refresh.graph.initializer) <= 1024
    assert [path.name for path in alone.iterdir() if path.suffix == ".bin"] == []
    apart = export.to_onnx(denoiser, tmp_path / "apart", "branch", external_data=True)
    assert (apart / "weights.bin").is_file()
    found, expected = (generation(export.load_bundle(path), name) for path in (apart, alone))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("dynamic", "decide", "schedule"),
    [
        (True, "host", schedules.interval(2, forecast=Linear())),
        ("batch", "graph", schedules.interval(2, forecast=Linear())),
        ("batch", "host", schedules.first_block_cache(0.1)),
        ("batch", "graph", schedules.first_block_cache(0.1)),
    ],
    ids=["pair", "branch", "split", "adaptive-branch"],
)
def test_the_batch_may_vary_where_it_was_captured_so(
    dynamic: Any, decide: Any, schedule: CacheSchedule, tmp_path: Path
) -> None:
    found = sample(FEW[0])
    denoiser = compile_with_cache(
        found.module,
        schedule,
        backend="eager",
        dynamic=dynamic,
        decide=decide,
        num_steps=4,
        example_inputs=(found.args, found.kwargs),
    )
    folder = export.to_onnx(denoiser, tmp_path / "bundle", "branch" if decide == "graph" else None)
    loaded = export.load_bundle(folder)
    args, kwargs = torch.utils._pytree.tree_map(
        lambda leaf: torch.cat((leaf, leaf)) if isinstance(leaf, torch.Tensor) and leaf.dim() else leaf,
        (found.args, found.kwargs),
    )
    for one, other in ((found.args, found.kwargs), (args, kwargs)):
        for step in range(4):
            outputs = []
            for each in (denoiser, loaded):
                with torch.no_grad(), each.cache_context("cond", step_index=step, num_inference_steps=4):
                    outputs.append(each(*one, **other).sample)
            assert relative_error(outputs[1], outputs[0]) < 1e-4
        verdicts = [[v.refresh for d in each.stats().decisions for v in d.verdicts] for each in (denoiser, loaded)]
        assert verdicts[0] == verdicts[1]
        assert loaded.stats().reused > 0 or False in verdicts[1]
        denoiser.reset()
        loaded.reset()


@pytest.mark.parametrize("form", ["pair", "branch"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_half_precision(dtype: torch.dtype, form: str, tmp_path: Path) -> None:
    """ONNX Runtime's CPU provider runs float16, and has no convolution in bfloat16."""
    found = sample(FEW[0])
    module = copy.deepcopy(found.module).to(dtype)
    args, kwargs = torch.utils._pytree.tree_map(
        lambda leaf: leaf.to(dtype) if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf,
        (found.args, found.kwargs),
    )
    denoiser = compile_with_cache(
        module,
        schedules.interval(3, forecast=Linear()),
        backend="eager",
        decide="graph" if form == "branch" else "host",
        num_steps=STEPS,
        example_inputs=(args, kwargs),
    )
    folder = export.to_onnx(denoiser, tmp_path / "bundle", form)
    program = next(iter(read_manifest(folder).programs.values()))
    model = onnx.load(folder / program.file, load_external_data=False)
    weight = next(v for v in model.graph.initializer if v.name == "pos_embed.proj.weight")
    assert weight.data_type == (onnx.TensorProto.FLOAT16 if dtype == torch.float16 else onnx.TensorProto.BFLOAT16)
    if dtype == torch.bfloat16:
        with pytest.raises(BundleError, match=r"Could not find an implementation for Conv\(22\)"):
            export.load_bundle(folder)
        return
    loaded = export.load_bundle(folder)
    for step in range(6):
        outputs = []
        for one in (denoiser, loaded):
            with torch.no_grad(), one.cache_context("cond", step_index=step, num_inference_steps=STEPS):
                outputs.append(one(*args, **kwargs).sample.float())
        assert relative_error(outputs[1], outputs[0]) < 5e-3
    assert loaded.stats().reused == 4


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.linear(x)


class TestRefused:
    def test_a_form_that_the_schedule_does_not_have(self, tmp_path: Path) -> None:
        adaptive, static = (cached(FEW[0], schedule) for schedule in (CASES["split"][0], CASES["pair"][0]))
        found = sample(FEW[0])
        varying = compile_with_cache(
            found.module,
            schedules.interval(3),
            backend="eager",
            dynamic=True,
            example_inputs=(found.args, found.kwargs),
        )
        for denoiser, form, words in (
            (adaptive, "pair", "measured within the step"),
            (static, "split", "nothing to split"),
            (static, "triple", "form must be one of pair, split, branch"),
            (varying, "branch", "only the batch may vary: compile with dynamic='batch'"),
        ):
            with pytest.raises(ExportError, match=words):
                export.to_onnx(denoiser, tmp_path / "bundle", form)
        assert list(tmp_path.iterdir()) == []

    def test_nothing_captured(self, tmp_path: Path) -> None:
        with pytest.raises(CacheError, match="nothing is captured"):
            export.to_onnx(compile_with_cache(sample(FEW[0]).module, backend="eager"), tmp_path / "bundle")

    def test_what_onnx_cannot_say_names_the_operator(self, tmp_path: Path) -> None:
        class Odd(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.blocks = torch.nn.ModuleList(Block() for _ in range(4))

            def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
                for block in self.blocks:
                    x = block(x * timestep)
                return torch.linalg.qr(x)[0]

        x = torch.randn(2, 4, 4)
        denoiser = compile_with_cache(
            Odd().eval(), schedules.interval(2), backend="eager", example_inputs=((x, torch.tensor(1.0)), {})
        )
        with pytest.raises(ExportError, match="qr"):
            export.to_onnx(denoiser, tmp_path / "bundle")
        assert list(tmp_path.iterdir()) == []
