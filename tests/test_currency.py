"""Invariant 7, currency: whatever is changed in the model after compilation takes effect at the next generation, or is
refused with the reason; it is never silently ignored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.zoo import corpus, tensors
from diffcache_fx import CacheSchedule, StaleProgramError, compile_with_cache, schedules

STEPS = 3


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Tiny kernels are slower on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Block(nn.Module):
    """A residual block with a buffer, a switch and a strength in Python."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(dim, 2 * dim), nn.Linear(2 * dim, dim)
        self.register_buffer("shift", 0.1 * torch.randn(dim))
        self.scale = 1.0
        self.settings = {"gain": 2.0, "order": [1, 2]}

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        hidden = self.up(x + self.shift).tanh() * t
        return x + self.scale * self.settings["gain"] * self.settings["order"][0] * self.down(hidden)  # type: ignore


class Small(nn.Module):
    """A denoiser of residual blocks, with a table that is neither parameter nor buffer."""

    def __init__(self, dim: int = 16, depth: int = 4) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(depth))
        self.table = torch.linspace(0.5, 1.5, dim)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x = self.enter(x) * self.table.to(x.dtype)
        for block in self.blocks:
            x = block(x, t)
        return self.leave(x)


def _small() -> Small:
    torch.manual_seed(0)
    return Small().eval()


@pytest.fixture(params=["always", "interval"])
def schedule(request: pytest.FixtureRequest) -> CacheSchedule:
    return schedules.always() if request.param == "always" else schedules.interval(2)


def _generation(denoiser: Any, dtype: torch.dtype = torch.float32, context: bool = True) -> list[Tensor]:
    """STEPS calls on seeded inputs, as one generation (of a plain module: just the calls)."""
    generator = torch.Generator().manual_seed(1)
    outputs = []
    with torch.no_grad():
        for step in range(STEPS):
            x = torch.randn(2, 5, 16, generator=generator).to(dtype)
            outputs.append(denoiser(x, torch.tensor(1.0 - step / 10, dtype=dtype)))
    if hasattr(denoiser, "reset"):
        denoiser.reset()
    return outputs


def _same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(left, right, strict=True))


