"""What an entry of the corpus is, and how its weights and its inputs are drawn."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Call = tuple[tuple[Any, ...], dict[str, Any]]

_WHERE = (
    "diffusers",
    "diffusers.models.transformers",
    "diffusers.models.unets",
    "diffusers.pipelines.deprecated.wuerstchen",
    "diffusers.pipelines.wuerstchen",
)


@dataclass(frozen=True)
class Entry:
    """A tiny denoiser with random weights and the call its pipeline makes.

    ``latent`` and ``timestep`` name arguments of that call by keyword or by position; ``timestep`` is empty for
    the one model that takes none. ``known_limits`` says what export alone cannot do with it, and why.
    """

    name: str
    family: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int], Call]
    latent: str | int
    timestep: str | int
    known_limits: str = ""


@dataclass(frozen=True)
class Published:
    """A full-size configuration: ``build`` and ``inputs`` are for the meta device or fake tensors."""

    name: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Call]


class Draw:
    """Seeded inputs: calling it draws a normal tensor."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def ints(self, high: int, *shape: int) -> Tensor:
        """Draw integers in [0, high)."""
        return torch.randint(0, high, shape, generator=self.generator)

    def step(self) -> int:
        """Draw a training timestep away from both ends."""
        return int(self.ints(900, 1)) + 50

    def long_t(self, batch: int = 2) -> Tensor:
        """One integer timestep for the whole batch."""
        return torch.full((batch,), self.step(), dtype=torch.int64)

    def float_t(self, batch: int = 2, scale: float = 1.0) -> Tensor:
        """One float timestep for the whole batch, times ``scale``."""
        return torch.full((batch,), self.step() * scale)


def call(*args: Any, **kwargs: Any) -> Call:
    """Return the arguments of one forward call."""
    return args, kwargs


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


@torch.no_grad()
def randomize_(model: nn.Module, seed: int) -> None:
    """Draw every parameter anew, so that no gate or output projection is left at zero."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            noise = torch.randn(parameter.shape, generator=generator)
            if "bias" in name and parameter.ndim == 1:
                value = 0.05 * noise
            elif _is_norm(module) and parameter.ndim == 1:
                value = 1 + 0.1 * noise
            elif parameter.ndim <= 1:
                value = 0.3 * noise + 0.5
            else:
                convolution = isinstance(module, nn.modules.conv._ConvNd)
                fan_in = parameter[0].numel() if convolution else parameter.shape[-1]
                value = noise / math.sqrt(max(fan_in, 1))
            parameter.copy_(value)


def seeded(factory: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """Build a model with its buffers and parameters drawn from ``seed``; the global generator is untouched."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = factory()
    randomize_(model, seed)
    return model.eval()


def denoiser_class(name: str) -> type[nn.Module]:
    """Find a model class of diffusers by its name."""
    for where in _WHERE:
        try:
            module = importlib.import_module(where)
        except ImportError:
            continue
        if hasattr(module, name):
            return getattr(module, name)
    raise ImportError(f"this diffusers has no {name}")


def from_diffusers(
    name: str,
    config: dict[str, Any],
    inputs: Callable[[Draw], Call],
    latent: str | int = "hidden_states",
    timestep: str | int = "timestep",
    family: str = "transformer",
    known_limits: str = "",
) -> Entry:
    """Make the entry of a diffusers class; what follows a dash in the name tells configurations apart."""

    def build() -> nn.Module:
        return seeded(lambda: denoiser_class(name.split("-")[0])(**config))

    return Entry(name, family, build, lambda seed: inputs(Draw(seed)), latent, timestep, known_limits)


def stacks(model: nn.Module) -> dict[str, list[nn.Module]]:
    """Return the outermost module lists with at least two parametrised items: the repeated blocks."""
    found: dict[str, list[nn.Module]] = {}
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or any(path.startswith(outer + ".") for outer in found):
            continue
        items = [item for item in module if item is not None and next(item.parameters(), None) is not None]
        if len(items) >= 2:
            found[path] = items
    return found


def tensors(output: Any) -> list[Tensor]:
    """Return the tensors of a forward output, in order."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def moving(entry: Entry, share: float) -> Call:
    """The call at a share of a generation: its tensors of more than one dimension go a fifth of the way from one draw
    to another."""

    def between(a: Any, b: Any) -> Any:
        moves = isinstance(a, Tensor) and a.is_floating_point() and a.dim() > 1
        return torch.lerp(a, b, 0.2 * share) if moves else a

    args, kwargs = torch.utils._pytree.tree_map(between, entry.inputs(0), entry.inputs(1))
    return args, kwargs
