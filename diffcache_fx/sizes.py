"""Sizes that may differ from call to call: symbols read off the inputs, put into other shapes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

Size = int | str  # a symbolic size is written as its expression


def sizes_of(shape: Iterable[int | torch.SymInt]) -> tuple[Size, ...]:
    """Sizes as data; symbolic ones as text."""
    return tuple(size if isinstance(size, int) else str(size) for size in shape)


class Symbols:
    """Sizes that differ from call to call: read off the inputs, put into the outputs' shapes."""

    def __init__(self, shapes: Sequence[Sequence[Size]]) -> None:
        self._places = {
            size: (index, axis)
            for index, shape in enumerate(shapes)
            for axis, size in enumerate(shape)
            if isinstance(size, str) and size.isidentifier()
        }

    def bind(self, shapes: Sequence[Sequence[int]]) -> Sizes:
        """The sizes of one call."""
        return Sizes({name: int(shapes[index][axis]) for name, (index, axis) in self._places.items()})


class Sizes:
    """The values of symbolic sizes in one call."""

    def __init__(self, values: dict[str, int]) -> None:
        self.values = values

    def of(self, shape: Sequence[Size]) -> tuple[int, ...]:
        """A shape as numbers."""
        return tuple(size if isinstance(size, int) else self._number(size) for size in shape)

    def _number(self, size: str) -> int:
        if size in self.values:
            return self.values[size]
        import sympy

        return int(sympy.sympify(size, locals={name: sympy.Integer(value) for name, value in self.values.items()}))
