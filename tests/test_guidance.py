"""What guidance branches share: T-GATE's mean of their cross-attention, FasterCache's branch rebuilt from the other."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from diffcache_fx import (
    CachedDenoiser,
    CacheSchedule,
    Hold,
    Interval,
    RegionError,
    Rule,
    ScheduleError,
    Trunk,
    compile_with_cache,
    export,
    schedules,
)
from diffcache_fx.guidance import Reconstruct, is_unconditional

from .conftest import equal, sample, worst

pytestmark = pytest.mark.usefixtures("one_thread")


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        return self.out(F.scaled_dot_product_attention(self.q(x), self.k(seen), self.v(seen)))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn1, self.attn2, self.ff = Attention(), Attention(), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        x = x + self.attn1(x, x)
        x = x + self.attn2(x, text)
        return x + self.ff(x)


class Painter(nn.Module):
    """Latents [batch, 4, height, width] through two blocks that read a text [batch, length, 8]."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.head = nn.Linear(4, 8), nn.Linear(8, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        tokens = self.enter(x.flatten(2).transpose(1, 2)) * (1 + 0.001 * timestep)
        for block in self.blocks:
            tokens = block(tokens, text)
        return self.head(tokens).transpose(1, 2).reshape(x.shape).contiguous()


PAINTER = Painter().eval()
CROSS = [f"blocks.{i}.attn2" for i in range(2)]


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


PROMPT, EMPTY = noise(100, 2, 3, 8), noise(101, 2, 3, 8)
TEXTS = {"cond": PROMPT, "uncond": EMPTY}


def latents(step: int) -> torch.Tensor:
    return noise(0, 2, 4, 6, 4) + 0.1 * noise(1 + step, 2, 4, 6, 4)


def moment(step: int, steps: int = 10) -> torch.Tensor:
    return torch.tensor(1000.0 * (1 - (step + 0.5) / steps))


def painter(schedule: CacheSchedule, **options: Any) -> CachedDenoiser:
    return compile_with_cache(PAINTER, schedule, **{"backend": "eager", "num_steps": 10, **options})


def call(model: Any, step: int, name: str, named: bool = True) -> torch.Tensor:
    with torch.no_grad():
        if model is PAINTER or not named:
            return model(latents(step), moment(step), TEXTS[name])
        with model.cache_context(name):
            return model(latents(step), moment(step), TEXTS[name])


# --- T-GATE ---


def seen(model: nn.Module, layers: list[str], run: Callable[[], Any]) -> list[torch.Tensor]:
    """What layers of the plain module return in a call."""
    found: list[torch.Tensor] = []
    hooks = [
        model.get_submodule(path).register_forward_hook(lambda module, args, output: found.append(output))
        for path in layers
    ]
    with torch.no_grad():
        run()
    for hook in hooks:
        hook.remove()
    return found


def with_outputs(model: nn.Module, layers: list[str], values: list[torch.Tensor], run: Callable[[], Any]) -> Any:
    """A call of the plain module in which layers return given values."""
    hooks = [
        model.get_submodule(path).register_forward_hook(lambda module, args, output, value=value: value)
        for path, value in zip(layers, values, strict=True)
    ]
    with torch.no_grad():
        result = run()
    for hook in hooks:
        hook.remove()
    return result


@pytest.mark.parametrize("decide", ["host", "graph"])
def test_cross_attention_is_held_at_the_mean_of_two_calls(decide: str) -> None:
    cached = painter(schedules.t_gate(gate=3, interval=1), decide=decide)
    own = {name: seen(PAINTER, CROSS, partial(call, PAINTER, 2, name)) for name in TEXTS}
    mean = [(a + b) / 2 for a, b in zip(own["cond"], own["uncond"], strict=True)]
    assert worst(own["cond"], own["uncond"]) > 0.1
    for step in range(6):
        for name in ("cond", "uncond"):
            got = call(cached, step, name)
            if step < 3:
                assert torch.equal(got, call(PAINTER, step, name))
                continue
            run = partial(call, PAINTER, step, name)
            assert worst([got], [with_outputs(PAINTER, CROSS, mean, run)]) < 1e-6
            assert worst([got], [with_outputs(PAINTER, CROSS, own[name], run)]) > 1e-3
            assert set(cached.stats().decisions[-1].reused) == set(CROSS)


