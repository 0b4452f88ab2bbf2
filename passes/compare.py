"""How a forecast relates to what it stands for, measured in the graph, channel by channel."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from .correct import channel_axis
from .inline import inline

# Rows of what `compared` returns.
FORECAST, FRESH, FORECAST_SQUARE, PRODUCT, FRESH_SQUARE = range(5)


def compared(graph: fx.Graph, filled: fx.Node, fresh: fx.Node, base: fx.Node | None) -> fx.Node:
    """Add, at the graph's insertion point, the moments of a forecast h and of what was computed, f (less the base,
    where a residual is stored): float32 [5, channels], means over all other axes: of h, f, and of the products of what
    is left of them, hh, hf and ff."""
    axis = channel_axis(fresh.meta["val"]) or 0

    def moments(value: dict[str, Tensor]) -> Tensor:
        held, computed = (value[name].float().movedim(axis, -1).flatten(0, -2) for name in ("filled", "fresh"))
        if "base" in value:
            computed = computed - value["base"].float().movedim(axis, -1).flatten(0, -2)
        means = held.mean(0), computed.mean(0)
        h, f = held - means[0], computed - means[1]
        return torch.stack((*means, (h * h).mean(0), (h * f).mean(0), (f * f).mean(0)))

    given = {"filled": filled, "fresh": fresh} | ({"base": base} if base is not None else {})
    found: fx.Node = inline(graph, moments, given)
    return found