# Each change, as a user makes it, and whether the model must be captured again for it.
CHANGES: dict[str, Callable[[Small], Any]] = {
    "parameter edited in place": lambda m: m.blocks[2].up.weight.data.mul_(1.5),
    "parameter edited under no_grad": lambda m: m.blocks[1].down.bias.requires_grad_(False).add_(0.3),
    "parameter given other data": lambda m: setattr(m.blocks[1].up.weight, "data", torch.randn(32, 16)),
    "state loaded": lambda m: m.load_state_dict({k: v + 0.1 for k, v in m.state_dict().items()}),
    "state assigned": lambda m: m.load_state_dict({k: v + 0.1 for k, v in m.state_dict().items()}, assign=True),
    "parameter replaced": lambda m: setattr(m.blocks[1].up, "weight", nn.Parameter(torch.randn(32, 16))),
    "buffer edited in place": lambda m: m.blocks[3].shift.mul_(3),
    "buffer replaced": lambda m: setattr(m.blocks[1], "shift", torch.randn(16)),
    "scalar changed": lambda m: setattr(m.blocks[2], "scale", 0.5),
    "scalar of the kept block changed": lambda m: setattr(m.blocks[0], "scale", 0.5),
    "scalar in a dict changed": lambda m: m.blocks[2].settings.update(gain=3.0),
    "scalar in a list changed": lambda m: m.blocks[2].settings["order"].insert(0, 4),
    "submodule replaced by another class": lambda m: setattr(m.blocks[2], "down", nn.Linear(32, 16, bias=False)),
    "submodule replaced by the same class": lambda m: setattr(m.blocks[2], "down", nn.Linear(32, 16)),
    "block removed": lambda m: m.blocks.pop(3),
    "block added": lambda m: m.blocks.append(Block(16)),
    "forward hook": lambda m: m.blocks[1].register_forward_hook(lambda module, args, out: out * 1.1),
    "forward pre-hook": lambda m: m.enter.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
    "forward replaced": lambda m: setattr(m.leave, "forward", lambda x: x * 2),
    "tensor attribute edited in place": lambda m: m.table.mul_(2),
    "tensor attribute replaced": lambda m: setattr(m, "table", torch.linspace(1, 2, 16)),
    "parametrised": lambda m: (
        nn.utils.parametrizations.weight_norm(m.blocks[1].up)
        .parametrizations.weight[0]
        .register_buffer("extra", torch.zeros(1))
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_takes_effect(change: str, schedule: CacheSchedule) -> None:
    model = _small()
    cached = compile_with_cache(model, schedule, backend="eager")
    before = _generation(cached)
    assert _same(_generation(cached), before)
    torch.manual_seed(7)
    CHANGES[change](model)
    after = _generation(cached)
    assert not _same(after, before), f"{change}: ignored"
    assert torch.equal(after[0], _generation(model)[0])  # the first step computes everything
    assert _same(after, _generation(compile_with_cache(model, schedule, backend="eager")))
    if schedule.name == "always":
        assert _same(after, _generation(model))
    assert _same(_generation(cached), after)


@pytest.mark.parametrize("change", ["parameter edited in place", "state assigned", "buffer replaced"])
def test_new_values_need_no_new_program(change: str) -> None:
    model = _small()
    cached = compile_with_cache(model, schedules.interval(2), backend="eager")
    _generation(cached)
    compilations = cached.stats().compilations
    CHANGES[change](model)
    _generation(cached)
    assert cached.stats().compilations == compilations
    assert cached.stats().recaptures == ()


def test_a_recapture_says_why() -> None:
    model = _small()
    cached = compile_with_cache(model, schedules.interval(2), backend="eager")
    _generation(cached)
    model.blocks[2].scale = 0.25
    _generation(cached)
    assert cached.stats().recaptures == ("blocks.2.scale: 1.0 became 0.25",)
    assert "blocks.2.scale" in cached.summary()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_cast_takes_effect(dtype: torch.dtype, schedule: CacheSchedule) -> None:
    model = _small()
    cached = compile_with_cache(model, schedule, backend="eager")
    before = _generation(cached)
    assert cached.to(dtype) is cached
    after = _generation(cached, dtype)
    assert after[0].dtype == dtype
    assert torch.equal(after[0], _generation(model, dtype)[0])
    assert _same(after, _generation(compile_with_cache(model, schedule, backend="eager"), dtype))
    cached.to(torch.float32)
    back = _generation(cached)
    assert torch.equal(back[0], _generation(model)[0])
    assert dtype != torch.float64 or _same(back, before)


def test_a_change_in_the_middle_of_a_generation_mixes_nothing_up() -> None:
    """New values may take effect at once or at the next generation; the next one is clean in any case."""
    model = _small()
    cached = compile_with_cache(model, schedules.interval(2), backend="eager")
    x, t = torch.randn(2, 5, 16), torch.tensor(1.0)
    with torch.no_grad():
        cached(x, t)
        model.blocks[2].scale = 0.5
        model.blocks[1].up = nn.Linear(16, 32)
        cached(x + 1, t - 0.1)
    cached.reset()
    assert torch.equal(_generation(cached)[0], _generation(model)[0])


def test_weights_on_the_meta_device_are_refused(schedule: CacheSchedule) -> None:
    model = _small()
    cached = compile_with_cache(model, schedule, backend="eager")
    before = _generation(cached)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.to("meta")
    with pytest.raises(StaleProgramError, match="meta"):
        _generation(cached)
    cached.reset()
    model.to_empty(device="cpu").load_state_dict(state)
    assert _same(_generation(cached), before)
    nn.Module.to(model.blocks[1], "meta")
    with pytest.raises(StaleProgramError, match=r"meta.*blocks\.1|blocks\.1.*meta"):
        _generation(cached)


def test_offloading_by_accelerate_is_refused(schedule: CacheSchedule) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = _small()
    cached = compile_with_cache(model, schedule, backend="eager")
    before = _generation(cached)
    plain = _generation(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)
    assert next(model.parameters()).device.type == "meta"
    assert _same(_generation(model), plain)
    with pytest.raises(StaleProgramError, match="meta"):
        _generation(cached)
    accelerate.hooks.remove_hook_from_submodules(model)
    model.to_empty(device="cpu").load_state_dict(state)
    cached.reset()
    assert _same(_generation(cached), before)


def test_weights_are_shared_and_keys_are_the_models() -> None:
    model = _small()
    cached = compile_with_cache(model, schedules.interval(2), backend="eager")
    _generation(cached)
    own = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers(), model.table)}
    assert {tensor.data_ptr() for tensor in (*cached.parameters(), *cached.buffers(), cached.table)} == own
    captured = cached._captured()
    assert {value.data_ptr() for value in captured.program.constants.values()} <= own
    for steps in captured._sets.values():
        for template in steps._templates.values():
            given = [value for value in template if isinstance(value, Tensor)]
            assert given
            assert {value.data_ptr() for value in given} <= own
    assert list(cached.state_dict()) == list(model.state_dict())
    assert all(cached.state_dict()[name].data_ptr() == value.data_ptr() for name, value in model.state_dict().items())
    cached.load_state_dict({name: value + 1 for name, value in model.state_dict().items()})
    assert torch.equal(_generation(cached)[0], _generation(model)[0])


