"""Capture: any call of a module to one functional program, with the calling convention kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from diffcache_fx.passes.purity import mutates
from diffusers.utils import BaseOutput
from torch import nn

from diffcache_fx import CallError, CaptureError, Modules, compile_with_cache, schedules
from diffcache_fx.capture import capture
from diffcache_fx.program import InputKind

from .conftest import equal, flat_users, run

pytestmark = pytest.mark.usefixtures("one_thread")


@dataclass
class Prediction(BaseOutput):
    sample: torch.Tensor
    extra: Any = None


class Pair(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


class Net(nn.Module):
    """A residual block between an entry and a head; `how` says what it returns."""

    def __init__(self, how: Callable[..., Any] = lambda y, **k: y) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3))
        self.head = nn.Linear(8, 8)
        self.register_buffer("scale", torch.tensor(2.0))
        self.how = [how]

    def body(self, x: torch.Tensor, t: Any) -> torch.Tensor:
        x = x * self.scale + torch.as_tensor(t).to(x.dtype).sin()
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: Any,
        cond: dict[str, Any] | None = None,
        return_dict: bool = True,
        frames: int = 1,
    ) -> Any:
        y = self.body(sample, timestep)
        if cond is not None:
            y = y + cond["text"] * cond.get("weight", 1.0)
        y = y[:, :frames].repeat(1, 8 // frames) if frames > 1 else y
        return self.how[0](y, return_dict=return_dict)


X, T, TEXT = torch.randn(2, 8), torch.tensor(500.0), torch.randn(2, 8)


def cached(model: nn.Module, every: int = 1, **options: Any) -> Any:
    schedule = schedules.interval(every, regions=Modules(("blocks.*",)))
    return compile_with_cache(model.eval(), schedule, backend="eager", **options)


def leaves(output: Any) -> list[torch.Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]


HOWS: dict[str, Callable[..., Any]] = {
    "tensor": lambda y, **k: y,
    "tuple": lambda y, **k: (y, y + 1),
    "one tuple": lambda y, **k: (y,),
    "list": lambda y, **k: [y, [y + 1]],
    "dict": lambda y, **k: {"sample": y, "norm": y.norm()},
    "named tuple": lambda y, **k: Pair(y, y * 2),
    "dataclass": lambda y, return_dict: Prediction(y) if return_dict else (y,),
    "with literals": lambda y, **k: (y, None, 3, "text"),
}


@pytest.mark.parametrize("how", HOWS)
def test_outputs_of_every_kind(how: str) -> None:
    model = Net(HOWS[how]).eval()
    denoiser = cached(model)
    for return_dict in (True, False):
        with torch.no_grad():
            got, expected = (m(X, T, return_dict=return_dict) for m in (denoiser, model))
        assert type(got) is type(expected)
        assert equal(leaves(got), leaves(expected))
        if how == "with literals":
            assert got[1:] == expected[1:]
        if how == "dataclass" and return_dict:
            assert torch.equal(got.sample, got[0])
            assert got.extra is None


def test_arguments_by_position_and_by_keyword() -> None:
    model = Net().eval()
    denoiser = cached(model)
    calls = [
        ((X, T), {}),
        ((X,), {"timestep": T}),
        ((), {"timestep": T, "sample": X}),
        ((), {"sample": X, "timestep": T}),
        ((X, T), {"cond": {"text": TEXT}}),
        ((X, T), {"cond": {"text": TEXT, "weight": 0.5}}),
        ((X, T, None, False), {}),
    ]
    for args, kwargs in calls:
        with torch.no_grad():
            assert torch.equal(denoiser(*args, **kwargs), model(*args, **kwargs))


def test_names_of_the_inputs() -> None:
    program, _ = capture(Net().eval(), (X, T), {"cond": {"text": TEXT, "weight": 0.5}})
    names = [entry.name for _, entry in program.inputs_of(InputKind.USER)]
    assert names == ["sample", "timestep", "cond_text", "cond_weight"]
    parameters = {entry.target for _, entry in program.inputs_of(InputKind.PARAMETER)}
    assert parameters == {name for name, _ in Net().named_parameters()}
    assert {entry.target for _, entry in program.inputs_of(InputKind.BUFFER)} == {"scale"}


@pytest.mark.parametrize("value", [500, 500.0])
def test_numbers_become_tensors(value: float) -> None:
    model = Net().eval()
    program, _ = capture(model, (X, value))
    assert len(program.signature.numbers) == 1
    denoiser = cached(model)
    for t in (value, value - 100, value - 200):
        with torch.no_grad():
            assert torch.equal(denoiser(X, t), model(X, t))
    assert len(list(denoiser._own["entries"].values())) == 1 if "entries" in denoiser._own else True
    assert denoiser.stats().compilations <= 2


def test_numbers_that_reach_a_shape_stay_constants() -> None:
    model = Net().eval()
    program, _ = capture(model, (X, 500), {"frames": 4})
    assert [program.signature.names[i] for i in program.signature.numbers] == ["timestep"]
    denoiser = cached(model)
    for frames in (4, 2, 4):
        denoiser.reset()
        with torch.no_grad():
            assert torch.equal(denoiser(X, 500, frames=frames), model(X, 500, frames=frames))


def test_the_program_is_functional() -> None:
    class Writes(Net):
        def body(self, x: torch.Tensor, t: Any) -> torch.Tensor:
            y = torch.zeros_like(x)
            y[:, :4].copy_(x[:, 4:])
            y += super().body(x, t)
            return y

    model = Writes().eval()
    program, _ = capture(model, (X, T))
    assert not any(mutates(node) for node in program.graph.nodes if node.op == "call_function")
    with torch.no_grad():
        assert equal(run(program, model, flat_users(model, (X, T), {}, program)).outputs, [model(X, T)])


def test_autocast_belongs_to_the_signature() -> None:
    model = Net().eval()
    denoiser = cached(model)
    with torch.no_grad():
        plain = denoiser(X, T)
        denoiser.reset()
        with torch.autocast("cpu", torch.bfloat16):
            lower, expected = denoiser(X, T), model(X, T)
        denoiser.reset()
        again = denoiser(X, T)
    assert lower.dtype == expected.dtype == torch.bfloat16
    assert torch.equal(lower, expected)
    assert torch.equal(plain, again)
    assert plain.dtype == torch.float32


def test_new_shapes_and_types_are_captured_once() -> None:
    model = Net().eval()
    denoiser = cached(model)
    calls = []
    original = denoiser.model.forward
    for batch in (2, 3, 2, 3, 1):
        denoiser.reset()
        x = torch.randn(batch, 8)
        with torch.no_grad():
            assert torch.equal(denoiser(x, T), original(x, T))
        calls.append(denoiser.stats().compilations)
    assert calls[1] == calls[2] == calls[3] < calls[4]


def test_signatures_are_bounded() -> None:
    model = Net().eval()
    denoiser = cached(model)
    for batch in range(1, 14):
        denoiser.reset()
        with torch.no_grad():
            denoiser(torch.randn(batch, 8), T)
    before = denoiser.stats().compilations
    denoiser.reset()
    with torch.no_grad():
        denoiser(torch.randn(13, 8), T)  # kept
        assert denoiser.stats().compilations == before
        denoiser.reset()
        denoiser(torch.randn(1, 8), T)  # dropped long ago
    assert denoiser.stats().compilations > before


def test_dynamic_sizes() -> None:
    model = Net().eval()
    denoiser = cached(model, every=2, dynamic=True)
    with torch.no_grad():
        for batch in (2, 3, 7):
            denoiser.reset()
            for step in range(3):
                x = torch.randn(batch, 8)
                got = denoiser(x, T - 100 * step)
                assert got.shape == x.shape
                assert torch.equal(got, model(x, T - 100 * step)) == (step != 1)
    assert denoiser.stats().compilations == 2


@pytest.mark.parametrize("name", ["plain-unet", "plain-dit-shared-adaln"])
def test_dynamic_sizes_on_the_corpus(name: str) -> None:
    from bench.zoo import corpus

    entry = corpus()[name]
    model = entry.build()
    denoiser = compile_with_cache(model, schedules.interval(2), backend="eager", dynamic=True)
    (x, t, y), _ = entry.inputs(0)
    with torch.no_grad():
        for batch in (2, 4):
            denoiser.reset()
            call = (x[:1].repeat(batch, 1, 1, 1), t[:1].repeat(batch), y[:1].repeat(batch))
            expected = model(*call)
            assert torch.allclose(denoiser(*call), expected, atol=1e-5 * float(expected.abs().max()))
            denoiser(call[0] * 0.9, call[1] - 10, call[2])
            assert denoiser.stats().reused == 1


def test_constants_made_by_the_model() -> None:
    class Tables(Net):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.linspace(0, 1, 8)  # a plain attribute, neither parameter nor buffer

        def body(self, x: torch.Tensor, t: Any) -> torch.Tensor:
            return super().body(x + self.table + torch.tensor([1.0, 2.0] * 4), t)

    model = Tables().eval()
    program, _ = capture(model, (X, T))
    assert program.constants
    with torch.no_grad():
        assert equal(run(program, model, flat_users(model, (X, T), {}, program)).outputs, [model(X, T)])


def refused(model: nn.Module, *words: str, error: type[Exception] = CaptureError) -> None:
    with pytest.raises(error) as found:
        capture(model.eval(), (X, T))
    for word in words:
        assert word in str(found.value), str(found.value)


def test_a_model_that_keeps_state_is_refused() -> None:
    class Counting(Net):
        def body(self, x: torch.Tensor, t: Any) -> torch.Tensor:
            self.scale += 1
            return super().body(x, t)

    refused(Counting(), "Counting", "scale", "side effects")


def test_a_model_that_draws_random_numbers_is_refused() -> None:
    class Noisy(Net):
        def body(self, x: torch.Tensor, t: Any) -> torch.Tensor:
            return super().body(x + torch.randn_like(x), t)

    refused(Noisy(), "Noisy", "random")


def test_a_model_that_branches_on_data_is_refused_with_its_line() -> None:
    class Branching(Net):
        def body(self, x: torch.Tensor, t: Any) -> torch.Tensor:
            if float(x.sum()) > 0:
                x = x + 1
            return super().body(x, t)

    refused(Branching(), "Branching", "test_capture.py", "if float(x.sum()) > 0", "Try:")


def test_a_model_without_tensors_is_refused() -> None:
    refused(Net(lambda y, **k: "text"), "returns no tensor", "'text'")
    with pytest.raises(CallError, match="no tensor"):
        capture(Net().eval(), (3, 4))


def test_the_module_is_left_as_it_was() -> None:
    model = Net().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    attributes = sorted(vars(model))
    capture(model, (X, T))
    assert sorted(vars(model)) == attributes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_copies_share_nothing_but_weights() -> None:
    program, _ = capture(Net().eval(), (X, T))
    other = program.copy()
    assert [node.name for node in other.graph.nodes] == [node.name for node in program.graph.nodes]
    assert all(a is not b for a, b in zip(other.graph.nodes, program.graph.nodes, strict=True))
    other.graph.erase_node(next(reversed(other.graph.nodes)))
    assert any(node.op == "output" for node in program.graph.nodes)
    assert "def forward" in program.code()
