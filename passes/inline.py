"""Writing torch code into a graph: a function of tensors is traced on the example values and its operators copied
in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from diffcache_fx.errors import VerificationError

from .aliasing import is_view
from .emit import fake_mode_of
from .purity import eliminate_dead, mutates


def inline(graph: fx.Graph, function: Callable[..., Any], *arguments: Mapping[str, fx.Node] | list[fx.Node]) -> Any:
    """Add, at the graph's insertion point, what `function` computes from nodes; returns its result with nodes in place
    of tensors.

    arguments: dictionaries or lists of nodes, given to the function as the same containers of tensors. The function may
    branch on Python values only, and the only tensors of constants it may make have no axis. It may write in place to
    what it made itself and shows nowhere else; the operator that makes a new tensor is taken then. Raises
    VerificationError.
    """
    leaves, spec = pytree.tree_flatten(list(arguments))
    shape: list[pytree.TreeSpec] = []
    plain: list[Any] = []

    def flat(*tensors: torch.Tensor) -> list[torch.Tensor]:
        results = function(*pytree.tree_unflatten(list(tensors), spec))
        values, structure = pytree.tree_flatten(results)
        shape.append(structure)
        plain.append(values)
        return [value for value in values if isinstance(value, torch.Tensor)]

    mode = fake_mode_of(graph)
    if mode.shape_env is not None:  # sizes that depend on data, of operators that were added before
        mode.shape_env.pending_fresh_unbacked_symbols.clear()
    with mode, torch.no_grad():
        traced = make_fx(flat, tracing_mode="real")(*(node.meta["val"] for node in leaves))
    _write_nowhere(traced.graph)
    eliminate_dead(traced.graph)
    memo: dict[fx.Node, fx.Node] = {}
    supply = iter(leaves)
    result: list[fx.Node] = []
    for node in traced.graph.nodes:
        if node.op == "placeholder":
            memo[node] = next(supply)
        elif node.op == "call_function":
            memo[node] = graph.node_copy(node, memo.__getitem__)
        elif node.op == "get_attr" and _is_scalar(getattr(traced, node.target, None)):
            held = getattr(traced, node.target)
            memo[node] = graph.call_function(
                torch.ops.aten.full.default, ([], held.item()), {"dtype": held.dtype, "device": held.device}
            )
            with mode:
                memo[node].meta["val"] = torch.empty((), dtype=held.dtype, device=held.device)
        elif node.op == "output":
            result = [memo[value] for value in node.args[0]]
        else:
            raise VerificationError(f"{getattr(function, '__qualname__', function)} makes a tensor of its own: {node}")
    given = iter(result)
    values = [next(given) if isinstance(value, torch.Tensor) else value for value in plain[-1]]
    return pytree.tree_unflatten(values, shape[-1])


def _is_scalar(held: Any) -> bool:
    return isinstance(held, torch.Tensor) and held.dim() == 0 and not isinstance(held, torch._subclasses.FakeTensor)


def _write_nowhere(graph: fx.Graph) -> None:
    """PyTorch's own composite operators add in place; `torch.func.functionalize` does not see it."""
    for node in graph.nodes:
        if node.op != "call_function" or not mutates(node):
            continue
        name, written = node.target.overloadpacket.__name__, node.args[0]
        packet = getattr(torch.ops.aten, name.removesuffix("_"), None) if name.endswith("_") else None
        twin = getattr(packet, node.target._overloadname, None)
        seen = [user for user in written.users if user is not node and (is_view(user) or user > node)]
        if twin is None or seen or written.op != "call_function" or is_view(written):
            raise VerificationError(f"{node.target} writes to a tensor that is seen elsewhere")
        node.target = twin
