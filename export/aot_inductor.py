"""AOTInductor: each program of a bundle as a `.pt2` package, runnable from Python and from C++, all of them on one copy
of the weights."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from torch._inductor.package import package_aoti

from diffcache_fx.errors import ExportError
from diffcache_fx.program import StepProgram

from .bundle import Job, Told, Written, write_bundle
from .exported_program import to_exported, weights_of
from .weights_file import NAMED

if TYPE_CHECKING:
    from diffcache_fx.denoiser import CachedDenoiser


def to_aot_inductor(
    cached: CachedDenoiser,
    folder: str | Path,
    form: str | None = None,
    *,
    num_steps: int | None = None,
    inductor_options: Mapping[str, Any] | None = None,
    overwrite: bool = False,
    progress: Told | None = None,
) -> Path:
    """Export a cached denoiser as a bundle of AOTInductor packages; returns the folder.

    cached, form, num_steps, overwrite, progress: as for `to_onnx`. inductor_options: Inductor config entries.

    Packages are built for this machine's kind of processor or GPU, and for this version of PyTorch. They hold no
    weights: `weights.safetensors` does, and a host loads it once for all packages (constants that the user manages).
    Raises ExportError, ScheduleError.
    """

    def writer(job: Job) -> dict[str, Written]:
        return write_packages(job, inductor_options or {})

    return write_bundle(
        cached, folder, form, "aot_inductor", writer, num_steps=num_steps, overwrite=overwrite, progress=progress
    )


def write_packages(job: Job, options: Mapping[str, Any]) -> dict[str, Written]:
    """Write each program of a form as NAME.pt2, and the weights of all beside them."""
    from diffcache_fx.passes.conditional import conditionals_of

    weights: dict[str, torch.Tensor] = {}
    found = {}
    for name, program in job.chosen.programs.items():
        job.tell(f"{name}: compiling")
        own = weights_of(program, job.parameters)
        weights.update(own)
        _package(program, job, job.folder / f"{name}.pt2", options)
        found[name] = Written(f"{name}.pt2", conditionals_of(program), tuple(sorted(own)))
    job.tell("weights")
    save_file(_apart(weights), job.folder / NAMED)
    return found


def _package(program: StepProgram, job: Job, path: Path, options: Mapping[str, Any]) -> None:
    exported = to_exported(program, job.parameters, examples=True)
    for node in exported.graph.nodes:  # the generated source would quote them
        node.meta.pop("stack_trace", None)
    configs = {"aot_inductor.package": True, "aot_inductor.package_constants_in_so": False, **options}
    args, kwargs = exported.example_inputs
    try:
        with torch.no_grad():
            files = torch._inductor.aot_compile(exported.module(check_guards=False), args, kwargs, options=configs)
        with tempfile.TemporaryDirectory(dir=path.parent.parent, prefix=path.parent.name) as work:
            package_aoti(str(path), [_copied(file, Path(work)) for file in files])
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0][:300] if lines else ""
        raise ExportError(
            f"AOTInductor failed on the program {path.stem!r}: {type(error).__name__}: {reason}"
        ) from error


def _copied(file: Any, folder: Path) -> Any:
    """One of the compiler's files, its sources without the command line that they were built with, which tells where
    things lie on this machine."""
    if not isinstance(file, str):
        return file
    target = folder / Path(file).name
    if target.suffix != ".cpp":
        shutil.copyfile(file, target)
        return str(target)
    lines = Path(file).read_text().splitlines(keepends=True)
    commands = {i + 1 for i, line in enumerate(lines) if line.startswith(("// Compile cmd", "// Link cmd"))}
    target.write_text("".join(line for i, line in enumerate(lines) if i not in commands))
    return str(target)


def _apart(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors that share no memory, as the file format wants them: a tied weight is written under each of its names."""
    seen: set[int] = set()
    found = {}
    for name, tensor in weights.items():
        address = tensor.untyped_storage().data_ptr()
        found[name] = tensor.contiguous() if address not in seen else tensor.contiguous().clone()
        seen.add(address)
    return found
