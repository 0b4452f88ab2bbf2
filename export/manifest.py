"""`manifest.json`: everything that a host in any language needs to drive a whole generation with a bundle's files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from diffcache_fx.errors import BundleError
from diffcache_fx.program import Measured
from diffcache_fx.sizes import Size

from .convention import Convention, Data, Scalar

FORMAT, VERSION = "diffcache_fx.bundle", 1
NAME = "manifest.json"
Form = Literal["pair", "split", "branch"]
FORMS: tuple[Form, ...] = ("pair", "split", "branch")


class Port(Data):
    """One input or output of a program, in order. kind and target as in `diffcache_fx.program`: for a "history" input
    or a "state" output the target is REGION/VALUE/SLOT (REGION/VALUE where the program computes one fresh value). ONNX
    models and engines take and give a complex tensor as one of its parts' dtype with a last axis of 2: real part,
    imaginary part."""

    name: str
    kind: str
    target: str
    dtype: str
    shape: tuple[Size, ...]


class Program(Data):
    """One artefact. file: relative to the bundle. reused: the regions it takes from the cache. flops: of one call.
    conditionals: decisions inside. weights: names of the weights it reads, where they lie outside of the file."""

    file: str
    reused: tuple[str, ...]
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    flops: int
    conditionals: int = 0
    weights: tuple[str, ...] = ()


class Value(Data):
    """One cut value of a region, as it is stored. residual: over a value the programs compute afresh. order: the axes
    as they lie in memory, where that is another order than the model's."""

    shape: tuple[Size, ...]
    dtype: str
    slots: int
    residual: bool
    order: tuple[int, ...] | None = None


class RegionData(Data):
    """One region: its rule in the schedule, its cut, and the FLOPs that reusing it alone saves."""

    name: str
    rule: int
    cut: tuple[Value, ...]
    saves: float
    blocks: tuple[str, ...] = ()


class Step(Data):
    """One step of a plan that is known ahead, for one guidance branch.

    program: which to run. store: for each region that it refreshes, the slot that its fresh values go to (a value with
    fewer slots takes the remainder). rows: the forecast weights [regions, slots], empty where the program takes none.
    predicates: for the branch form, whether each group refreshes; that form returns the history as it is to go in next.
    """

    program: str
    store: dict[str, int]
    rows: tuple[tuple[float, ...], ...] = ()
    predicates: dict[str, bool] = Field(default_factory=dict)


class Control(Data):
    """Who decides what, as data.

    num_steps: calls of a generation and guidance branch; None where the schedule does not need it. lagged: the signal
    of a step decides the step after. refinement: the sampler may call twice at one timestep. programs: those that a
    decision chooses from (refresh first). groups: for the branch form, the predicate of each region. plan: one entry
    per step where everything is known ahead; empty where a guard measures, or the timestep decides.
    """

    num_steps: int | None
    lagged: bool
    refinement: bool
    programs: tuple[str, ...]
    groups: dict[str, str]
    plan: tuple[Step, ...]


class File(Data):
    """Size in bytes and SHA-256 of one file."""

    bytes: int
    sha256: str


class Manifest(Data):
    """The bundle's description. artefact: what runs its programs. schedule: as `CacheSchedule.to_dict` writes it:
    thresholds, polynomials, forecasts, limits. attributes: plain attributes of the model's outer modules, by path:
    pipelines look at some."""

    format: Literal["diffcache_fx.bundle"] = "diffcache_fx.bundle"
    version: int = VERSION
    artefact: Literal["onnx", "aot_inductor", "tensorrt"]
    form: Form
    created_with: dict[str, str]
    model: str
    config: dict[str, Any]
    attributes: dict[str, dict[str, Scalar]]
    dtype: str
    device: str
    schedule: dict[str, Any]
    call: Convention
    full_flops: int
    state_bytes: int
    regions: tuple[RegionData, ...]
    measured: tuple[Measured, ...]
    programs: dict[str, Program]
    control: Control
    files: dict[str, File]

    def text(self) -> str:
        """As it is written."""
        return self.model_dump_json(indent=1) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a bundle. Raises BundleError where there is none, it is malformed, or of a newer format."""
    path = folder / NAME
    if not path.is_file():
        raise BundleError(f"{folder} is no bundle: it holds no {NAME}")
    try:
        data = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BundleError(f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise BundleError(f"{path} is no manifest of a bundle: its field 'format' should say {FORMAT!r}")
    version = data.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise BundleError(
            f"{folder} has format version {version!r}, and this library reads up to {VERSION}: install a newer "
            "diffcache_fx, or export again with this one"
        )
    try:
        manifest = Manifest.model_validate_json(path.read_text())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise BundleError(f"{path} is malformed at {where}: {first['msg'].lower()}") from error
    _check_control(manifest, path)
    return manifest


def _check_control(manifest: Manifest, path: Path) -> None:
    """What hosts follow must name what the bundle holds."""
    control, programs = manifest.control, manifest.programs
    named = {*control.programs, *(step.program for step in control.plan)}
    missing = sorted(named - programs.keys())
    if missing:
        raise BundleError(f"{path} is malformed at control: it names the program {missing[0]!r}, which is not there")
    if control.num_steps is not None and control.num_steps < 1:
        raise BundleError(f"{path} is malformed at control.num_steps: {control.num_steps} is no number of steps")
    if control.plan and control.num_steps is not None and len(control.plan) != control.num_steps:
        raise BundleError(
            f"{path} is malformed at control.plan: {len(control.plan)} steps, where control.num_steps says "
            f"{control.num_steps}"
        )


def hash_of(path: Path) -> File:
    """Size and SHA-256 of a file."""
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
            size += len(block)
    return File(bytes=size, sha256=digest.hexdigest())


def check_files(folder: Path, manifest: Manifest) -> None:
    """Raises BundleError where a file of the bundle is missing or not what was written."""
    for name, known in manifest.files.items():
        path = folder / name
        if not path.resolve().is_relative_to(folder.resolve()):
            raise BundleError(f"the manifest of {folder} names a file outside of the bundle: {name!r}")
        if not path.is_file():
            raise BundleError(f"{folder} is incomplete: {name} is missing. Copy the whole folder, or export again")
        if path.stat().st_size != known.bytes or hash_of(path) != known:
            raise BundleError(
                f"{path} is not the file that was exported (its SHA-256 differs): copy the bundle again, or "
                "export again"
            )
    listed = {program.file for program in manifest.programs.values()}
    unknown = sorted(listed - set(manifest.files))
    if unknown:
        raise BundleError(f"the manifest of {folder} gives no checksum for {', '.join(unknown)}")
