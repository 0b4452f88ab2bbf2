"""AddSignals, RestOfStep and Probe: what adaptive guards measure, where it is found, and the step split at it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from diffcache_fx.passes.decide import Control
from diffcache_fx.passes.guard import InsertGuards
from diffcache_fx.passes.references import References
from diffcache_fx.passes.signals import AddSignals
from diffcache_fx.passes.specialize import Specialize
from diffcache_fx.passes.split import Probe, RestOfStep, live_names
from diffcache_fx.passes.verify import walk
from torch import nn

from diffcache_fx import Blocks, Hold, RegionError, Trunk, Whole
from diffcache_fx.adaptive import AdaptiveGuard, DraftError, OutputChange, ProbeChange, RelativeChange
from diffcache_fx.compile import run_passes
from diffcache_fx.limits import Limits
from diffcache_fx.parameters import Parameters
from diffcache_fx.program import InputKind, OutputKind, StepProgram, returned
from diffcache_fx.references import BlocksOutput, Latents, ModulatedInput
from diffcache_fx.selection import Selection

from .conftest import Sample, captured, sample, text, with_regions

pytestmark = pytest.mark.usefixtures("one_thread")
X, T = torch.randn(2, 8, generator=torch.Generator().manual_seed(1)), torch.tensor(0.5)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(8, 8, bias=False)

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return x + self.lin(x * scale)


class Net(nn.Module):
    """Three residual blocks, modulated by the timestep."""

    def __init__(self, enters: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter = nn.Linear(8, 8, bias=False) if enters else nn.Identity()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(8, 8, bias=False)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        scale, x = t + 1, self.enter(x)
        for block in self.blocks:
            x = block(x, scale)
        return self.head(x)


NET = Net()
FBC, TEA = RelativeChange(BlocksOutput(1), 0.1), RelativeChange(ModulatedInput(), 0.1, "step", accumulate=True)


def measuring(guard: AdaptiveGuard, selection: Selection, model: nn.Module = NET) -> StepProgram:
    base = with_regions(captured(model, X, T), selection, storage="residual")
    return run_passes(base, (AddSignals(((0, guard),)),))


def of(selection: Selection, model: nn.Module = NET, name: str = "") -> StepProgram:
    if name:
        return sample(name).with_regions(selection)
    return with_regions(captured(model, X, T), selection)


def targets(program: StepProgram) -> tuple[list[str], list[str]]:
    """What goes in beside weights and the caller's tensors, and what comes out, in short."""
    plain = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT, InputKind.USER)
    takes = [f"{entry.kind.value} {entry.target}" for entry in program.inputs if entry.kind not in plain]
    return takes, [f"{entry.kind.value} {entry.target}" for entry in program.outputs]


Values = dict[tuple[Any, str], torch.Tensor]


def evaluate(program: StepProgram, module: nn.Module, users: list[torch.Tensor], given: Mapping[Any, Any]) -> Values:
    """A program's results by kind and target; inputs that are not given are zeros."""
    parameters, tensors = Parameters(module), dict(zip(program.signature.tensor_leaves, users, strict=True))
    args = []
    for entry, node in zip(program.inputs, program.graph.find_nodes(op="placeholder"), strict=True):
        if entry.kind is InputKind.USER:
            args.append(tensors[int(entry.target)])
        elif entry.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            args.append(parameters(entry.target))
        elif entry.kind is InputKind.CONSTANT:
            args.append(program.constants[entry.target])
        else:
            like = node.meta["val"]
            args.append(given.get((entry.kind, entry.target), torch.zeros(like.shape, dtype=like.dtype)))
    with torch.no_grad():
        results = program.module(*args)
    return {(entry.kind, entry.target): value for entry, value in zip(program.outputs, results, strict=True)}


# --- before and after ---