def test_the_mean_is_taken_once_and_not_by_one_branch_alone() -> None:
    cached = painter(schedules.t_gate(gate=2, interval=1))
    got = [call(cached, step, "cond") for step in range(3)]
    own = seen(PAINTER, CROSS, lambda: call(PAINTER, 1, "cond"))
    assert worst(got[2:], [with_outputs(PAINTER, CROSS, own, lambda: call(PAINTER, 2, "cond"))]) < 1e-6
    cached.reset()
    for step in range(3):
        for name in TEXTS:
            call(cached, step, name)
    contexts = cached._driver.recognizer.contexts
    held = {name: contexts[name].payload.histories[CROSS[0]].slots[0][0].clone() for name in TEXTS}
    assert torch.equal(held["cond"], held["uncond"])
    call(cached, 3, "cond")
    assert torch.equal(contexts["cond"].payload.histories[CROSS[0]].slots[0][0], held["cond"])


@pytest.mark.parametrize("name", ["painter", "PixArtTransformer2DModel"])
def test_cross_attention_is_held_at_the_mean_of_two_halves(name: str) -> None:
    if name == "painter":
        model, layers = PAINTER, CROSS
        calls = [((latents(step), moment(step), PROMPT), {}) for step in range(4)]
    else:
        model, layers = sample(name).module, [f"transformer_blocks.{i}.attn2" for i in range(6)]
        args, kwargs = sample(name).args, sample(name).kwargs
        times = [torch.full_like(kwargs["timestep"], 900 - 100 * step) for step in range(4)]
        calls = [((args[0] + 0.1 * step, *args[1:]), {**kwargs, "timestep": t}) for step, t in enumerate(times)]
    cached = compile_with_cache(model, schedules.t_gate(gate=2, interval=1, halves=True), backend="eager")
    own = seen(model, layers, lambda: model(*calls[1][0], **calls[1][1]))
    halves = [value.chunk(2) for value in own]
    mean = [torch.cat([(first + last) / 2] * 2) for first, last in halves]
    assert worst(mean, own) > 1e-3
    for step, (args, kwargs) in enumerate(calls):
        with torch.no_grad():
            got = tensor_of(cached(*args, **kwargs))
        held = (layers, mean) if step > 1 else ([], [])
        expected = tensor_of(with_outputs(model, *held, partial(model, *args, **kwargs)))
        assert worst([got], [expected]) < 1e-5
    assert [bool(d.reused) for d in cached.stats().decisions] == [False, False, True, True]


