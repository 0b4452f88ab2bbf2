"""The command line `diffcache-fx`."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape
from rich.progress import (
    BarColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

app = typer.Typer(
    name="diffcache-fx",
    help="Caches what hardly changes from step to step of a diffusion model, in its compiled graph.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(width=None if sys.stdout.isatty() else 150)  # a table in a file or a log need not be folded
errors = Console(stderr=True)
_QUIET = 60.0  # seconds between lines on how far a stage is, where there is no terminal

Model = Annotated[
    str,
    typer.Argument(
        help="`digits`, `digit-pairs`, a diffusers folder or hub id, or `package.module:factory`", metavar="MODEL"
    ),
]
SCHEDULE_HELP = "a name, a name with options (interval:every=3,forecast=linear), or the path of a saved schedule"
Schedules = Annotated[list[str] | None, typer.Option("--schedule", "-s", help=SCHEDULE_HELP + "; repeatable")]
Steps = Annotated[int, typer.Option(min=1, help="denoising steps of a generation")]
Backend = Annotated[str, typer.Option(help="eager, inductor, or another torch.compile backend")]
Decided = Annotated[str, typer.Option("--decide", help="where the decision is taken: host, graph or lagged")]
_state = {"debug": False}


@app.callback()
def options(
    debug: Annotated[bool, typer.Option(help="show tracebacks")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="log captures and compilations")] = False,
) -> None:
    _state["debug"] = debug
    if verbose:
        handler = RichHandler(console=errors, show_path=False)
        logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler])


@contextmanager
def one_sentence() -> Iterator[None]:
    """Print an error of the library, or of the file system, in one sentence and exit 1; with --debug let the traceback
    through."""
    from .errors import CacheError

    try:
        yield
    except (CacheError, OSError) as error:
        if _state["debug"]:
            raise
        errors.print("error:", style="bold red", end=" ")
        errors.print(str(error), markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error


@contextmanager
def bars() -> Iterator[Callable[[str, int, int], None]]:
    """Progress bars, one for each stage: yields `told(stage, done, total)`; total 0 means that nobody knows."""
    columns = (
        SpinnerColumn(finished_text="[green]done"),
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    if not errors.is_terminal:
        yield _lines()
        return
    with Progress(*columns, console=errors) as progress:
        tasks: dict[str, TaskID] = {}

        def told(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = progress.add_task(stage, total=total or None)
            progress.update(tasks[stage], completed=done, total=total or None)

        yield told


def _lines() -> Callable[[str, int, int], None]:
    """For files and pipes: a line when a stage begins, at most one a minute while it lasts, and one when it is done."""
    begun: dict[str, float] = {}
    said: dict[str, float] = {}

    def told(stage: str, done: int, total: int) -> None:
        now = time.monotonic()
        over = bool(total) and done >= total
        if stage in begun and not over and now - said[stage] < _QUIET:
            return
        if over and said.get(stage) == math.inf:
            return
        begun.setdefault(stage, now)
        said[stage] = math.inf if over else now
        much = f" {done} of {total}" if total and not over else ""
        ended = f" done, {now - begun[stage]:.0f} s" if over else " ..."
        errors.print(f"{stage}:{much}{ended}", highlight=False, markup=False, soft_wrap=True)

    return told


def named(texts: list[str]) -> dict[str, Any]:
    from .arguments import parse_schedule

    return {text: parse_schedule(text) for text in texts}


def call_options(text: str) -> dict[str, Any]:
    """The --call of a pipeline. Raises CacheError for what is no JSON object."""
    import json

    from .errors import CacheError

    try:
        options = json.loads(text)
    except json.JSONDecodeError as error:
        raise CacheError(f"--call must be a JSON object of the pipeline's arguments: {error}") from error
    if not isinstance(options, dict):
        raise CacheError(f"--call must be a JSON object of the pipeline's arguments, not {text!r}")
    return options


@app.command()
def demo(
    schedule: Schedules = None,
    steps: Steps = 50,
    images: Annotated[int, typer.Option(min=1, help="images of each label")] = 5,
    out: Annotated[Path, typer.Option(help="folder for the picture and the table")] = Path("demo-output"),
    backend: Backend = "inductor",
    model: Annotated[str, typer.Option(help="digits, or digit-pairs: two digits by prompt, a U-Net")] = "digits",
) -> None:
    """Draw handwritten digits with and without a cache, side by side, with the speed-up and the fidelity measured."""
    with one_sentence():
        from .demo import run
        from .folders import check_folder

        check_folder(out, "--out")
        schedules = named(schedule) if schedule else run.default_schedules(model, steps)
        with bars() as told:
            found = run.run_demo(schedules, out, name=model, steps=steps, images=images, backend=backend, progress=told)
        console.print(found.table())
        if found.unsteady:
            console.print(found.unsteady, highlight=False, soft_wrap=True, markup=False)
        console.print(run.NOTES.replace("\n", " ").strip(), style="dim")
        names = ", ".join(str(out / name) for name in (f"{found.model}.png", run.TABLE, run.DATA))
        console.print(f"wrote {names} in {found.seconds:.0f} s", highlight=False, soft_wrap=True)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="MODEL as elsewhere, or the folder of a bundle", metavar="MODEL|BUNDLE")],
    schedule: Annotated[str, typer.Option("--schedule", "-s", help=SCHEDULE_HELP)] = "default",
    steps: Steps = 50,
    graph: Annotated[bool, typer.Option("--graph", help="also print the guarded step program as code")] = False,
) -> None:
    """Explain what a schedule does to a model: regions, cuts, FLOPs, programs; or what a bundle holds. Nothing runs."""
    with one_sentence():
        if cli_bundles.is_bundle(model):
            cli_bundles.show(Path(model))
            return
        from .compile import compile_with_cache
        from .models import load_target

        (found,) = named([schedule]).values()
        target = load_target(model)
        with errors.status(f"capturing {model}"):
            cached = compile_with_cache(
                target.module, found, backend="eager", example_inputs=target.example(), num_steps=steps
            )
        console.print(str(cached.explain()), markup=False, highlight=False, soft_wrap=True)
        if graph:
            print(cached.program())


@app.command()
def bench(
    model: Model,
    schedule: Schedules = None,
    steps: Steps = 50,
    rounds: Annotated[int, typer.Option(min=1, help="generations of each contender")] = 5,
    backend: Backend = "inductor",
    decide: Decided = "host",
    controls: Annotated[bool, typer.Option(help="also the uncached model in fewer steps at the same cost")] = True,
    out: Annotated[Path | None, typer.Option(help="write everything measured as JSON")] = None,
    report: Annotated[Path | None, typer.Option(help="folder for an HTML page with pictures")] = None,
) -> None:
    """Compare cached and uncached, compiled by the same backend: generations in turn, in one run.

    `digits` and `digit-pairs` are sampled and their images scored; any other MODEL is called once per step with its
    example inputs.
    """
    with one_sentence():
        from .comparing import compare
        from .demo.run import Digits
        from .errors import CacheError
        from .folders import check_folder
        from .models import load_target
        from .workload import Calls, Workload

        if out is not None:
            if out.is_dir():
                raise CacheError(f"--out {out} is a folder: give a file, which gets everything measured as JSON")
            check_folder(out.parent, "the folder of --out")
        if report is not None:
            check_folder(report, "--report")
        schedules = named(schedule or ["default"])
        target = load_target(model)
        workload: Workload
        if target.demo is not None:
            workload = Digits(target.demo, steps)
        else:
            target.example()
            assert target.inputs is not None
            workload = Calls(target.inputs, target.varies, steps)
        with bars() as told:
            found = compare(
                model,
                target.module,
                schedules,
                workload,
                rounds=rounds,
                backend=backend,
                decide=decide,  # type: ignore[arg-type]
                controls=controls,
                progress=told,
            )
        console.print(found.table())
        if found.unsteady:
            console.print(found.unsteady, highlight=False, soft_wrap=True, markup=False)
        for row in (row for row in found.rows if row.why):
            console.print(row.why, markup=False, highlight=False, soft_wrap=True)
        if out is not None:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(found.json())
        if report is not None:
            from .reporting import comparison_page

            page = comparison_page(found).write(report)
            console.print(f"wrote {page}", highlight=False, soft_wrap=True)


@app.command()
def schedules() -> None:
    """List the schedules that can be named, and their options."""
    import inspect as inspection

    from .presets.methods import METHODS

    table = Table(title="schedules")
    table.add_column("name", style="bold")
    table.add_column("class")
    table.add_column("options")
    table.add_column("what it does")
    for method in sorted(METHODS, key=lambda method: method.name):
        given = inspection.signature(method.factory).parameters.values()
        text = " ".join((inspection.getdoc(method.factory) or "").partition("\n\n")[0].split())
        table.add_row(
            method.name, method.family, ", ".join(_option(parameter) for parameter in given) or "-", escape(text)
        )
    console.print(table)


def _option(parameter: Any) -> str:
    empty = parameter.default is parameter.empty
    return parameter.name if empty else f"{parameter.name}={parameter.default!r}"


@app.command()
def doctor() -> None:
    """Versions, processor, and which runtimes can run a step here."""
    from . import doctor as examine
    from .version import __version__

    console.print(f"diffcache_fx {__version__}", highlight=False)
    parts = {"versions": examine.versions, "machine": examine.processor, "backends": examine.backends}
    for title, findings in parts.items():
        table = Table(title=title, show_header=False, title_justify="left", min_width=60)
        for found in findings():
            table.add_row(found.subject, "[green]yes" if found.well else "[yellow]no", escape(found.detail))
        console.print(table)


from . import cli_bundles, cli_calibrate  # noqa: E402, F401 - their commands are added to the app above

if __name__ == "__main__":
    app()
