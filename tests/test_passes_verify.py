"""Verify: each rule of the intermediate form, broken on purpose; and which values may share memory."""

from __future__ import annotations

import pytest
import torch
from diffcache_fx.passes.aliasing import is_view, root_of
from diffcache_fx.passes.guard import InsertGuards
from diffcache_fx.passes.specialize import Specialize
from diffcache_fx.passes.verify import Verify
from torch import fx, nn

from diffcache_fx.errors import VerificationError
from diffcache_fx.program import Input, InputKind, Output, OutputKind, Region, StepProgram, output_node, returned

from .test_passes_specialize import program

pytestmark = pytest.mark.usefixtures("one_thread")


def faulty(base: StepProgram, word: str) -> None:
    with pytest.raises(VerificationError, match=word) as error:
        Verify(after="Broken")(base)
    assert "after Broken" in str(error.value)


def nodes(base: StepProgram) -> dict[str, fx.Node]:
    return base.named_nodes()


def test_good_programs_pass_unchanged() -> None:
    base = program("residual", 2)
    for good in (base, Specialize(frozenset())(base), Specialize(frozenset({"b1"}))(base), InsertGuards()(base)):
        assert Verify()(good) is good


def test_inputs_and_outputs_are_declared() -> None:
    base = program()
    faulty(base.replace(inputs=base.inputs[1:]), "placeholders")
    faulty(base.replace(outputs=(*base.outputs, Output(OutputKind.STATE, "b1/0"))), "1 results for 2")
    renamed = (Input(InputKind.USER, "other", "0"), *base.inputs[1:])
    faulty(base.replace(inputs=renamed), "placeholders")


def test_nothing_writes() -> None:
    base = program().copy()
    target = nodes(base)["mul"]
    target.target = torch.ops.aten.mul_.Tensor
    faulty(base, "mul writes in place")


def test_nothing_reads_attributes() -> None:
    base = program().copy()
    base.module.register_buffer("table", torch.ones(8))
    with base.graph.inserting_before(nodes(base)["mul"]):
        read = base.graph.get_attr("table")
    nodes(base)["mul"].args = (nodes(base)["mul"].args[0], read)
    faulty(base, "reads the attribute table")


def test_every_node_carries_an_example() -> None:
    base = program().copy()
    del nodes(base)["mul"].meta["val"]
    faulty(base, "mul carries no example")


def test_state_shares_no_memory() -> None:
    refresh = Specialize(frozenset())(program()).copy()
    (user, _) = returned(refresh.graph)
    output_node(refresh.graph).args = ((user, user),)
    faulty(refresh, "state b1/0 shares memory with linear_2")
    refresh = Specialize(frozenset())(program()).copy()
    output_node(refresh.graph).args = ((user_of(refresh), nodes(refresh)["x"]),)
    faulty(refresh, "shares memory with x")
    reuse = Specialize(frozenset({"b1"}))(program()).copy()
    output_node(reuse.graph).args = ((nodes(reuse)["h_b1_0_0"],),)
    faulty(reuse, "shares memory with the state input")


def user_of(base: StepProgram) -> fx.Node:
    return returned(base.graph)[0]


def test_branches_return_no_operand_and_agree() -> None:
    guarded = InsertGuards()(program()).copy()
    arm = next(child for name, child in guarded.module.named_children() if "reuse" in name)
    assert isinstance(arm, fx.GraphModule)
    user, state = returned(arm.graph)
    output_node(arm.graph).args = ((user, state.args[0]),)
    faulty(guarded, "returns its operand h_b1_0_0")
    output_node(arm.graph).args = ((state, state),)
    faulty(guarded, "different shapes")


def test_state_goes_in_and_out() -> None:
    guarded = InsertGuards()(program())
    outputs = tuple(Output(o.kind, o.target.replace("/0/0", "/0/1")) for o in guarded.outputs)
    faulty(guarded.replace(outputs=outputs), "state goes in as")


def test_regions_exist_and_are_disjoint() -> None:
    base = program()
    (region,) = base.regions
    faulty(base.replace(regions=(Region("r", frozenset({"gone"})),)), "names the node gone")
    faulty(base.replace(regions=(region, Region("r", region.nodes))), "both hold")
    faulty(base.replace(regions=(Region("r", frozenset({"mul"}), region.cut),)), "which it does not compute")


def test_the_graph_is_well_formed() -> None:
    base = program().copy()
    first, last = nodes(base)["add"], nodes(base)["linear_2"]
    last.append(first)
    faulty(base, "malformed")


class Views(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = torch.relu(x)
        parts = y.chunk(2, dim=-1)
        fresh = torch.sort(y, dim=-1)
        return (
            y.view(8, 2).t()[1:],
            parts[1].unsqueeze(0),
            y.reshape(-1),
            fresh[0],
            fresh[1],
            y + 0,
            y.contiguous().to(torch.float32),
            x.flatten(),
            y.clone(),
        )


def test_who_owns_the_memory() -> None:
    exported = torch.export.export(Views(), (torch.randn(4, 4),), strict=False).run_decompositions({})
    values = returned(exported.graph)
    owners = [root_of(value).name for value in values]
    by_name = {node.name: node for node in exported.graph.nodes}
    assert owners[:3] == ["relu"] * 3
    assert owners[3:6] == [values[3].name, values[4].name, values[5].name]
    assert owners[7] == "x"
    assert owners[8] == values[8].name
    assert [is_view(value) for value in values[:3]] == [True] * 3
    assert not is_view(by_name["relu"])
    run_values = exported.module()(torch.randn(4, 4))
    owners_at_run_time: dict[str, int] = {}
    for owner, value in zip(owners, run_values, strict=True):
        place = value.untyped_storage().data_ptr()
        assert owners_at_run_time.setdefault(owner, place) == place or owner == owners[6]
    distinct = {owner: place for owner, place in owners_at_run_time.items() if owner != owners[6]}
    assert len(set(distinct.values())) == len(distinct)