def tensor_of(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


def test_an_odd_batch_has_no_halves() -> None:
    cached = painter(schedules.t_gate(gate=1, interval=1, halves=True))
    with torch.no_grad():
        cached(latents(0)[:1], moment(0), PROMPT[:1])
        with pytest.raises(ScheduleError, match="a batch of 1 has no two halves"):
            cached(latents(1)[:1], moment(1), PROMPT[:1])


def test_self_attention_is_shared_by_no_one() -> None:
    schedule = schedules.t_gate(gate=5, interval=3, warm_up=1)
    assert [(rule.regions.kinds, rule.share) for rule in schedule.rules] == [
        (("cross_attention",), "branches"),
        (("attention",), "none"),
    ]
    cached = painter(schedule)
    for step in range(7):
        call(cached, step, "cond")
    found = ["".join("ac"[name in CROSS] for name in sorted(d.reused))[:1] for d in cached.stats().decisions]
    assert found == ["", "", "a", "", "", "c", "c"]


# --- FasterCache ---

RULE = Rule(Trunk(first=1), Interval(1), Hold(), "residual")  # nothing but the branch is cached
BRANCH = Reconstruct(every=3, window=(-1.0, 1001.0), low_window=(500.0, 1001.0), high_window=(-1.0, 400.0), alpha=1.2)


def rebuilding(branch: Reconstruct = BRANCH) -> CacheSchedule:
    return CacheSchedule("rebuild", (RULE,), branch=branch)


def frequencies(difference: torch.Tensor, radius: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Low and high parts of [..., height, width], by a circle around the centre of the shifted spectrum."""
    height, width = difference.shape[-2:]
    spectrum = torch.fft.fftshift(torch.fft.fft2(difference), dim=(-2, -1))
    reach = int(min(height, width) * radius)
    rows, columns = torch.arange(height) - height // 2, torch.arange(width) - width // 2
    circle = (rows[:, None] ** 2 + columns[None, :] ** 2) <= reach**2
    low = torch.fft.ifft2(torch.fft.ifftshift(spectrum * circle, dim=(-2, -1))).real
    return low, difference - low


@pytest.mark.parametrize("decide", ["host", "graph"])
@pytest.mark.parametrize("radius", [0.2, 0.3, 0.45])
def test_the_unconditional_branch_is_rebuilt_by_the_formula(decide: Any, radius: float) -> None:
    branch = Reconstruct(3, BRANCH.window, BRANCH.low_window, BRANCH.high_window, BRANCH.alpha, radius)
    cached = painter(rebuilding(branch), decide=decide)
    weights, parts = [1.0, 1.0], (torch.zeros(()), torch.zeros(()))
    rebuilt = ""
    for step in range(10):
        cond = call(cached, step, "cond")
        plain = call(PAINTER, step, "cond"), call(PAINTER, step, "uncond")
        assert torch.equal(cond, plain[0])
        uncond = call(cached, step, "uncond").clone()
        if step % 3 == 0:
            assert torch.equal(uncond, plain[1])
            weights, parts = [1.0, 1.0], frequencies(plain[1] - plain[0], radius)
        else:
            weights[0] *= 1.2 if moment(step) > 500 else 1.0
            weights[1] *= 1.2 if moment(step) < 400 else 1.0
            expected = plain[0] + weights[0] * parts[0] + weights[1] * parts[1]
            assert worst([uncond], [expected]) < 1e-5
            assert worst([uncond], [plain[1]]) > 1e-3
        rebuilt += "b" if cached.stats().decisions[-1].rebuilt else "."
        cond.zero_()  # pipelines write to what they get
    assert rebuilt == ".bb.bb.bb."
    assert parts[0].abs().amax() > 0.01 < parts[1].abs().amax()


def test_a_bundle_rebuilds_the_branch_too(tmp_path: Path) -> None:
    cached = painter(rebuilding(), example_inputs=((latents(0), moment(0), PROMPT), {}))
    loaded = export.load_bundle(export.to_onnx(cached, tmp_path / "bundle"))
    for step in range(6):
        for name in TEXTS:
            assert worst([call(loaded, step, name)], [call(cached, step, name)]) < 1e-5
    assert [d.rebuilt for d in loaded.stats().decisions] == [d.rebuilt for d in cached.stats().decisions]
    assert loaded.stats().decisions[-1].rebuilt


def test_a_rebuilt_branch_does_not_run_the_model() -> None:
    ran: list[int] = []

    def counting(module: Any, examples: Any) -> Any:
        layers = sum("linear" in str(node.target) for node in module.graph.nodes)

        def run(*args: Any) -> Any:
            ran.append(layers)
            return module(*args)

        return run

    cached = painter(rebuilding(), backend=counting)
    for step in range(4):
        for name in TEXTS:
            ran.clear()
            call(cached, step, name)
            assert (max(ran) == 0) == (name == "uncond" and step % 3 != 0)
    decisions = cached.stats().decisions
    assert [d.rebuilt for d in decisions] == [False, False, False, True, False, True, False, False]
    assert all(len(d.reused) == 1 and not d.refreshed for d in decisions if d.rebuilt)
    assert cached.stats().reused == 2
    assert "2 call(s) rebuilt from the conditional guidance branch" in cached.summary()
    assert "executed FLOPs: 75.0 % of the uncached run" in cached.summary()


def test_video_outputs_are_split_by_their_last_two_axes() -> None:
    class Film(Painter):
        def forward(self, x: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            return super().forward(x.flatten(3), timestep, text).reshape(x.shape)

    film, x = Film().eval(), noise(5, 2, 4, 3, 6, 4)
    cached = compile_with_cache(film, rebuilding(), backend="eager")
    found = []
    for step in range(2):
        for name, text in TEXTS.items():
            with torch.no_grad(), cached.cache_context(name):
                found.append(cached(x, moment(step), text))
    low, high = frequencies(found[1] - found[0], 0.2)
    assert cached.stats().decisions[-1].rebuilt
    assert worst([found[3]], [found[2] + 1.2 * low + high]) < 1e-5


def test_it_is_rebuilt_inside_its_window_only() -> None:
    cached = painter(rebuilding(Reconstruct(every=5, window=(200.0, 700.0))))
    for step in range(10):  # timesteps 950, 850, ...
        for name in TEXTS:
            call(cached, step, name)
    found = "".join("b" if d.rebuilt else "." for d in cached.stats().decisions[1::2])
    assert found == "...bb.bb.."
    assert equal([call(cached, 0, name) for name in TEXTS], [call(PAINTER, 0, name) for name in TEXTS])


def reasons(cached: CachedDenoiser) -> set[str]:
    return {decision.reason for decision in cached.stats().decisions if decision.reason}


def test_the_unconditional_branch_first_is_computed() -> None:
    cached = painter(rebuilding())
    for step in range(5):
        for name in ("uncond", "cond"):
            assert torch.equal(call(cached, step, name), call(PAINTER, step, name))
    assert not any(decision.rebuilt for decision in cached.stats().decisions)
    assert reasons(cached) == {"the conditional branch has not run at this step"}
    assert "the conditional branch has not run at this step" in cached.summary()


@pytest.mark.parametrize("second", [False, True])
def test_branches_without_names(second: bool) -> None:
    branch = Reconstruct(every=3, window=(-1.0, 1001.0), second=second)
    cached, named = painter(rebuilding(branch)), painter(rebuilding(branch))
    for step in range(5):
        x = latents(step)
        for name in ("cond", "uncond"):
            with torch.no_grad():
                got = cached(x, moment(step), TEXTS[name])  # the same latents: the same step
            assert torch.equal(got, call(named if second else PAINTER, step, name))
    rebuilt = [decision.rebuilt for decision in cached.stats().decisions]
    assert any(rebuilt) == second
    assert second or reasons(cached) == {"no context says which guidance branch is the unconditional one"}
    assert second or "no context says which guidance branch" in cached.summary()


def test_which_names_are_unconditional() -> None:
    assert is_unconditional("uncond", BRANCH)
    assert is_unconditional("cond", BRANCH) is False
    assert not is_unconditional("cond_uncond", BRANCH)  # both in one call
    assert not is_unconditional("uncond_stg", BRANCH)
    assert is_unconditional("#1", BRANCH) is None


def test_a_third_branch_is_not_what_the_unconditional_one_is_rebuilt_from() -> None:
    """Some pipelines call the model once more with layers skipped, as "uncond_stg"."""
    cached, names = painter(rebuilding()), ("cond", "uncond_stg", "uncond")
    texts = {"uncond_stg": noise(102, 2, 3, 8), **TEXTS}
    found = {}
    for step in range(2):
        for name in names:
            with torch.no_grad(), cached.cache_context(name):
                found[name, step] = cached(latents(step), moment(step), texts[name]).clone()
    assert [decision.rebuilt for decision in cached.stats().decisions] == [False] * 5 + [True]
    low, high = frequencies(found["uncond", 0] - found["cond", 0], BRANCH.radius)
    assert worst([found["uncond", 1]], [found["cond", 1] + 1.2 * low + high]) < 1e-5


def test_nothing_is_rebuilt_from_another_generation() -> None:
    cached = painter(rebuilding())
    for step in range(2):
        for name in TEXTS:
            call(cached, step, name)
    call(cached, 2, "cond")
    for again in (cached.reset, lambda: None):  # an end that is announced, and one that is not
        again()
        for step in range(2):
            got = [call(cached, step, name).clone() for name in TEXTS]
            assert step or equal(got, [call(PAINTER, 0, name) for name in TEXTS])
        call(cached, 2, "cond")
    assert [d.rebuilt for d in cached.stats().decisions] == [False, False, False, True, False]


def test_attention_is_extrapolated_where_the_other_branch_is_rebuilt() -> None:
    """The preset: where both branches run, they run in full."""
    windows = {"window": (-1.0, 1001.0), "branch_window": (-1.0, 900.0), "branch_interval": 4}
    cached = painter(schedules.faster_cache(2, **windows))
    for step in range(8):
        for name in TEXTS:
            call(cached, step, name)
    cond, uncond = ([d for d in cached.stats().decisions if d.context == name] for name in TEXTS)
    attention = {f"blocks.{i}.attn{j}" for i in (0, 1) for j in (1, 2)}
    assert [set(d.reused) == attention for d in cond] == [False, True, False, True, False, True, False, True]
    assert [d.rebuilt for d in uncond] == [False, True, True, True, False, True, True, True]
    assert all(set(d.reused) <= attention for d in cond)


# --- refusals ---


class Tokens(Painter):
    def forward(self, x: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        return super().forward(x, timestep, text).flatten(2).transpose(1, 2)


class Several(Painter):
    def forward(self, x: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> Any:
        return super().forward(x, timestep, text), x * 2


@pytest.mark.parametrize(("kind", "shape"), [(Tokens, "(2, 24, 4)"), (Several, "(2, 4, 6, 4), (2, 4, 6, 4)")])
def test_only_images_can_be_rebuilt(kind: type[Painter], shape: str) -> None:
    model = kind().eval()
    cached = compile_with_cache(model, rebuilding(), backend="eager")
    for _ in range(2):
        with pytest.raises(RegionError) as error, torch.no_grad():
            cached(latents(0), moment(0), PROMPT)
        for word in ("spatial frequency", "height, width", shape):
            assert word in str(error.value)


class Mute(Painter):
    def forward(self, x: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        tokens = self.enter(x.flatten(2).transpose(1, 2)) * timestep
        for block in self.blocks:
            tokens = block.ff(block.attn1(tokens, tokens))
        return self.head(tokens).transpose(1, 2).reshape(x.shape)


def test_a_model_without_cross_attention_shares_none() -> None:
    cached = compile_with_cache(Mute().eval(), schedules.t_gate(), backend="eager")
    with pytest.raises(RegionError) as error, torch.no_grad():
        cached(latents(0), moment(0), PROMPT)
    assert "no cross_attention layers were found in this model; found: attention" in str(error.value)
