"""Decompose: operators as the simpler ones they stand for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from diffcache_fx.program import StepProgram

from .everywhere import everywhere
from .inline import inline


@dataclass(frozen=True)
class Decompose:
    """Replace every operator that the table has a rule for by what the rule computes.

    table: by operator, a function of the same arguments, as in `torch.export.default_decompositions()`.
    only: whether a node with such an operator is to be replaced; None: every one.

    What an exporter asks for, without tracing the program anew: only the operators named are looked at, which is what
    makes it fast on large programs and on conditionals, whose branches PyTorch traces several times.

    Before:  y = einsum("nhwpqc->nchpwq", x)
    After:   y = permute(x, [0, 5, 1, 3, 2, 4])

    Rules:
    1. Operators in the branches of conditionals are replaced, too, and those that a rule brings in.
    2. Only in finished programs: the new nodes belong to no region.
    3. A rule that returns NotImplemented leaves its operator as it is.
    """

    table: Mapping[Any, Callable[..., Any]]
    only: Callable[[fx.Node], bool] | None = None

    def __call__(self, program: StepProgram) -> StepProgram:
        return everywhere(program, self._decompose)

    def _decompose(self, graph: fx.Graph) -> None:
        waiting = [node for node in graph.nodes if self._wanted(node)]
        while waiting:
            node = waiting.pop()
            last = node.prev
            if self._replace(graph, node):
                waiting += [made for made in _between(last, node) if self._wanted(made)]
                graph.erase_node(node)

    def _wanted(self, node: fx.Node) -> bool:
        return node.op == "call_function" and node.target in self.table and (self.only is None or self.only(node))

    def _replace(self, graph: fx.Graph, node: fx.Node) -> bool:
        """Put what the rule computes before the node, and in place of it; False if the rule declines."""
        leaves, spec = pytree.tree_flatten((node.args, node.kwargs), is_leaf=lambda x: isinstance(x, fx.Node))
        leaves = [_module(leaf) if isinstance(leaf, fx.Node) and leaf.op == "get_attr" else leaf for leaf in leaves]
        taken = [leaf for leaf in leaves if isinstance(leaf, fx.Node)]

        def rule(tensors: list[torch.Tensor]) -> Any:
            given = iter(tensors)
            args, kwargs = pytree.tree_unflatten([next(given) if isinstance(x, fx.Node) else x for x in leaves], spec)
            return self.table[node.target](*args, **kwargs)

        with graph.inserting_before(node):
            made = inline(graph, rule, taken)
        if isinstance(made, fx.Node):
            node.replace_all_uses_with(made)
            return True
        if not isinstance(made, (list, tuple)):
            if node.target is torch.ops.aten.item.default:  # a number that depends on data, by the name it has inside
                node.target = torch.ops.aten._local_scalar_dense.default
            return False
        for user in list(node.users):  # each takes one of the results out
            user.replace_all_uses_with(made[int(user.args[1])])  # type: ignore[arg-type]
            graph.erase_node(user)
        return True


def _module(node: fx.Node) -> Any:
    """What an operator of higher order is given to call."""
    return node.graph.owning_module.get_submodule(str(node.target))  # type: ignore[union-attr]


def _between(first: fx.Node, last: fx.Node) -> Iterator[fx.Node]:
    node = first.next
    while node is not last:
        yield node
        node = node.next
