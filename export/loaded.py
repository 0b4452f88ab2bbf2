"""A bundle as a denoiser: the same driver as `CachedDenoiser`, around the bundle's own programs."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffcache_fx.driver import Driver
from diffcache_fx.errors import BundleError, CallError
from diffcache_fx.generations import Generations
from diffcache_fx.plan import ProgramChoice
from diffcache_fx.program import CutValue, Input, InputKind, Output, OutputKind, Region
from diffcache_fx.recognition import Arguments
from diffcache_fx.report import Stats, summarize
from diffcache_fx.schedule import CacheSchedule
from diffcache_fx.sizes import Sizes, Symbols
from diffcache_fx.step_set import DIFFERENCE, PROBE, REBUILD, Key, StepSet

from .forms import STEP
from .lowered import Lowered, Run
from .manifest import Manifest, Program, check_files, read_manifest
from .ports import dtype_named
from .weights_file import NAMED

RUNTIMES = {"onnx": ("onnxruntime",), "aot_inductor": ("aot_inductor",), "tensorrt": ("tensorrt",)}
Open = Callable[[Path, Program, torch.device], Run]


def load_bundle(
    folder: str | Path,
    runtime: str | None = None,
    *,
    device: str | torch.device = "cpu",
    verify: bool = True,
    **options: Any,
) -> BundleDenoiser:
    """Load a bundle as a denoiser that takes the model's own calls; nothing in it is unpickled.

    runtime: "onnxruntime", "aot_inductor" or "tensorrt"; None: the one that runs the bundle's artefacts. device: where
    its inputs will lie. verify: compare every file with its SHA-256 first. options: the runtime's (`providers`,
    `session_options` for ONNX Runtime).

    Raises BundleError where the bundle is incomplete, changed or newer, or its runtime is not installed.
    """
    path = Path(folder)
    manifest = read_manifest(path)
    fitting = RUNTIMES[manifest.artefact]
    if runtime is not None and runtime not in fitting:
        raise BundleError(
            f"a bundle of {manifest.artefact} artefacts runs in {' or '.join(fitting)}, not in {runtime!r}: leave "
            "runtime= out, or export for that one"
        )
    if verify:
        check_files(path, manifest)
    place = torch.device(device)
    opened = _opener(manifest, path, place, options)
    runs = {name: opened(path / program.file, program, place) for name, program in manifest.programs.items()}
    return BundleDenoiser(manifest, runs, place, path)


def _opener(manifest: Manifest, folder: Path, device: torch.device, options: Mapping[str, Any]) -> Open:
    if manifest.artefact == "onnx":
        from . import run_onnx

        run_onnx.runtime_version()
        return lambda path, program, device: run_onnx.open_model(path, program, device, **options)
    if options:
        raise BundleError(f"the options {', '.join(sorted(options))} are for ONNX Runtime, not for {manifest.artefact}")
    if manifest.artefact == "aot_inductor":
        from .run_aot import Packages

        packages = Packages(folder / NAMED, device)
        return lambda path, program, _: packages.open(path, program)
    from .run_tensorrt import Engines

    engines = Engines(device)
    return lambda path, program, _: engines.open(path, program)


class Config(dict):  # type: ignore[type-arg]
    """The model's configuration: entries by key and by attribute, as diffusers' are."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(f"the bundle's config has no entry {name!r}")


class _Outline:
    """A module of the model as far as the manifest tells it: its plain attributes, and the modules inside."""

    def __init__(self, attributes: Mapping[str, Mapping[str, Any]], path: str) -> None:
        self._attributes, self._path = attributes, path

    def __getattr__(self, name: str) -> Any:
        own = self._attributes.get(self._path, {})
        if name in own:
            return own[name]
        inner = f"{self._path}.{name}".lstrip(".")
        if any(path == inner or path.startswith(inner + ".") for path in self._attributes):
            return _Outline(self._attributes, inner)
        raise AttributeError(f"the bundle does not tell {inner!r} of its model: it holds programs, not modules")


