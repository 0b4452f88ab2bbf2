"""One file with all weights of a bundle, and where each lies in it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

NAME = "weights.bin"  # raw, for ONNX
NAMED = "weights.safetensors"  # for packages
# Large tensors begin at a page, so that a runtime can map them.
_PAGE, _LARGE, _SMALL = 4096, 1 << 16, 64


class WeightsFile:
    """Appends tensors; one that is the same memory as an earlier one, of the same name or not, is written once."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self._places: dict[Any, tuple[int, int]] = {}
        self._held: list[torch.Tensor] = []  # another tensor would be taken for one of these where one was given back
        self._end = 0

    def place(self, tensor: torch.Tensor) -> tuple[int, int]:
        """Offset and length in bytes of a tensor's values, row by row; written now if they are not there yet."""
        key = (
            tensor.untyped_storage().data_ptr(),
            tensor.storage_offset(),
            tuple(tensor.shape),
            tensor.stride(),
            tensor.dtype,
        )
        if key not in self._places:
            length = tensor.numel() * tensor.element_size()
            step = _PAGE if length >= _LARGE else _SMALL
            start = -(-self._end // step) * step
            with self.path.open("ab") as file:
                file.write(bytes(start - file.tell()))
                for block in _blocks(tensor):
                    file.write(block)
            self._places[key] = (start, length)
            self._held.append(tensor)
            self._end = start + length
        return self._places[key]


def _blocks(tensor: torch.Tensor, size: int = 1 << 26) -> Iterator[memoryview]:
    """A tensor's bytes, a part at a time, so that no copy of a large one is made."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    for start in range(0, flat.numel(), size):
        yield memoryview(flat[start : start + size].cpu().numpy().data)
