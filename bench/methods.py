"""Every method on the trained demo model, beside its controls: `python -m bench.methods [--stage STAGE]`.

quality: draw the images of each setting and of its controls (fewer steps, and the trunk held at even intervals, both at
the same cost in FLOPs) and score them against the uncached images of the same noise. timing: generations of a small
batch with all settings that have images, in turn in one run, round by round; leave the machine alone meanwhile. report:
`bench/results/methods.json`, `methods.md` and `methods.png`.

Each stage goes on where it was interrupted: images, scores and rounds are kept in the folder --work.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench.method_report import Report
from bench.method_runs import Record, Runs, plain, read_json, write_json
from bench.method_settings import Setting, even_grid, known, uncached
from diffcache_fx.measure import interleaved

FOLDER = Path(__file__).parent
WORK, RESULTS = FOLDER / "work" / "methods", FOLDER / "results"
STAGES = ("quality", "timing", "report")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
console = Console(stderr=True)


def _bars() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)


def quality(runs: Runs, wanted: list[Setting]) -> list[str]:
    """Draw and score the uncached model, then each setting with its controls. Returns the keys of those that failed."""
    own = [*wanted, *even_grid(runs.steps)]
    waiting = [uncached(runs.steps, runs.steps), *own]
    seen, failed = {setting.key for setting in waiting}, []
    with _bars() as bars:
        every, now = bars.add_task("settings", total=len(waiting)), bars.add_task("")
        while waiting:
            setting = waiting.pop(0)
            title = f"{setting.method}, {setting.label}"
            bars.reset(now, description=title, total=1)
            try:
                record = runs.quality(setting, lambda done, total: bars.update(now, completed=done, total=total))
            except Exception:
                if setting.reference:
                    raise
                console.print_exception(max_frames=6)
                failed.append(setting.key)
                continue
            finally:
                bars.advance(every)
            bars.update(now, completed=1, total=1)
            console.print(f"{title}: {_brief(record)}", highlight=False, soft_wrap=True)
            if setting in own:
                fresh = [control for control in runs.controls(record) if control.key not in seen]
                seen |= {control.key for control in fresh}
                waiting = fresh + waiting
                bars.update(every, total=len(seen))
    return failed


def _brief(record: Record) -> str:
    if "quality" not in record:
        return f"not applicable: {record['not_applicable']}"
    found = record["quality"]
    psnr = f"PSNR {found['psnr_db']['value']:.2f} dB, " if "psnr_db" in found else ""
    accuracy, distance = 100 * found["accuracy"]["value"], found["frechet"]["value"]
    score = f"{psnr}{accuracy:.1f} % read as asked, Fréchet distance {distance:.2f}"
    return f"{record['ideal_speedup']:.2f}x fewer FLOPs, {score}, {record['seconds']:.0f} s"


def with_controls(runs: Runs, settings: list[Setting]) -> dict[str, tuple[Setting, Record]]:
    """By key, the settings that have records, and the records; the reference first, the controls last."""
    found: dict[str, tuple[Setting, Record]] = {}
    own = [*settings, *even_grid(runs.steps)]
    waiting = [uncached(runs.steps, runs.steps), *own]
    while waiting:
        setting = waiting.pop(0)
        record = runs.finished(setting)
        if setting.key in found or record is None:
            continue
        found[setting.key] = setting, record
        if setting in own:
            waiting += runs.controls(record)
    return found


def timing(runs: Runs, images: int, rounds: int) -> None:
    """Time one generation of `images` images with every setting that has a record, until there are `rounds` rounds."""
    settings = [setting for setting, record in with_controls(runs, known()).values() if "quality" in record]
    if not settings or not settings[0].reference:
        sys.exit("nothing to time: run --stage quality first, with the same options")
    path = runs.work / "timing.json"
    made_for = {"images": images, "threads": torch.get_num_threads(), "dtype": str(runs.dtype)}
    made_for["settings"] = plain({setting.key: runs.config(setting) for setting in settings})
    data = read_json(path)
    if data.get("made_for") != made_for:
        data = {"made_for": made_for, "rounds": [], "ideal": {}}
    if len(data["rounds"]) >= rounds:
        return
    torch._dynamo.reset()  # the uncached model was compiled for the batches of the quality stage
    with _bars() as bars:
        task = bars.add_task("compile", total=len(settings))
        plain_model = runs.denoiser(settings[0], images)
        contenders: dict[str, Callable[[], Any]] = {}
        denoisers: dict[str, Any] = {}
        for setting in settings:
            denoiser = plain_model if setting.factory is None else runs.denoiser(setting, images)
            denoisers[setting.key] = denoiser
            bars.advance(task)
        turn = 0

        def generation(setting: Setting) -> Callable[[], Any]:
            return lambda: runs.draw(denoisers[setting.key], setting, turn * images, images)

        contenders = {setting.key: generation(setting) for setting in settings}
        task = bars.add_task("generations", total=rounds * len(settings), completed=len(data["rounds"]) * len(settings))
        first = len(data["rounds"])
        for turn in range(first, rounds):
            found = interleaved(
                contenders,
                rounds=1,
                warmup=1 if turn == first else 0,
                seed=turn,
                progress=lambda name, _: bars.advance(task),
            )
            data["rounds"].append({name: float(seconds[0]) for name, seconds in found.seconds.items()})
            for setting in settings:
                spent, full = runs.flops(denoisers[setting.key], setting)
                data["ideal"][setting.key] = full / spent
            write_json(path, data)


def report(runs: Runs, results: Path) -> None:
    """Write the table, the picture and everything as JSON from what is in the work folder."""
    found = with_controls(runs, known())
    made = Report.of(runs, found, read_json(runs.work / "timing.json"))
    results.mkdir(parents=True, exist_ok=True)
    write_json(results / "methods.json", made.to_dict())
    (results / "methods.md").write_text(made.markdown())
    made.picture(results / "methods.png")
    Console(width=None if sys.stdout.isatty() else 170).print(made.table())
    missing = dict.fromkeys(setting.method for setting in known() if setting.key not in found)
    if missing:
        console.print(f"with settings not drawn yet in {runs.samples} samples: {'; '.join(missing)}", style="yellow")
    console.print(f"wrote methods.json, methods.md and methods.png in {results}", highlight=False, soft_wrap=True)


def main() -> None:
    """Run the stages asked for; exit 1 if a setting failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=(*STAGES, "all"), default="all")
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--batch", type=int, default=100, help="images drawn together in the quality stage")
    parser.add_argument("--methods", default="", help="names of methods or factories, comma-separated: draw only these")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="float32", help="the denoiser's")
    parser.add_argument("--rounds", type=int, default=9, help="timed generations of each setting")
    parser.add_argument("--timing-batch", type=int, default=10, help="images of a timed generation")
    parser.add_argument("--work", type=Path, default=WORK, help="folder of what is kept between runs")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--fresh", action="store_true", help="draw and time anew what the options select")
    options = parser.parse_args()
    runs = Runs(options.work, options.samples, options.steps, options.batch, DTYPES[options.dtype])
    try:
        wanted = known([name.strip() for name in options.methods.split(",") if name.strip()])
    except ValueError as error:
        parser.error(str(error))
    stages = STAGES if options.stage == "all" else (options.stage,)
    if options.fresh:
        forget(runs, wanted if options.methods else None, stages)
    failed = quality(runs, wanted) if "quality" in stages else []
    if "timing" in stages:
        timing(runs, options.timing_batch, options.rounds)
    if "report" in stages:
        report(runs, options.out)
    if failed:
        console.print(f"failed: {', '.join(failed)}", style="red")
    sys.exit(bool(failed))


def forget(runs: Runs, settings: list[Setting] | None, stages: tuple[str, ...]) -> None:
    """Drop from the work folder what these stages made, of these settings or of all."""
    if "timing" in stages:
        (runs.work / "timing.json").unlink(missing_ok=True)
    if "quality" in stages:
        kept = {path for path in runs.work.glob("*.json") if path.name == "timing.json"}
        paths = [p for p in runs.work.iterdir() if p.suffix in (".json", ".safetensors")] if settings is None else []
        paths += [runs.work / f"{s.key}{end}" for s in settings or () for end in (".json", ".safetensors")]
        for path in set(paths) - kept:
            path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