# --- LoRA on a diffusers model -----------------------------------------------------------------------------------


def _short_flux() -> nn.Module:
    """The corpus's FLUX with its first blocks only: every change of an adapter traces it anew."""
    model: Any = corpus()["FluxTransformer2DModel"].build()
    del model.transformer_blocks[1:], model.single_transformer_blocks[2:]
    return model


def _run(denoiser: Any) -> list[Tensor]:
    args, kwargs = corpus()["FluxTransformer2DModel"].inputs(0)
    outputs = []
    with torch.no_grad():
        for step in range(STEPS):
            outputs += tensors(denoiser(*args, **{**kwargs, "timestep": kwargs["timestep"] * (1 - 0.1 * step)}))
    if hasattr(denoiser, "reset"):
        denoiser.reset()
    return outputs


def test_lora_is_followed_through_its_life() -> None:
    peft = pytest.importorskip("peft")
    model: Any = _short_flux()
    cached = compile_with_cache(model, schedules.interval(2), backend="eager")
    seen = [_run(cached)]

    def check(what: str, changed: bool = True) -> None:
        outputs = _run(cached)
        assert torch.equal(outputs[0], _run(model)[0]), f"{what}: the first step differs from the model"
        assert changed != _same(outputs, seen[-1]), f"{what}: {'ignored' if changed else 'changed'}"
        seen.append(outputs)

    torch.manual_seed(3)
    targets = ["to_q", "to_v", "proj_out"]
    model.add_adapter(peft.LoraConfig(r=2, lora_alpha=4, target_modules=targets, init_lora_weights=False), "one")
    check("add_adapter")
    model.set_adapters(["one"], [0.3])
    check("set_adapters to 0.3")
    model.set_adapters(["one"], [0.3])
    check("set_adapters to the same weight", changed=False)
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["to_k"], init_lora_weights=False), "two")
    check("a second adapter")
    model.set_adapters(["one", "two"], [0.5, 0.9])
    check("both adapters")
    model.disable_adapters()
    check("disable_adapters")
    model.enable_adapters()
    check("enable_adapters")
    model.fuse_lora(lora_scale=0.7)
    check("fuse_lora")
    model.unfuse_lora()
    check("unfuse_lora")
    for name, parameter in model.named_parameters():
        if "lora_B.two" in name:
            parameter.data.mul_(2)
    check("adapter weights edited in place")
    model.delete_adapters("two")
    check("delete_adapters")
    model.unload_lora()
    check("unload_lora")
    assert _same(seen[-1], _run(compile_with_cache(model, schedules.interval(2), backend="eager")))
    assert torch.allclose(seen[-1][0], seen[0][0], atol=1e-4)
