"""The commands that write, run and show bundles."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .cli import SCHEDULE_HELP, Decided, Model, Steps, app, bars, call_options, console, named, one_sentence

WRITERS = ("onnx", "tensorrt", "aot-inductor", "bundle")
_ONNX = ("onnx", "onnxscript")  # packages that are missed before anything is captured
NEEDED = {"onnx": _ONNX, "bundle": _ONNX, "tensorrt": _ONNX, "aot-inductor": ()}
Folder = Annotated[Path, typer.Argument(help="a folder that `export` wrote", metavar="BUNDLE")]


@app.command()
def export(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="the folder to write")],
    schedule: Annotated[str, typer.Option("--schedule", "-s", help=SCHEDULE_HELP)] = "default",
    format: Annotated[str, typer.Option("--format", "-f", help="onnx (or bundle), tensorrt, aot-inductor")] = "onnx",
    form: Annotated[str | None, typer.Option(help="pair, split or branch; what fits the schedule if left out")] = None,
    steps: Steps = 50,
    decide: Decided = "host",
    overwrite: Annotated[bool, typer.Option(help="replace a bundle that is there")] = False,
) -> None:
    """Write a cached denoiser as files that run without this library: a bundle with its manifest."""
    with one_sentence():
        from .compile import compile_with_cache
        from .errors import ExportError
        from .export import to_aot_inductor, to_onnx, to_tensorrt
        from .export.bundle import check_target, version_of
        from .export.forms import check_form
        from .folders import check_folder
        from .models import load_target

        writers: dict[str, Callable[..., Path]] = dict(
            zip(WRITERS, (to_onnx, to_tensorrt, to_aot_inductor, to_onnx), strict=True)
        )
        if format not in writers:
            raise ExportError(f"--format must be one of {', '.join(WRITERS)}, not {format!r}")
        check_form(form)
        check_target(out, overwrite)
        check_folder(out.parent, "the folder of --out")
        for package in NEEDED[format]:
            version_of(package)
        (found,) = named([schedule]).values()
        target = load_target(model)
        with bars() as told:
            told("capture", 0, 0)
            cached = compile_with_cache(
                target.module,
                found,
                backend="eager",
                example_inputs=target.example(),
                num_steps=steps,
                decide=decide,  # type: ignore[arg-type]
            )
            told("capture", 1, 1)
            stages: list[str] = []

            def progress(stage: str) -> None:
                name, _, count = stage.rpartition(" ")
                done, slash, total = count.partition("/")
                title = name if slash else stage
                if stages and stages[-1] != title:
                    told(stages[-1], 1, 1)
                stages.append(title)
                told(title, *((int(done), int(total)) if slash else (0, 0)))

            folder = writers[format](cached, out, form, overwrite=overwrite, progress=progress)
            if stages:
                told(stages[-1], 1, 1)
        show(folder)


@app.command()
def run(
    bundle: Folder,
    pipeline: Annotated[Path | None, typer.Option(help="a diffusers pipeline that takes the bundle's denoiser")] = None,
    call: Annotated[str, typer.Option(help="arguments of the pipeline's call, as JSON")] = "{}",
    images: Annotated[int, typer.Option(min=1, help="demo models: images of each label")] = 1,
    out: Annotated[Path, typer.Option(help="folder for the images")] = Path("bundle-output"),
) -> None:
    """Generate with a bundle: the demo's digits, or what a diffusers pipeline makes with the bundle as its denoiser."""
    with one_sentence():
        from .export import load_bundle
        from .folders import check_folder

        check_folder(out, "--out")
        loaded = load_bundle(bundle)
        written = _digits(loaded, images, out) if pipeline is None else _pipeline(loaded, pipeline, call, out)
        console.print(loaded.summary(), markup=False, highlight=False, soft_wrap=True)
        console.print(f"wrote {', '.join(str(path) for path in written)}", highlight=False, soft_wrap=True)


