"""The command that measures a model and writes the schedule for a target."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .cli import Backend, Steps, app, bars, call_options, console, errors, one_sentence

MANY = 20  # samples that an error target wants: one in twenty may miss it


@app.command()
def calibrate(
    model: Annotated[
        str, typer.Argument(help="`digits`, `digit-pairs`, or a diffusers pipeline folder", metavar="MODEL")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="folder for the schedule")],
    speedup: Annotated[float | None, typer.Option(help="target: times as fast as the uncached compiled model")] = None,
    latency: Annotated[float | None, typer.Option(help="target: seconds of a generation")] = None,
    psnr: Annotated[
        float | None,
        typer.Option(
            help="target: dB to the uncached samples, in 95 % of those of other noise; demo models' samples lie in "
            "[-1, 1], those of pipelines in [0, 1]"
        ),
    ] = None,
    relative_l1: Annotated[float | None, typer.Option(help="target: largest relative L1 error")] = None,
    steps: Steps = 50,
    samples: Annotated[int, typer.Option(min=1, help="demo models: samples of a generation")] = 20,
    call: Annotated[str, typer.Option(help="pipelines: arguments of the call, as JSON")] = "{}",
    history: Annotated[int, typer.Option(min=1, max=3, help="refreshed values that a forecast sees")] = 3,
    longest: Annotated[int, typer.Option(min=1, help="most reuses in a row")] = 12,
    refine: Annotated[int, typer.Option(min=0, help="plans more to try: slower, better where little is computed")] = 0,
    memory_cap: Annotated[int | None, typer.Option(help="most bytes of cache for one guidance branch")] = None,
    backend: Backend = "inductor",
    report: Annotated[bool, typer.Option(help="also an HTML page with pictures, into the same folder")] = True,
) -> None:
    """Measure a model under its sampler and write the schedule of least error that meets a target."""
    with one_sentence():
        from .calibration import Calibration
        from .errors import CacheError, CalibrationError
        from .folders import check_folder
        from .models import DEMOS
        from .targets import Latency, Psnr, RelativeL1, Speedup, Target, in_decibels

        data_range = 2.0 if model in DEMOS else 1.0  # of demo models' samples, and of what pipelines return
        given: list[tuple[float | None, Any]] = [
            (speedup, Speedup),
            (latency, Latency),
            (psnr, partial(Psnr, data_range=data_range)),
            (relative_l1, RelativeL1),
        ]
        targets: list[Target] = [kind(value) for value, kind in given if value is not None]
        if len(targets) != 1:
            raise CalibrationError("give one target: --speedup, --latency, --psnr or --relative-l1")
        check_folder(out, "--out")
        measured, sampler, name = _sampled(model, steps, samples, call)
        with bars() as told:
            work = Calibration(
                measured,
                sampler,
                history=history,
                longest=longest,
                refine=refine,
                memory_cap=memory_cap,
                backend=backend,
                describe=name,
                progress=told,
            )
            found = work.find(targets[0])
        path = found.schedule.save_pretrained(out)
        table = Table(
            title=f"{model}, {name}, {work.steps} steps: {targets[0]}", show_header=False, title_justify="left"
        )
        for part in found.plan.parts:
            table.add_row("refreshes", f"{len(part.refreshes)} of {work.steps}: {_shown(part.bits)}")
        table.add_row("speed-up by FLOPs", f"{work.ideal(found.plan):.2f}")
        if found.speedup is not None:
            table.add_row("speed-up measured", f"{found.speedup:.2f}")
        for kind, error in (("expected from the plan", found.predicted), ("measured on other noise", found.measured)):
            table.add_row(f"mean square error, {kind}", f"{error:.3g} ({in_decibels(error, data_range)})")
        console.print(table)
        if isinstance(targets[0], (Psnr, RelativeL1)) and len(work.reference) < MANY:
            console.print(
                f"Judged on {len(work.reference)} samples: with {MANY} and more, 95 % of others keep the error, too.",
                highlight=False,
                soft_wrap=True,
            )
        console.print(f"wrote {path}: use it as --schedule {path}", highlight=False, soft_wrap=True)
        if report:
            from .reporting import calibration_page

            try:  # what was found is kept whatever becomes of its picture
                with errors.status("drawing the report"):
                    page = calibration_page(model, work, found, targets[0]).write(out)
                console.print(f"wrote {page}", highlight=False, soft_wrap=True)
            except CacheError as error:
                console.print(f"no report: {error}", highlight=False, soft_wrap=True, markup=False)


def _shown(bits: tuple[bool, ...]) -> str:
    return "".join("R" if bit else "." for bit in bits)


def _sampled(model: str, steps: int, samples: int, call: str) -> tuple[Any, Any, str]:
    """What is calibrated, its sampler, and that in words."""
    import torch

    from .errors import CalibrationError
    from .models import DEMOS, load_demo

    given = call_options(call)
    if model in DEMOS:
        if given:
            raise CalibrationError("--call is for pipelines: the demo models take --steps and --samples")
        demo = load_demo(model)
        labels = torch.arange(samples) * 37 % demo.num_classes

        def draw(denoiser: Any, seed: int) -> torch.Tensor:
            return demo.draw(denoiser, labels, num_steps=steps, seed=seed, batch_size=samples)

        return demo.model, draw, demo.scheduler_class.__name__
    if not (Path(model) / "model_index.json").is_file():
        raise CalibrationError(
            f"calibrate samples {', '.join(DEMOS)} and diffusers pipeline folders, and {model!r} is neither: for other "
            "models call diffcache_fx.calibrate from Python, with your own sampler"
        )
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(model)
    options = {"num_inference_steps": steps, "output_type": "np", **given}

    def run(pipeline: Any, seed: int) -> torch.Tensor:
        made = pipeline(**options, generator=torch.Generator().manual_seed(seed))[0]
        try:
            return torch.as_tensor(made)
        except (TypeError, ValueError, RuntimeError) as error:
            raise CalibrationError(
                f"the pipeline returns {type(made).__name__}, not an array: leave output_type out of --call, or say "
                '"np", "pt" or "latent"'
            ) from error

    return pipe, run, type(pipe.scheduler).__name__