STEP = [
    "add = add(t, 1)",
    "linear = linear(x, p_enter_weight)",
    "mul = mul(linear, add)",
    "linear_1 = linear(mul, p_blocks_0_lin_weight)",
    "add_1 = add(linear, linear_1)",
    "mul_1 = mul(add_1, add)",
    "linear_2 = linear(mul_1, p_blocks_1_lin_weight)",
    "add_2 = add(add_1, linear_2)",
    "mul_2 = mul(add_2, add)",
    "linear_3 = linear(mul_2, p_blocks_2_lin_weight)",
    "add_3 = add(add_2, linear_3)",
    "linear_4 = linear(add_3, p_head_weight)",
]
SIGNAL = [
    "sub_tensor = sub(add_1, linear)",
    "sub = sub(sub_tensor, kept_0_p)",
    "abs_1 = abs(sub)",
    "mean = mean(abs_1)",
    "abs_2 = abs(kept_0_p)",
    "mean_1 = mean(abs_2)",
    "eq = eq(mean_1, 0)",
    "masked_fill = masked_fill(mean_1, eq, 1.0)",
    "div = div(mean, masked_fill)",
    "masked_fill_1 = masked_fill(div, eq, 0.0)",
]


def test_a_signal_and_what_it_is_measured_from_are_added() -> None:
    base = with_regions(captured(NET, X, T), Trunk(first=1), storage="residual")
    before = text(base.graph)
    assert before.splitlines() == [*STEP, "return linear_4"]
    after = AddSignals(((0, FBC),))(base)
    assert text(after.graph).splitlines() == [*STEP, *SIGNAL, "return linear_4, masked_fill_1, sub_tensor"]
    assert targets(after) == (["memory 0/p"], ["user 0", "signal 0/change", "memory 0/p"])
    assert (after.measured[0].before, after.measured[0].early) == (("change",), ("p",))
    assert text(base.graph) == before
    assert AddSignals()(after) is after


def test_the_step_is_split_at_the_decision() -> None:
    program = measuring(FBC, Trunk(first=1))
    before = text(program.graph)
    rest = run_passes(program, (Specialize(frozenset()), RestOfStep()))
    body = "\n".join(STEP[5:]).replace("add_1,", "live_add_1,").replace("add)", "live_add)").splitlines()
    assert text(rest.graph).splitlines() == [
        *body[:-1],
        "linear_4 = linear(add_3, p_head_weight)",
        "sub_tensor_1 = sub(add_3, live_add_1)",
        "return linear_4, sub_tensor_1",
    ]
    assert targets(rest) == (["live add", "live add_1"], ["user 0", "state blocks.1..blocks.2/0"])
    reuse = run_passes(program, (Specialize(frozenset({"blocks.1..blocks.2"})), RestOfStep()))
    assert text(reuse.graph).splitlines() == [
        "add_tensor = add(live_add_1, h_blocks_1__blocks_2_0_0)",
        "linear_4 = linear(add_tensor, p_head_weight)",
        "return linear_4",
    ]
    probe = run_passes(program, (Probe(live_names(rest)),))
    assert text(probe.graph).splitlines() == [*STEP[:5], *SIGNAL, "return masked_fill_1, sub_tensor, add, add_1"]
    assert targets(probe) == (["memory 0/p"], ["signal 0/change", "memory 0/p", "live add", "live add_1"])
    weights = {entry.target for _, entry in probe.inputs_of(InputKind.PARAMETER)}
    assert weights == {"enter.weight", "blocks.0.lin.weight"}
    assert text(program.graph) == before


def test_the_decision_in_the_graph() -> None:
    program = measuring(FBC, Trunk(first=1))
    control = Control(0, FBC, Limits(longest_reuse=3), Hold())
    guarded = run_passes(program, (InsertGuards(None, control),))
    lines = text(guarded.graph).splitlines()
    assert lines[: len(STEP[:5]) + len(SIGNAL)] == [*STEP[:5], *SIGNAL]
    assert any(line.endswith("= lt(number_0_run, 3.0)") for line in lines)
    assert any(line.endswith(", 0.1)") and "lt(" in line for line in lines)
    (cond,) = (line for line in lines if line.startswith("cond = "))
    (place,) = (i for i, output in enumerate(guarded.outputs) if output.kind is OutputKind.DECISION)
    refresh = returned(guarded.graph)[place].name
    assert cond.startswith(f"cond = cond({refresh}, on_refresh, on_reuse, ")
    assert f"where_self = where({refresh}, sub_tensor, kept_0_p)" in lines
    assert any(line.endswith(f"= masked_fill(add_2, {refresh}, 0.0)") for line in lines)
    arms = [guarded.module.on_refresh, guarded.module.on_reuse]
    assert [text(arm.graph).count("linear(") for arm in arms] == [3, 1]
    assert sum(text(m.graph).count("blocks_0_lin") for m in {m for m, _ in walk(guarded.module)}) == 1
    numbers = [f"memory 0/#{name}" for name in ("run", "reuses", "refreshes")]
    takes, gives = targets(guarded)
    assert takes == ["memory 0/p", "history blocks.1..blocks.2/0/0", *numbers, "force 0", "moment 0"]
    assert gives[2:] == ["decision 0", "signal 0/#signal", "signal 0/#limit", *numbers, "memory 0/p"]


