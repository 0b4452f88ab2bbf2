"""Writing a bundle: the artefacts of one form, and the manifest that describes them, whole or not at all."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from diffcache_fx.errors import ExportError
from diffcache_fx.parameters import Parameters
from diffcache_fx.program import StepProgram
from diffcache_fx.sizes import sizes_of
from diffcache_fx.version import __version__

from .describe import describe
from .forms import Chosen, choose, plan_table
from .manifest import (
    NAME,
    Control,
    File,
    Manifest,
    Port,
    Program,
    RegionData,
    Value,
    hash_of,
)
from .ports import WEIGHTS, example_of, input_names, name_of_dtype, output_names

if TYPE_CHECKING:
    from diffcache_fx.denoiser import CachedDenoiser

Told = Callable[[str], None]
_OUTER = 2  # parts of a path whose attributes are told


@dataclass
class Written:
    """What a writer made of one program. file: relative to the bundle; conditionals: decisions inside; weights: what it
    reads from elsewhere."""

    file: str
    conditionals: int = 0
    weights: tuple[str, ...] = ()


@dataclass
class Job:
    """One export under way. folder: where the files go for now. parameters: the model's weights, by name."""

    folder: Path
    chosen: Chosen
    parameters: Parameters
    tell: Told
    versions: dict[str, str] = field(default_factory=dict)


Writer = Callable[[Job], Mapping[str, Written]]


def write_bundle(
    cached: CachedDenoiser,
    folder: str | Path,
    form: str | None,
    artefact: Literal["onnx", "aot_inductor", "tensorrt"],
    writer: Writer,
    *,
    num_steps: int | None = None,
    overwrite: bool = False,
    progress: Told | None = None,
) -> Path:
    """Export a cached denoiser's latest captured signature. Returns the folder.

    Raises ExportError where something stands in the way; the folder is then as it was before.
    """
    if not hasattr(cached, "current_signature"):
        raise ExportError(f"what compile_with_cache returns is exported, not a {type(cached).__name__}: wrap it first")
    signature = cached.current_signature()
    captured = signature.captured
    chosen = choose(captured, form, num_steps, hoist=artefact != "aot_inductor")
    tell = progress or (lambda _: None)
    plan = plan_table(captured, chosen)  # a plan that does not fit is refused before anything is written
    program = captured.program
    call = describe(captured.module.forward, program, signature.latents, signature.timestep, signature.conditioning)
    with staged(Path(folder), overwrite) as staging:
        job = Job(staging, chosen, Parameters(captured.module), tell)
        written = writer(job)
        tell("checksums")
        device = next((value.device for region in program.regions for value in region.cut), torch.device("cpu"))
        manifest = Manifest(
            artefact=artefact,
            form=chosen.form,
            created_with={"diffcache_fx": __version__, "torch": torch.__version__, **job.versions},
            model=type(captured.module).__name__,
            config=config_of(captured.module),
            attributes=_attributes(captured.module),
            dtype=name_of_dtype(_dtype(captured.module)),
            device=device.type,
            schedule=plain(captured.schedule.to_dict()),
            call=call,
            full_flops=captured.full_flops,
            state_bytes=sum(region.nbytes for region in program.regions),
            regions=tuple(_region(region, captured.weight[region.name]) for region in program.regions),
            measured=program.measured,
            programs={
                name: _program(chosen.programs[name], made, _flops(captured, chosen, name))
                for name, made in written.items()
            },
            control=Control(
                num_steps=chosen.num_steps,
                lagged=captured.options.decide == "lagged",
                refinement=captured.options.refinement,
                programs=tuple(name for name, key in chosen.keys.items() if not isinstance(key, str)),
                groups=chosen.groups,
                plan=plan,
            ),
            files=_checksums(staging),
        )
        (staging / NAME).write_text(manifest.text())
    return Path(folder)


def check_target(target: Path, overwrite: bool, marker: str = NAME) -> None:
    """Raises ExportError where a folder is there that must not be replaced."""
    if target.exists() and not overwrite:
        raise ExportError(
            f"{target} exists already: choose another folder, or overwrite it (overwrite=True, --overwrite)"
        )
    if target.exists() and not (target / marker).is_file():
        raise ExportError(f"{target} is no bundle, so it is not overwritten: choose another folder")


