"""AOTInductor's runtime: a package as a callable of torch tensors, on weights that all packages of a bundle share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from diffcache_fx.errors import BundleError

from .lowered import Run
from .manifest import Program


class Packages:
    """Opens the packages of one bundle. The weights are read once."""

    def __init__(self, weights: Path, device: torch.device) -> None:
        self._weights = load_file(weights, device=str(device))
        self._device = device

    def open(self, path: Path, program: Program) -> Run:
        """A package with the bundle's weights. Raises BundleError where it does not load here."""
        try:
            model = torch._inductor.aoti_load_package(str(path), device_index=self._device.index or -1)
            wanted = model.get_constant_fqns()
            missing = [name for name in wanted if name not in self._weights]
            if missing:
                raise BundleError(
                    f"{path.name} wants the weight {missing[0]!r}, which the bundle's weights do not hold"
                )
            own = {name: self._weights[name] for name in wanted}
            model.load_constants(own, check_full_update=True, user_managed=True)
        except BundleError:
            raise
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise BundleError(
                f"{path.name} does not load here ({reason}): packages are for the PyTorch version, and the kind of "
                "processor or GPU, that they were built with; export again here"
            ) from error
        loader: Any = model.loader

        def run(*tensors: torch.Tensor) -> list[torch.Tensor]:
            return loader.boxed_run(list(tensors))

        run.weights = own  # type: ignore[attr-defined]  # the package keeps addresses only
        return run
