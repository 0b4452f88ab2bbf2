"""Which nodes may be deleted when nothing uses them, and deleting them.

FX's own rule keeps asserts, attention and dropout alive, and with them a whole reused region. Here a node is impure
only if it writes to a tensor or really draws random numbers.
"""

from __future__ import annotations

import torch
from torch import fx

_ASSERTS = ("_assert", "sym_constrain", "_functional_assert")


def mutates(node: fx.Node) -> bool:
    """True if the node's operator writes to one of its arguments."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return isinstance(node.target, torch._ops.HigherOrderOperator) and "with_effects" in str(node.target)
    return any(arg.alias_info is not None and arg.alias_info.is_write for arg in schema.arguments)


def draws_random(node: fx.Node) -> bool:
    """True if the node draws random numbers when run: dropout in evaluation mode and attention at p = 0 do not."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or torch.Tag.nondeterministic_seeded not in target.tags:
        return False
    name = target.overloadpacket.__name__
    if "dropout" in name and "attention" not in name:
        training = node.args[2] if len(node.args) > 2 else node.kwargs.get("train", True)
        return bool(training)
    if "attention" in name:
        position = next(
            (i for i, arg in enumerate(target._schema.arguments) if arg.name == "dropout_p"), len(node.args) + 1
        )
        rate = node.args[position] if position < len(node.args) else node.kwargs.get("dropout_p", 0.0)
        return bool(rate)
    return True


def is_assert(node: fx.Node) -> bool:
    """Runtime checks that export leaves in the graph; they compute nothing."""
    return node.op == "call_function" and any(mark in str(node.target) for mark in _ASSERTS)


def is_impure(node: fx.Node) -> bool:
    """True if deleting an unused node would change what the program does."""
    if node.op in ("placeholder", "output"):
        return True
    if node.op != "call_function" or is_assert(node):
        return False
    return mutates(node) or draws_random(node)


def eliminate_dead(graph: fx.Graph) -> None:
    """Delete, in place, every node that nothing uses, by the rule above (placeholders stay)."""
    graph.eliminate_dead_code(is_impure_node=is_impure)