@contextmanager
def staged(target: Path, overwrite: bool, marker: str = NAME) -> Iterator[Path]:
    """A folder beside the target that takes its place once all is written; an error leaves nothing behind. A target
    that is there is replaced if that is wanted and it holds the file `marker`."""
    check_target(target, overwrite, marker)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
    staging.chmod(0o755)
    try:
        yield staging
        if target.exists():
            retired = staging.with_suffix(".old")
            target.rename(retired)
            staging.rename(target)
            shutil.rmtree(retired)
        else:
            staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _checksums(folder: Path) -> dict[str, File]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hash_of(path) for path in files}


def described(program: StepProgram, file: str = "", weights: bool = False) -> Program:
    """A program's signature as data. weights: those that it takes from the model are inputs, too."""
    nodes = program.graph.find_nodes(op="placeholder")
    taken = [pair for pair in zip(program.inputs, nodes, strict=True) if weights or pair[0].kind not in WEIGHTS]
    inputs = zip(input_names(program, weights), taken, strict=True)
    outputs = zip(output_names(program), program.outputs, example_of(program), strict=True)
    return Program(
        file=file,
        reused=tuple(sorted(program.reused)),
        inputs=tuple(_port(name, e.kind.value, e.target, node.meta["val"]) for name, (e, node) in inputs),
        outputs=tuple(_port(name, entry.kind.value, entry.target, value) for name, entry, value in outputs),
        flops=0,
    )


def _program(program: StepProgram, made: Written, flops: int) -> Program:
    known = {"flops": flops, "conditionals": made.conditionals, "weights": made.weights}
    return described(program, made.file).model_copy(update=known)


def _port(name: str, kind: str, target: str, value: torch.Tensor) -> Port:
    return Port(name=name, kind=kind, target=target, dtype=name_of_dtype(value.dtype), shape=sizes_of(value.shape))


def _flops(captured: Any, chosen: Chosen, name: str) -> int:
    key = chosen.keys[name]
    return captured.flops(key) if not isinstance(key, str) else 0


def _region(region: Any, saves: float) -> RegionData:
    cut = tuple(
        Value(
            shape=sizes_of(value.shape),
            dtype=name_of_dtype(value.dtype),
            slots=value.slots,
            residual=value.base is not None,
            order=value.order,
        )
        for value in region.cut
    )
    return RegionData(name=region.name, rule=region.rule, cut=cut, saves=saves, blocks=tuple(region.blocks))


def _dtype(module: torch.nn.Module) -> torch.dtype:
    floating = (p.dtype for p in (*module.parameters(), *module.buffers()) if p.is_floating_point())
    return next(floating, torch.float32)


def config_of(module: torch.nn.Module) -> dict[str, Any]:
    """The model's configuration, as far as JSON can tell it; without what libraries note for themselves in names that
    begin with an underscore, which may differ from process to process."""
    config = getattr(module, "config", None)
    found = dict(config) if isinstance(config, Mapping) else {}
    public = {str(name): value for name, value in found.items() if not str(name).startswith("_")}
    return {name: plain(value) for name, value in public.items() if _tellable(value)}


def _attributes(module: torch.nn.Module) -> dict[str, dict[str, Any]]:
    """Whole numbers and strings that the model's outer modules hold (`add_embedding.linear_1.in_features`, say)."""
    found = {}
    for path, child in module.named_modules():
        if path.count(".") < _OUTER and not any(part.isdigit() for part in path.split(".")):
            own = {k: v for k, v in vars(child).items() if type(v) in (int, str) and not k.startswith("_")}
            if path and own:
                found[path] = own
    return found


def _tellable(value: Any) -> bool:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return False
    return True


def plain(value: Any) -> Any:
    """As it comes back from a JSON file."""
    return json.loads(json.dumps(value))


def version_of(package: str) -> dict[str, str]:
    """A package and its version, for the manifest. Raises ExportError where it is not installed."""
    try:
        return {package: importlib.metadata.version(package)}
    except importlib.metadata.PackageNotFoundError as error:
        raise ExportError(
            f"{package} is not installed, and is needed to write these files: `diffcache-fx doctor` says how to get it"
        ) from error
