"""The invariants a program with regions must obey, checked by running it in eager: identity, consistency, deadness,
branch agreement (design, invariants 1 to 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from .calling import Call, number_tensor
from .parameters import Parameters
from .passes.flops import program_flops
from .passes.guard import InsertGuards
from .passes.specialize import Specialize
from .program import InputKind, OutputKind, StepProgram

Tensors = list[torch.Tensor]
NAMES = ("identity", "consistency", "deadness", "branches")


def run_program(
    program: StepProgram,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    history: Mapping[str, torch.Tensor] | None = None,
    refresh: bool = True,
) -> tuple[Tensors, dict[str, torch.Tensor]]:
    """One eager call of a program: the user's outputs, and the state by its target.

    history: by target; a specialised program gets zeros where it is missing. refresh: the value of every predicate.
    """
    leaves = Call.of(module, args, kwargs).leaves
    parameters, given = Parameters(module), history or {}
    inputs: list[Any] = []
    for node, entry in zip(program.graph.find_nodes(op="placeholder"), program.inputs, strict=True):
        if entry.kind is InputKind.USER:
            leaf = leaves[int(entry.target)]
            inputs.append(leaf if isinstance(leaf, torch.Tensor) else number_tensor(leaf))
        elif entry.kind is InputKind.CONSTANT:
            inputs.append(program.constants[entry.target])
        elif entry.kind is InputKind.PREDICATE:
            inputs.append(torch.tensor(refresh))
        elif entry.kind is InputKind.HISTORY:
            example = node.meta["val"]
            blank = given.get(entry.target)
            inputs.append(torch.zeros(example.shape, dtype=example.dtype) if blank is None else blank)
        elif entry.kind is InputKind.ROWS:
            row = torch.zeros(node.meta["val"].shape)
            row[:, 0] = 1.0
            inputs.append(row)
        elif entry.kind is InputKind.MOMENT:
            inputs.append(torch.zeros(2))
        else:
            inputs.append(parameters(entry.target))
    with torch.no_grad():
        results = program.module(*inputs)
    users = [results[i] for i, _ in program.outputs_of(OutputKind.USER)]
    return users, {entry.target: results[i] for i, entry in program.outputs_of(OutputKind.STATE)}


def same(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> bool:
    """Whether two lists of tensors agree bit for bit (NaN equals NaN)."""
    return len(left) == len(right) and all(
        a.shape == b.shape and a.dtype == b.dtype and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))
        for a, b in zip(left, right, strict=True)
    )


def flop_counter() -> FlopCounterMode:
    """PyTorch's counter of executed FLOPs, taught the attention kernel of the CPU, which it leaves out."""

    def attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
        return int(sdpa_flop_count(query, key, value))

    return FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention}
    )


def check(program: StepProgram, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, str]:
    """For each of NAMES, what is wrong, in words; empty where the invariant holds.

    program: captured, with regions and cuts stored as values in one slot. args, kwargs: a call on the CPU that fits it.
    """
    every = frozenset(region.name for region in program.regions)
    refresh, reuse = Specialize(frozenset())(program), Specialize(every)(program)
    with torch.no_grad():
        plain = [leaf for leaf in pytree.tree_leaves(module(*args, **kwargs)) if isinstance(leaf, torch.Tensor)]
    fresh, state = run_program(refresh, module, args, kwargs)
    history = {f"{target}/0": value for target, value in state.items()}
    with flop_counter() as counter:
        filled, _ = run_program(reuse, module, args, kwargs, history)
    found = dict.fromkeys(NAMES, "")
    if not same(fresh, plain):
        found["identity"] = "the refresh program differs from the model"
    if not same(filled, fresh):
        found["consistency"] = "reusing what was just computed gives another output"
    found["deadness"] = _deadness(program, reuse, counter.get_total_flops())
    found["branches"] = _branches(program, module, args, kwargs, (fresh, state), (filled, history))
    return found


def _deadness(program: StepProgram, reuse: StepProgram, executed: int) -> str:
    dead = frozenset[str]().union(*(region.nodes for region in program.regions))
    if left := [node.name for node in reuse.graph.nodes if node.name in dead]:
        return f"the reuse program still holds {len(left)} nodes of the region, such as {left[0]}"
    kinds = (InputKind.PARAMETER, InputKind.BUFFER)
    placeholders = reuse.graph.find_nodes(op="placeholder")
    idle = [e.target for node, e in zip(placeholders, reuse.inputs, strict=True) if e.kind in kinds and not node.users]
    if idle:
        return f"the reuse program takes {idle[0]} and does not use it"
    expected = program_flops(reuse)
    close = abs(executed - expected) <= 0.01 * expected  # an outer product runs as a product, which counts as nothing
    return "" if close else f"{executed} FLOPs ran, {expected} were expected"


def _branches(
    program: StepProgram,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    fresh: tuple[Tensors, Mapping[str, torch.Tensor]],
    filled: tuple[Tensors, Mapping[str, torch.Tensor]],
) -> str:
    guarded = InsertGuards()(program)
    outputs, state = run_program(guarded, module, args, kwargs, refresh=True)
    if not same(outputs, fresh[0]):
        return "the guarded program, told to refresh, differs from the refresh program"
    if not same([state[f"{name}/0"] for name in fresh[1]], list(fresh[1].values())):
        return "the guarded program, told to refresh, returns other state than the refresh program"
    outputs, state = run_program(guarded, module, args, kwargs, filled[1], refresh=False)
    if not same(outputs, filled[0]):
        return "the guarded program, told to reuse, differs from the reuse program"
    return "" if same([state[name] for name in filled[1]], list(filled[1].values())) else "a reuse changed the state"