class BundleDenoiser(Generations, nn.Module):
    """What `load_bundle` returns: the model's call signature and outputs, contexts, reset, stats, summary.

    Each thread has cache state of its own.
    """

    def __init__(self, manifest: Manifest, runs: Mapping[str, Run], device: torch.device, folder: Path) -> None:
        super().__init__()
        self.manifest, self.folder, self.device = manifest, folder, device
        self.schedule = CacheSchedule.from_dict(manifest.schedule)
        self.config = Config(manifest.config)
        self.dtype = dtype_named(manifest.dtype)
        self._threads = threading.local()
        self._steps = _steps(manifest, runs, device)
        self._steps.bind()
        self._shapes = Symbols([leaf.shape for leaf in manifest.call.leaves])
        self.training = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """One step: the model's own arguments in, the model's own output out (its fields by name)."""
        call = self.manifest.call
        leaves = call.flatten(args, kwargs)
        key = self._key(leaves)
        arguments = Arguments(
            leaves[call.latents],
            leaves[call.timestep] if call.timestep is not None else None,
            tuple([leaves[i] for i in call.conditioning]),
        )
        driver = self._driver
        place = driver.locate(arguments, key, self._hints)
        with torch.no_grad():
            outputs = driver.step(self._steps, place, call.tensors(leaves))
        return call.unflatten(outputs, as_tuple=call.wants_tuple(kwargs))

    def _key(self, leaves: list[Any]) -> tuple[Any, ...]:
        """The sizes of a call, checked against what the bundle was made for."""
        shapes = [leaf.shape if isinstance(leaf, torch.Tensor) else () for leaf in leaves]
        known = self.manifest.call.leaves
        for leaf, shape in zip(known, shapes, strict=True):
            if len(shape) != len(leaf.shape):
                raise CallError(f"{leaf.name} must have {len(leaf.shape)} dimensions, not {len(shape)}")
        sizes: Sizes = self._shapes.bind(shapes)
        for leaf, shape in zip(known, shapes, strict=True):
            if tuple(shape) != sizes.of(leaf.shape):
                raise CallError(
                    f"{leaf.name} must be of shape {list(leaf.shape)}, not {list(shape)}: the bundle was made for "
                    "that; export with an example of this size, or with dynamic=True"
                )
        for leaf, value in zip(known, leaves, strict=True):
            if isinstance(value, torch.Tensor) and value.device.type != self.device.type:
                raise CallError(
                    f"{leaf.name} lies on {value.device}, and the bundle was loaded for {self.device}: move it there"
                )
        return tuple(shapes)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or "manifest" not in self.__dict__:
                raise
        return getattr(_Outline(self.manifest.attributes, ""), name)

    def _local(self) -> threading.local:
        return self._threads

    def _make_driver(self) -> Driver:
        control = self.manifest.control
        return Driver(self.schedule, control.num_steps, control.refinement, lagged=control.lagged)

    def stats(self) -> Stats:
        """Statistics of this thread's generation under way, or of the one that just ended."""
        return Stats.of(self._driver.record, 0, ())

    def summary(self) -> str:
        """In words: what was refreshed and reused in the last generation, and why."""
        return summarize(self.stats(), self.schedule, self)

    @property
    def full_flops(self) -> int:
        """FLOPs of a step that computes everything."""
        return self.manifest.full_flops

    def flops(self, reused: frozenset[str]) -> int:
        """FLOPs of a step that takes these regions from the cache."""
        for program in self.manifest.programs.values():
            if program.flops and frozenset(program.reused) == reused:
                return program.flops
        saved = sum(region.saves for region in self.manifest.regions if region.name in reused)
        return max(int(self.full_flops - saved), 0)

    def train(self, mode: bool = True) -> BundleDenoiser:
        if mode:
            raise CallError("a bundle is for inference: train the original model")
        return self

    def to(self, *args: Any, **kwargs: Any) -> BundleDenoiser:
        """Stays where and what it is: raises CallError where another device or dtype is asked for."""
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and device.type != self.device.type:
            raise CallError(
                f"a bundle does not move from {self.device} to {device}: load_bundle(folder, device={str(device)!r})"
            )
        if dtype is not None and dtype != self.dtype:
            raise CallError(f"a bundle of {self.dtype} programs cannot become {dtype}: export the model in that dtype")
        return self

    def extra_repr(self) -> str:
        return f"{self.manifest.model}, schedule={self.schedule.name!r}, {self.manifest.artefact} {self.manifest.form}"


def _steps(manifest: Manifest, runs: Mapping[str, Run], device: torch.device) -> StepSet:
    lowered = {name: _lowered(program, runs[name], device) for name, program in manifest.programs.items()}
    named = {PROBE, DIFFERENCE, REBUILD}
    steps: dict[frozenset[str], Lowered] = {
        frozenset() if name == STEP else frozenset(manifest.programs[name].reused): entry
        for name, entry in lowered.items()
        if name not in named
    }
    choice = ProgramChoice(tuple(sorted(steps, key=lambda names: (len(names), sorted(names)))), len(steps), 0.0)
    extra: dict[Key, Lowered] = {name: entry for name, entry in lowered.items() if name in named}
    return StepSet(
        [_region(region, device) for region in manifest.regions],
        steps,
        choice,
        {region.name: region.saves for region in manifest.regions},
        _no_weights,
        manifest.control.groups,
        extra,  # type: ignore[arg-type]
        manifest.measured,
    )


def _no_weights(name: str) -> torch.Tensor:
    raise BundleError(f"the artefact holds its weights itself, and asks for {name!r}")


def _lowered(program: Program, run: Run, device: torch.device) -> Lowered:
    inputs = tuple(Input(InputKind(port.kind), port.name, port.target) for port in program.inputs)
    outputs = tuple(Output(OutputKind(port.kind), port.target) for port in program.outputs)
    blanks = {
        port.target: (port.shape, dtype_named(port.dtype), device)
        for port in program.inputs
        if port.kind == InputKind.MEMORY.value
    }
    shapes = {int(port.target): port.shape for port in program.inputs if port.kind == InputKind.USER.value}
    return Lowered(run, inputs, outputs, {}, frozenset(program.reused), blanks, shapes)


def _region(region: Any, device: torch.device) -> Region:
    cut = tuple(
        CutValue(
            "",
            value.shape,
            dtype_named(value.dtype),
            device,
            "base" if value.residual else None,
            value.slots,
            value.order,
        )
        for value in region.cut
    )
    return Region(region.name, frozenset(), cut, region.rule, region.blocks)