def _digits(loaded: Any, images: int, out: Path) -> list[Path]:
    import torch
    from PIL import Image

    from .demo.run import Digits
    from .demo.sampling import image_grid
    from .errors import BundleError
    from .models import DEMOS

    demos = [load() for load in DEMOS.values()]
    demo = next((demo for demo in demos if _is_of(loaded, demo.model)), None)
    steps = loaded.manifest.control.num_steps
    if demo is None:
        raise BundleError(
            f"this bundle holds a {loaded.manifest.model} that is not the demo's: pass --pipeline FOLDER, the "
            "diffusers pipeline that it belongs to, or call it from Python, with diffcache_fx.export.load_bundle"
        )
    work, drawn = Digits(demo, steps or 50), []
    total = images * work.steps
    with bars() as told:
        done = itertools.count(1)

        def tick() -> None:
            told("generations", next(done), total)

        for turn in range(images):
            made = work.generate(loaded, turn, None, tick)
            assert made is not None
            drawn.append(made)
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{demo.name}.png"
    Image.fromarray(image_grid(torch.cat(drawn)).numpy()).save(path)
    return [path]


def _is_of(loaded: Any, model: Any) -> bool:
    """Whether a bundle was made of a model with this class and configuration."""
    from .export.bundle import config_of

    told = {name: value for name, value in dict(loaded.config).items() if not name.startswith("_")}
    return loaded.manifest.model == type(model).__name__ and told == config_of(model)


def _pipeline(loaded: Any, folder: Path, call: str, out: Path) -> list[Path]:
    from diffusers import DiffusionPipeline

    from .errors import BundleError
    from .models import PARTS

    options = call_options(call)
    index = folder / "model_index.json"
    if not index.is_file():
        raise BundleError(f"{folder} is no diffusers pipeline: it holds no model_index.json")
    parts = json.loads(index.read_text())
    fitting = [name for name in PARTS if (parts.get(name) or [None, None])[1] == loaded.manifest.model]
    if not fitting:
        raise BundleError(f"the pipeline {folder} has no {loaded.manifest.model}, which this bundle holds")
    pipe = DiffusionPipeline.from_pretrained(folder, **{fitting[0]: None})
    setattr(pipe, fitting[0], loaded)
    if loaded.manifest.control.num_steps is not None:
        options.setdefault("num_inference_steps", loaded.manifest.control.num_steps)
    made = pipe(**options)
    pictures = getattr(made, "images", None)
    if pictures is None:
        raise BundleError(f"the pipeline {type(pipe).__name__} returns no images: run it from Python, with load_bundle")
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for index_, picture in enumerate(pictures):
        paths.append(out / f"image_{index_}.png")
        picture.save(paths[-1])
    return paths


def is_bundle(text: str) -> bool:
    """Whether a command line's MODEL is the folder of a bundle."""
    from .export.manifest import NAME

    return (Path(text) / NAME).is_file()


def show(folder: Path) -> None:
    """Print what a bundle holds. Raises BundleError where a file is not what was written."""
    from .export.manifest import check_files, read_manifest

    manifest = read_manifest(folder)
    check_files(folder, manifest)
    control = manifest.control
    decided = "decided by a plan" if control.plan else "decided at run time"
    console.print(
        f"{folder}: {manifest.model} ({manifest.dtype}) under schedule {manifest.schedule['name']!r}, "
        f"{manifest.artefact} in the {manifest.form} form, {decided}"
        + (f", {control.num_steps} steps" if control.num_steps else ""),
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    table = Table(title="programs", title_justify="left")
    for title in ("program", "file", "size", "inputs", "outputs", "`If` nodes", "FLOPs of a full step"):
        table.add_column(title)
    for name, program in manifest.programs.items():
        share = f"{100 * program.flops / manifest.full_flops:.1f} %" if program.flops else "-"
        size = mebibytes(manifest.files[program.file].bytes)
        counts = (str(len(program.inputs)), str(len(program.outputs)), str(program.conditionals))
        table.add_row(name, program.file, size, *counts, share)
    artefacts = {program.file for program in manifest.programs.values()}
    for name, file in manifest.files.items():
        if name not in artefacts:
            table.add_row("", name, mebibytes(file.bytes), "", "", "", "")
    console.print(table)
    regions = Table(title="cache state of one guidance branch", title_justify="left")
    for title in ("region", "value", "dtype", "stored as", "slots"):
        regions.add_column(title)
    for region in manifest.regions:
        for value in region.cut:
            shape = "x".join(map(str, value.shape))
            how = "residual" if value.residual else "value"
            regions.add_row(region.name, shape, value.dtype, how, str(value.slots))
    console.print(regions)
    console.print(f"state: {mebibytes(manifest.state_bytes)}; all files are as written", highlight=False)


def mebibytes(count: int) -> str:
    """Bytes in MiB."""
    return f"{count / (1 << 20):.2f} MiB"