def test_a_verified_forecast_is_compared_with_what_it_stands_for() -> None:
    program = measuring(DraftError(0.1), Blocks(first=0, tail=1))
    assert text(program.graph).splitlines() == [*STEP, "return linear_4"]
    assert program.measured[0].checks == ("blocks.2",)
    reuse = Specialize(frozenset({"blocks.0..blocks.1", "blocks.2"}))(program)
    assert targets(reuse)[1] == ["user 0", "signal 0/error"]
    residuals = X * 3, X - 1
    names = ("blocks.0..blocks.1/0/0", "blocks.2/0/0")
    given = {(InputKind.HISTORY, name): value for name, value in zip(names, residuals, strict=True)}
    found = evaluate(reuse, NET, [X, T], given)
    with torch.no_grad():
        entering = NET.enter(X) + residuals[0]
        last, computed = entering + residuals[1], NET.blocks[2](entering, T + 1)
        assert torch.equal(found[OutputKind.USER, "0"], NET.head(last))
    error = (last - computed).abs().mean() / computed.abs().mean()
    assert torch.allclose(found[OutputKind.SIGNAL, "0/error"], error)
    refresh = evaluate(Specialize(frozenset())(program), NET, [X, T], {})
    assert refresh[OutputKind.SIGNAL, "0/error"] == 0.0


# --- where the quantities are ---


def test_references_name_what_they_found() -> None:
    references = References(of(Trunk()))
    found = [references.find(r) for r in (BlocksOutput(1), BlocksOutput(2), ModulatedInput(), Latents())]
    names = [(str(node), str(base)) for node, base in found]
    assert names == [("add_1", "linear"), ("add_2", "linear"), ("mul", "None"), ("x", "None")]


