"""Weights of integrals by Lagrange interpolation: what a step of the sampler and its refinements are sums of."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.polynomial import Polynomial


@dataclass(frozen=True)
class Table:
    """nodes c_0 = 0 <= ... <= c_{K-1} <= 1 of a step; inner[i][j], the integral from 0 to c_i of the j-th basis
    polynomial of Lagrange; whole[j], that from 0 to 1."""

    nodes: tuple[float, ...]
    inner: tuple[tuple[float, ...], ...]
    whole: tuple[float, ...]

    @property
    def closed(self) -> bool:
        """Whether the last node is the end of the step."""
        return self.nodes[-1] == 1.0


@lru_cache(maxsize=64)
def table(count: int, placing: str = "uniform", open_end: bool = False) -> Table:
    """Of `count` nodes. placing: "uniform", or "chebyshev" (Chebyshev-Lobatto, which is uniform up to three nodes).

    open_end: the last node lies before the end, for a step that ends where the model cannot be evaluated.
    """
    if count == 1:
        nodes = [0.0]
    elif placing == "uniform":
        nodes = [i / (count if open_end else count - 1) for i in range(count)]
    else:
        last = count if open_end else count - 1
        nodes = [(1 - math.cos(math.pi * i / last)) / 2 for i in range(count)]
    basis = [_basis(nodes, j).integ() for j in range(count)]
    inner = tuple(tuple(float(b(c) - b(0.0)) for b in basis) for c in nodes)
    return Table(tuple(nodes), inner, tuple(float(b(1.0) - b(0.0)) for b in basis))


def _basis(nodes: list[float], j: int) -> Polynomial:
    """The polynomial that is 1 at node j and 0 at the others."""
    others = [c for i, c in enumerate(nodes) if i != j]
    scale = np.prod([nodes[j] - c for c in others])
    return Polynomial.fromroots(others) / scale if others else Polynomial([1.0])
