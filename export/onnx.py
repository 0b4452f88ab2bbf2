"""ONNX: each program of a bundle as a model for ONNX Runtime, or for TensorRT to parse."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffcache_fx.passes.real_pairs import as_pairs

from diffcache_fx.program import StepProgram

from .bundle import Job, Told, Written, version_of, write_bundle
from .exported_program import weights_of
from .onnx_model import LARGEST, check_model, conditionals_in, to_model
from .onnx_rules import with_constants
from .weights_file import NAME as WEIGHTS
from .weights_file import WeightsFile

if TYPE_CHECKING:
    from diffcache_fx.denoiser import CachedDenoiser

# Smaller tensors stay in the model itself.
_LEAST = 1024


def to_onnx(
    cached: CachedDenoiser,
    folder: str | Path,
    form: str | None = None,
    *,
    num_steps: int | None = None,
    external_data: bool | None = None,
    overwrite: bool = False,
    progress: Told | None = None,
) -> Path:
    """Export a cached denoiser as a bundle of ONNX models; returns the folder.

    cached: with a captured signature (compiled with example_inputs, or called once); its backend does not matter.
    form: "pair", a refresh model and one reuse model per distinct row of the plan; "split", a probe model and the rest
        of the step, for guards that measure within it; "branch", one model with one `If` per independent decision.
        None: "split" where the guard needs it, else "pair".
    num_steps: calls of a generation; None: what the denoiser was compiled with.
    external_data: keep weights in one file beside the models, held once for all of them; None: where there are several
        models, or one above 2 GB. A single small model has them inside otherwise.
    overwrite: replace a bundle that is there. progress: told what is being done, in a few words.

    The models are checked by ONNX's full checker before the folder appears. Raises ExportError, ScheduleError.
    """

    def writer(job: Job) -> dict[str, Written]:
        job.versions.update(version_of("onnx") | version_of("onnxscript"))
        return write_models(job, external_data)

    return write_bundle(
        cached, folder, form, "onnx", writer, num_steps=num_steps, overwrite=overwrite, progress=progress
    )


def write_models(job: Job, external_data: bool | None = None) -> dict[str, Written]:
    """Write each program of a form as NAME.onnx."""
    programs = job.chosen.programs
    shared = WeightsFile(job.folder)
    found = {}
    for name, program in programs.items():
        job.tell(f"{name}: to ONNX")
        program = with_constants(program, job.parameters)
        apart = len(programs) > 1 if external_data is None else external_data
        apart = apart or _bytes_of(program, job.parameters) > LARGEST
        conditionals = write_model(program, job.parameters, job.folder / f"{name}.onnx", shared if apart else None)
        job.tell(f"{name}: checking")
        check_model(job.folder / f"{name}.onnx")
        found[name] = Written(f"{name}.onnx", conditionals)
    return found


def write_model(
    program: StepProgram,
    parameters: Callable[[str], torch.Tensor],
    path: Path,
    shared: WeightsFile | None = None,
    held: bool = True,
) -> int:
    """Write one program; its weights go into the shared file if there is one (held=False: they are inputs). Returns how
    many `If` nodes it holds."""
    import onnx_ir

    model = to_model(program, parameters, held)
    if shared is not None:
        _move_out(model, weights_of(program, parameters), shared)
    onnx_ir.save(model, path)
    return conditionals_in(model.graph)


def _bytes_of(program: StepProgram, parameters: Callable[[str], torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in weights_of(program, parameters).values())


def _move_out(model: Any, weights: dict[str, torch.Tensor], shared: WeightsFile) -> None:
    """Point large initialisers into the shared file."""
    import onnx_ir

    for name, value in model.graph.initializers.items():
        tensor = as_pairs(weights[name]) if name in weights else None
        held = value.const_value
        if tensor is None or held is None or held.nbytes < _LEAST or tuple(held.shape) != tuple(tensor.shape):
            continue  # small, or made by the exporter
        offset, length = shared.place(tensor)
        value.const_value = onnx_ir.ExternalTensor(
            WEIGHTS, offset, length, held.dtype, shape=held.shape, name=name, base_dir=str(shared.path.parent)
        )


__all__ = ["to_onnx", "write_model", "write_models"]