class Watch:
    """What flows through the first blocks and into block 0's first layer, taken by hooks on the plain module."""

    def __init__(self, model: Sample, block: str, layer: str, count: int) -> None:
        self.entered: list[torch.Tensor] = []
        self.left: list[torch.Tensor] = []
        self.modulated: list[torch.Tensor] = []
        stem, number = block.rpartition(".")[::2]
        hooks = [model.module.get_submodule(f"{block}.{layer}").register_forward_pre_hook(self._layer)]
        for index in range(count):
            found = model.module.get_submodule(f"{stem}.{int(number) + index}")
            hooks.append(found.register_forward_hook(self._block, with_kwargs=True))
        args, kwargs = model.entry.inputs(1)
        with torch.no_grad():
            model.module(*args, **kwargs)
        for hook in hooks:
            hook.remove()

    def _layer(self, module: nn.Module, args: Any) -> None:
        self.modulated.append(args[0])

    def _block(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.entered.append(kwargs.get("hidden_states", args[0] if args else None))
        outputs = output if isinstance(output, tuple) else (output,)
        self.left += [value for value in outputs if value.shape == self.entered[-1].shape][-1:]


FIRST = {
    "plain-dit-shared-adaln": ("blocks.0", "qkv"),
    "DiTTransformer2DModel": ("transformer_blocks.0", "attn1.to_q"),
    "PixArtTransformer2DModel": ("transformer_blocks.0", "attn1.to_q"),
    "FluxTransformer2DModel": ("transformer_blocks.0", "attn.to_q"),
    "WanTransformer3DModel": ("blocks.0", "attn1.to_q"),
}


def kept_by(guard: AdaptiveGuard, model: Sample) -> Values:
    """What a guard may keep of the sample's second call, as the graph measures it."""
    program = run_passes(model.with_regions(Trunk(first=2), "residual"), (AddSignals(((0, guard),)),))
    return evaluate(program, model.module, model.users(1), {})


@pytest.mark.parametrize("name", FIRST)
def test_what_leaves_the_first_blocks_is_what_hooks_see(name: str) -> None:
    model = sample(name)
    seen = Watch(model, *FIRST[name], count=2)
    for count in (1, 2):
        found = kept_by(ProbeChange(0.1, count, minus_input=True), model)
        out, entered = seen.left[count - 1], seen.entered[0]
        assert torch.equal(found[OutputKind.MEMORY, "0/y"], out)
        assert torch.equal(found[OutputKind.MEMORY, "0/x"], entered)
        assert torch.equal(found[OutputKind.MEMORY, "0/p"], out - entered)
        assert not torch.equal(out, entered)


@pytest.mark.parametrize("name", FIRST)
def test_the_modulated_input_is_what_hooks_see(name: str) -> None:
    model = sample(name)
    seen = Watch(model, *FIRST[name], count=1)
    assert torch.equal(kept_by(TEA, model)[OutputKind.MEMORY, "0/p"], seen.modulated[0])


def test_a_cast_to_the_type_of_the_latents_does_not_depend_on_them() -> None:
    """As in Z-Image: the modulation is made from the timestep alone, in the latents' dtype."""

    class Cast(Net):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            x = self.enter(x)
            scale = (t + 1).type_as(x)
            for block in self.blocks:
                x = block(x, scale)
            return self.head(x)

    net = Cast()
    found = evaluate(measuring(TEA, Trunk(first=0), net), net, [X, T], {})
    with torch.no_grad():
        assert torch.equal(found[OutputKind.MEMORY, "0/p"], net.enter(X) * (T + 1))


def test_latents_may_enter_the_first_block_as_they_are() -> None:
    net = Net(enters=False)
    found = evaluate(measuring(FBC, Trunk(first=1), net), net, [X, T], {})
    with torch.no_grad():
        assert torch.equal(found[OutputKind.MEMORY, "0/p"], net.blocks[0](X, T + 1) - X)


@pytest.mark.parametrize("guard", [FBC, TEA, ProbeChange()])
def test_a_unet_has_no_first_block(guard: AdaptiveGuard) -> None:
    base = sample("plain-unet").with_regions(Trunk(), "value")
    with pytest.raises(RegionError) as error:
        AddSignals(((0, guard),))(base)
    for word in (guard.kind, "U-Net", "easy_cache", "mag_cache", "deep_cache"):
        assert word in str(error.value)
    whole = sample("plain-unet").with_regions(Whole(), "residual")
    assert AddSignals(((0, OutputChange()),))(whole).measured[0].late == ("v",)


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.second(t * self.first(x))


@pytest.mark.parametrize(
    ("guard", "make", "words"),
    [
        (FBC, lambda: of(Whole(), Flat()), ("no repeated blocks", "easy_cache", "mag_cache", "static schedules")),
        (TEA, lambda: of(Trunk(), name="plain-mlp"), ("blocks.0", "not modulated", "first_block_cache", "easy_cache")),
        (TEA, lambda: of(Trunk(), name="plain-vit"), ("layers.0", "not modulated", "di_cache", "static schedules")),
        (RelativeChange(BlocksOutput(3)), lambda: of(Trunk()), ("first 3 blocks", "has 3", "watch fewer")),
        (ProbeChange(0.1, 9), lambda: of(Trunk()), ("probe_change", "first 9 blocks", "watch fewer")),
        (
            RelativeChange(BlocksOutput(2)),
            lambda: of(Blocks(first=1, each=True)),
            ("relative_change", "only after the regions", "blocks.1", "leave more blocks out", "first="),
        ),
    ],
)
def test_a_guard_that_does_not_apply(guard: AdaptiveGuard, make: Any, words: tuple[str, ...]) -> None:
    program = make()
    with pytest.raises(RegionError) as error:
        AddSignals(((0, guard),))(program)
    for word in words:
        assert word in str(error.value)


def test_a_signal_may_look_into_the_region_it_decides_for() -> None:
    probe = Probe(())(measuring(RelativeChange(BlocksOutput(2)), Trunk(first=1)))
    assert "sub_tensor = sub(add_2, linear)" in text(probe.graph).splitlines()
