"""Adding nodes to a graph together with the metadata every later stage expects of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from diffcache_fx.program import CutValue, Input, InputKind, StepProgram, output_node, returned

from .aliasing import clone_after, is_view, root_of

aten = torch.ops.aten


def call(graph: fx.Graph, target: Any, *args: Any, like: fx.Node | None = None, **kwargs: Any) -> fx.Node:
    """Add a call at the graph's insertion point, with its example value computed from those of its arguments."""
    node = graph.call_function(target, args, kwargs)
    values = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
    node.meta["val"] = target(*values[0], **values[1])
    if like is not None:
        node.meta["nn_module_stack"] = dict(like.meta.get("nn_module_stack") or {})
    return node


def fake_mode_of(graph: fx.Graph) -> Any:
    """The fake tensor mode the graph's example values live in."""
    for node in graph.nodes:
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        if mode is not None:
            return mode
    raise AssertionError("the graph holds no example values")


def placeholder(graph: fx.Graph, name: str, shape: Any, dtype: torch.dtype, device: torch.device) -> fx.Node:
    """Add an input after the last one."""
    last = None
    for node in graph.nodes:
        if node.op != "placeholder":
            break
        last = node
    mode = fake_mode_of(graph)
    anchor = graph.inserting_after(last) if last is not None else graph.inserting_before(next(iter(graph.nodes)))
    with anchor:
        node = graph.placeholder(name)
    with mode:
        node.meta["val"] = torch.empty(tuple(shape), dtype=dtype, device=device)
    return node


def safe(name: str) -> str:
    """A region's name as an identifier."""
    return "".join(c if c.isalnum() else "_" for c in name).strip("_")


def history_target(region: str, value: int, slot: int) -> str:
    return f"{region}/{value}/{slot}"


def weighted_sum(graph: fx.Graph, slots: list[fx.Node], row: list[fx.Node], cut: CutValue) -> fx.Node:
    """sum_j row[j] * slots[j], in float32 for narrower types (a sum of large terms of opposite sign loses digits)."""
    if not row:
        return from_stored(graph, slots[0], cut)
    wide = cut.dtype in (torch.float16, torch.bfloat16)
    total: fx.Node | None = None
    for slot, weight in zip(slots, row, strict=True):
        value = call(graph, aten._to_copy.default, slot, dtype=torch.float32) if wide else slot
        term = call(graph, aten.mul.Tensor, value, weight)
        total = term if total is None else call(graph, aten.add.Tensor, total, term)
    assert total is not None
    total = call(graph, aten._to_copy.default, total, dtype=cut.dtype) if wide else total
    return from_stored(graph, total, cut)


def memory_order(example: torch.Tensor) -> tuple[int, ...] | None:
    """The permutation that makes a dense transposed value contiguous; None if it is contiguous already, or not dense.

    Kernels differ in rounding between layouts: what is reused must lie as what was computed did.
    """
    if not all(isinstance(size, int) for size in (*example.shape, *example.stride())) or example.is_contiguous():
        return None
    strides = example.stride()
    order = tuple(sorted(range(example.dim()), key=lambda axis: -strides[axis]))
    return order if example.permute(order).is_contiguous() else None


def to_stored(graph: fx.Graph, node: fx.Node, cut: CutValue) -> fx.Node:
    """A value as the graph computes it, with its axes in the order they are stored in."""
    return node if cut.order is None else call(graph, aten.permute.default, node, list(cut.order))


def from_stored(graph: fx.Graph, node: fx.Node, cut: CutValue) -> fx.Node:
    """The opposite of `to_stored`."""
    if cut.order is None:
        return node
    return call(graph, aten.permute.default, node, [cut.order.index(axis) for axis in range(len(cut.order))])


def row_of(graph: fx.Graph, rows: fx.Node | None, index: int, slots: int) -> list[fx.Node]:
    """The forecast weights of region number `index`, as 0-d values; empty where one slot is held as it is."""
    if rows is None or slots == 1:
        return []
    row = call(graph, aten.select.int, rows, 0, index)
    return [call(graph, aten.select.int, row, 0, slot) for slot in range(slots)]


def own(graph: fx.Graph, values: list[fx.Node]) -> list[fx.Node]:
    """Values that are to be stored: each contiguous, in memory of its own, shared with no other value of the list."""
    result: list[fx.Node] = []
    seen: set[fx.Node] = set()
    for node in values:
        example = node.meta["val"]
        shared = is_view(node) or node.op == "placeholder" or node in seen
        loose = isinstance(example, torch.Tensor) and not example.is_contiguous()
        result.append(clone_after(graph, node) if shared or loose else node)
        seen.add(node)
    return result


def detach_outputs(
    program_graph: fx.Graph, users: list[fx.Node], states: list[fx.Node], inputs: set[fx.Node]
) -> tuple[list[fx.Node], list[fx.Node]]:
    """Make sure that no user output shares memory with the cache: neither with the state inputs in `inputs`, nor with a
    state output."""
    outputs = [clone_after(program_graph, n) if root_of(n) in inputs else n for n in users]
    stored = own(program_graph, states)
    roots = {root_of(node) for node in outputs}
    stored = [clone_after(program_graph, node) if root_of(node) in roots else node for node in stored]
    return outputs, stored


def drop_unused_inputs(program: StepProgram, droppable: frozenset[InputKind]) -> StepProgram:
    """Remove, in place, inputs of the given kinds that nothing uses; returns the program with its inputs to match."""
    kept: list[Input] = []
    nodes = [node for node in program.graph.nodes if node.op == "placeholder"]
    for node, entry in zip(nodes, program.inputs, strict=True):
        if entry.kind in droppable and not node.users:
            program.graph.erase_node(node)
        else:
            kept.append(entry)
    program.graph.lint()
    return program.replace(inputs=tuple(kept), module=fx.GraphModule(program.module, program.graph))


def set_outputs(graph: fx.Graph, values: list[fx.Node]) -> None:
    output_node(graph).args = (tuple(values),)


__all__ = ["returned"]
