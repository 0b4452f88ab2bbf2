"""The hand-written references themselves: they change nothing when all is refreshed, and decide as published."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from itertools import chain
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.zoo import corpus
from diffcache_fx.demo.digits import load_digits

from . import references as ref

pytestmark = pytest.mark.usefixtures("one_thread")

BLOCKS = [f"transformer_blocks.{i}" for i in range(12)]
ATTENTION = [f"{block}.attn1" for block in BLOCKS]
MLP = [f"{block}.ff" for block in BLOCKS]
STEPS = 8
Make = Callable[[nn.Module], ref.Reference]

# All of them refresh at every step.
FRESH: dict[str, Make] = {
    "FORA": lambda m: ref.FORA(m, 1, ATTENTION + MLP),
    "DeltaDiT": lambda m: ref.DeltaDiT(m, 1, 4, BLOCKS[6:], BLOCKS[:6]),
    "PAB": lambda m: ref.PAB(m, {"attention": ATTENTION}, {"attention": 1}, (-1, 1001)),
    "TGATE": lambda m: ref.TGATE(m, [], ATTENTION, 9, 1),
    "SmoothCache": lambda m: ref.SmoothCache(m, {"mlp": MLP}, {"mlp": [1] * STEPS}),
    "BlockCaching": lambda m: ref.BlockCaching(m, BLOCKS, [[1] * 12] * STEPS),
    "FBCache": lambda m: ref.FBCache(m, BLOCKS, 0.0),
    "DBCache": lambda m: ref.DBCache(m, BLOCKS, 0.0, first=4, last=2, warm_up=1),
    "TeaCache": lambda m: ref.TeaCache(m, BLOCKS, [1.0, 0.0], 0.0, STEPS),
    "MagCache": lambda m: ref.MagCache(m, BLOCKS, [0.9] * STEPS, 0.0, 3, 0.2, STEPS),
    "EasyCache": lambda m: ref.EasyCache(m, 0.0, 1, STEPS),
    "DiCache": lambda m: ref.DiCache(m, BLOCKS, 0.0, 0.0, STEPS),
    "Forecasting": lambda m: ref.Forecasting(m, ATTENTION + MLP, 1, 1, ref.taylor(2)),
    "SpeCa": lambda m: ref.SpeCa(m, BLOCKS, STEPS, warm_up=STEPS, plain_warm_up=True),
}

# The same methods, reusing.
REUSING: dict[str, Make] = {
    "FORA": lambda m: ref.FORA(m, 3, ATTENTION + MLP),
    "DeltaDiT": lambda m: ref.DeltaDiT(m, 2, 4, BLOCKS[6:], BLOCKS[:6]),
    "PAB": lambda m: ref.PAB(m, {"attention": ATTENTION}, {"attention": 2}, (100, 800)),
    "TGATE": lambda m: ref.TGATE(m, [], ATTENTION, 6, 3, warm_up=1),
    "SmoothCache": lambda m: ref.SmoothCache(m, {"mlp": MLP}, {"mlp": [1, 0] * 4}),
    "BlockCaching": lambda m: ref.BlockCaching(m, BLOCKS, [[1] * 12, [1, 0] * 6] * 4),
    "FBCache": lambda m: ref.FBCache(m, BLOCKS, 0.3),
    "DBCache": lambda m: ref.DBCache(m, BLOCKS, 0.3, first=4, last=2, warm_up=2, longest=2),
    "TeaCache": lambda m: ref.TeaCache(m, BLOCKS, [1.0, 0.0], 0.3, STEPS),
    "MagCache": lambda m: ref.MagCache(m, BLOCKS, [0.95] * 28, 0.2, 3, 0.2, STEPS),
    "EasyCache": lambda m: ref.EasyCache(m, 0.3, 2, STEPS),
    "DiCache": lambda m: ref.DiCache(m, BLOCKS, 0.4, 0.2, STEPS),
    "Taylor": lambda m: ref.Forecasting(m, ATTENTION + MLP, 3, 2, ref.taylor(2, first=1)),
    "HiCache": lambda m: ref.Forecasting(m, ATTENTION + MLP, 3, 2, ref.hermite()),
    "FoCa": lambda m: ref.Forecasting(m, ATTENTION + MLP, 3, 2, ref.foca),
    "FoCa-Heun": lambda m: ref.Forecasting(m, ATTENTION + MLP, 3, 2, ref.foca_heun()),
    "ABCache": lambda m: ref.Forecasting(m, ATTENTION + MLP, 3, 2, ref.adams_bashforth()),
    "ChebBooster": lambda m: ref.Forecasting(m, ATTENTION + MLP, 3, 2, ref.berrut(3)),
    "L2P": lambda m: ref.Forecasting(m, ATTENTION + MLP, 3, 2, ref.rows([[1.5, -0.5]] * STEPS)),
    "SpeCa": lambda m: ref.SpeCa(m, BLOCKS, STEPS, error=ref.ratio),
}


@cache
def demo() -> Any:
    return load_digits()


def generation(call: Callable[..., Any]) -> list[Tensor]:
    """The model's outputs in a generation of two digits."""
    scheduler = demo().scheduler()
    scheduler.set_timesteps(STEPS)
    x = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    outputs = []
    for t in scheduler.timesteps:
        outputs.append(call(x, timestep=t.expand(2), class_labels=torch.tensor([3, 7])).sample)
        x = scheduler.step(outputs[-1], t, x).prev_sample
    return outputs


@cache
def plain() -> list[Tensor]:
    with torch.no_grad():
        return generation(demo().model)


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def flat(decisions: Any) -> list[bool]:
    return list(chain(*decisions.values())) if isinstance(decisions, dict) else decisions


@pytest.fixture
def attach() -> Iterator[Callable[[Make, nn.Module], ref.Reference]]:
    """Make references, and take them off their models afterwards."""
    made: list[ref.Reference] = []

    def make(factory: Make, model: nn.Module) -> ref.Reference:
        made.append(factory(model))
        return made[-1]

    yield make
    for reference in made:
        reference.remove()


@pytest.mark.parametrize("name", FRESH)
def test_all_refreshed_is_the_plain_model(name: str, attach: Any) -> None:
    reference = attach(FRESH[name], demo().model)
    assert same(generation(reference), plain())
    assert all(flat(reference.decisions))
    assert len(flat(reference.decisions)) % STEPS == 0


@pytest.mark.parametrize("name", REUSING)
def test_reuse_reset_and_remove(name: str, attach: Any) -> None:
    reference = attach(REUSING[name], demo().model)
    first = generation(reference)
    assert torch.equal(first[0], plain()[0])
    assert not same(first, plain())
    assert not all(flat(reference.decisions))
    assert all(output.isfinite().all() for output in first)
    decisions = str(reference.decisions), str(reference.signals)
    reference.reset()
    assert same(generation(reference), first)
    assert (str(reference.decisions), str(reference.signals)) == decisions
    reference.remove()
    with torch.no_grad():
        assert same(generation(demo().model), plain())
    assert not any("forward" in vars(module) for module in demo().model.modules())


class Add(nn.Module):
    """A block whose residual is the timestep times a gain."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.gain, self.runs = gain, 0

    def forward(self, hidden: Tensor, timestep: Tensor) -> Tensor:
        self.runs += 1
        return hidden + self.gain * timestep


class Toy(nn.Module):
    def __init__(self, *gains: float) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Add(gain) for gain in gains])
        self.paths = [f"blocks.{i}" for i in range(len(gains))]

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, timestep=timestep)
        return x


def drive(reference: ref.Reference, times: list[float], inputs: list[float] | None = None) -> list[float]:
    values = inputs or [1.0] * len(times)
    calls = [(torch.tensor([float(x)]), torch.tensor(float(t))) for x, t in zip(values, times, strict=True)]
    return [float(reference(x, timestep=t)) for x, t in calls]


def bits(decisions: list[bool]) -> str:
    return "".join("1" if refreshed else "0" for refreshed in decisions)


def test_first_block_cache_compares_with_the_last_refresh() -> None:
    toy = Toy(1.0, 10.0, 100.0)
    reference = ref.FBCache(toy, toy.paths, 0.12)
    outputs = drive(reference, [100, 95, 90, 80, 75])
    assert bits(reference.decisions) == "10010"
    assert reference.signals[1:] == pytest.approx([0.05, 0.1, 0.2, 0.0625])
    assert outputs[2] == 1 + 90 + 110 * 100
    assert [block.runs for block in toy.blocks] == [5, 2, 2]


def test_dbcache_counts_runs() -> None:
    toy = Toy(1.0, 10.0, 100.0)
    times = [100, 99, 98, 60, 59.9, 59.8, 59.7, 59.6]
    settings: dict[str, Any] = {"first": 1, "last": 1, "warm_up": 1, "longest": 3}
    reference = ref.DBCache(toy, toy.paths, 0.1, **settings)
    drive(reference, times)
    assert bits(reference.decisions) == "10010001"
    reference.remove()
    reference = ref.DBCache(toy, toy.paths, 0.1, plain_longest=False, **settings)
    drive(reference, times)
    assert bits(reference.decisions) == "10010010"  # cache-dit: the two reuses before step 3 still count
    reference.remove()
    reference = ref.DBCache(toy, toy.paths, 0.1, max_cached=3, **settings)
    drive(reference, times)
    assert bits(reference.decisions) == "10010111"
    assert toy.blocks[2].runs == 3 * len(times)


def test_teacache_accumulates_from_step_to_step() -> None:
    toy = Toy(1.0, 10.0)
    reference = ref.TeaCache(
        toy, toy.paths, [2.0, 0.0], 0.5, 8, modulated=lambda block, hidden, timestep: timestep * torch.ones(1)
    )
    outputs = drive(reference, [100 * 0.9**i for i in range(8)])
    assert bits(reference.decisions) == "10010011"
    assert reference.signals[1:-1] == pytest.approx([0.2, 0.4, 0.6, 0.2, 0.4, 0.6], rel=1e-5)
    assert outputs[2] == pytest.approx(1 + 1100)


def test_magcache_errors_and_runs() -> None:
    for longest, expected in ((2, "11001001"), (1, "11010101")):
        toy = Toy(1.0)
        reference = ref.MagCache(toy, toy.paths, [1.0] + [0.9] * 7, 0.3, longest, 0.25, 8)
        drive(reference, [100] * 8)
        assert bits(reference.decisions) == expected
    assert reference.signals[:4] == [None, None, pytest.approx(0.1), pytest.approx(0.29)]
    toy = Toy(1.0)
    reference = ref.MagCache(toy, toy.paths, [1.0, 1.2, 0.9], 0.0, 9, 0.2, 5)  # nearest: 0, 0, 1, 2, 2
    assert reference.ratios == [1.0, 1.0, 1.2, 0.9, 0.9]


def test_easycache_rates() -> None:
    toy = Toy(1.0)
    reference = ref.EasyCache(toy, 0.2, 2, 6)
    outputs = drive(reference, [0, 0, 3, 3, 3, 3], [10, 8, 7, 6, 5, 4])
    # k = 1 from steps 0 and 1; 1/8, 1/8 more; v = 9, k = |9 - 8| / |6 - 8|, 0.5 * 1/9
    assert reference.signals == [None, None, pytest.approx(0.125), pytest.approx(0.25), pytest.approx(0.5 / 9), None]
    assert bits(reference.decisions) == "110101"
    assert outputs == [10, 8, 7, 9, 8, 7]


def test_dicache_probe_and_rescaling() -> None:
    toy = Toy(1.0, 10.0)
    reference = ref.DiCache(toy, toy.paths, 0.5, 0.2, 6)
    outputs = drive(reference, [100, 80, 76, 95, 40, 29])
    assert bits(reference.decisions) == "110011"
    assert reference.signals[2:5] == pytest.approx([4 / 81, 4 / 81 + 19 / 77, 4 / 81 + 19 / 77 + 55 / 96])
    # residuals 1100 and 880; gamma is |76 - 100| / |80 - 100|, then |95 - 100| / |80 - 100| clipped to 1
    assert outputs[2:4] == pytest.approx([1 + 1100 - 1.2 * 220, 1 + 880])
    reference.remove()
    reference = ref.DiCache(toy, toy.paths, 0.5, 0.2, 6, minus_input=True)
    drive(reference, [100, 80, 76, 95, 40, 29], [1, 2, 3, 3, 3, 3])
    # change of the probe 82 -> 79 minus that of the input 2 -> 3
    assert reference.signals[2] == pytest.approx(abs(3 / 82 - 1 / 2))


def test_forecasts_by_hand() -> None:
    values = [torch.tensor([v]) for v in (1.0, 3.0, 12.0)]
    history = [(4, values[2]), (1, values[1]), (0, values[0])]
    d1, d2 = 9 / 3, (9 / 3 - 2) / 3
    assert ref.taylor(2)(history, 6).item() == pytest.approx(12 + 2 * d1 + 2 * d2)
    assert ref.taylor(2, first=2)(history, 6).item() == pytest.approx(12 + 2 * d1)
    x = 0.5 * 2
    hermite = 12 + d1 * 0.5 * 2 * x + d2 * 0.25 * (4 * x**2 - 2) / 2
    assert ref.hermite(2, 0.5)(history, 6).item() == pytest.approx(hermite)
    assert ref.adams_bashforth(3)(history, 6).item() == 3 * 12 - 3 * 3 + 1
    assert ref.adams_bashforth(3)(history[1:], 6).item() == 2 * 3 - 1
    assert ref.foca(history, 6).item() == pytest.approx(7 / 3 * 12 - 5 / 3 * 3 + 1 / 3)
    # steps 2, 3: 3 + e/2 (2 + 2); then 12 + 1/2 (9 + 12 - 7), 12 + 2/2 (9 + 19 - 12)
    assert ref.foca_heun()(history, 6).item() == pytest.approx(28)
    assert ref.berrut(2)(history, 6).item() == pytest.approx(12 + 2 * 3)
    terms = torch.tensor([0.5 / 2, -1 / 5, 0.5 / 6])
    expected = (terms * torch.tensor([12.0, 3, 1])).sum() / terms.sum()
    assert ref.berrut(3)(history, 6).item() == pytest.approx(expected.item())
    assert ref.hold(history, 6) is values[2]


def test_when_forecasts_refresh(attach: Any) -> None:
    toy = Toy(1.0)
    reference = ref.Forecasting(toy, toy.paths, 4, 3, ref.taylor(1))
    drive(reference, [100] * 11)
    assert bits(reference.decisions) == "11100010001"


@pytest.mark.parametrize(("error", "full", "verified"), [(0.0, 9, 24), (1.0, 13, 12)])
def test_speca_schedule(error: float, full: int, verified: int) -> None:
    """The counts of the published code over 50 steps, when every draft passes and when every one fails."""
    toy = Toy(1.0, 10.0, 100.0)
    reference = ref.SpeCa(toy, toy.paths, 50, error=lambda *_: error)
    outputs = drive(reference, [1000 - 20 * i for i in range(50)])
    assert bits(reference.decisions).startswith("1010001" if error else "10100000100000")
    assert sum(reference.decisions) == full
    assert sum(signal is not None for signal in reference.signals) == verified
    assert outputs[3:] == pytest.approx([1 + 111 * (1000 - 20 * i) for i in range(3, 50)], rel=1e-4)


def test_speca_threshold_falls_to_its_floor() -> None:
    toy = Toy(1.0, 10.0)
    reference = ref.SpeCa(toy, toy.paths, 50, error=lambda *_: 0.05, max_taylor=9)
    drive(reference, [100] * 50)
    # 0.1 * 0.01 ** ((step + 1) / 50) is below 0.05 from step 7 on
    assert bits(reference.decisions)[:16] == "1010000100010001"


def test_static_schedules(attach: Any) -> None:
    model = demo().model
    reference = attach(lambda m: ref.FORA(m, 3, MLP, from_end=True, num_steps=STEPS), model)
    generation(reference)
    assert bits(reference.decisions) == "11001001"
    reference.remove()
    reference = attach(lambda m: ref.DeltaDiT(m, 2, 3, BLOCKS[6:], BLOCKS[:6]), model)
    generation(reference)
    assert {part: bits(d) for part, d in reference.decisions.items()} == {"front": "11110101", "rear": "10111111"}
    reference.remove()
    groups = {"early": ATTENTION[:6], "late": ATTENTION[6:]}
    reference = attach(lambda m: ref.PAB(m, groups, {"early": 2, "late": 4}, (200, 900)), model)
    generation(reference)  # timesteps 999, 874, 749, 624, 499, 374, 249, 124
    assert {name: bits(d) for name, d in reference.decisions.items()} == {"early": "10101011", "late": "10001001"}


def test_tgate_on_a_text_transformer(attach: Any) -> None:
    entry = corpus()["PixArtTransformer2DModel"]
    model = entry.build()
    blocks = [f"transformer_blocks.{i}" for i in range(6)]
    cross, own = [f"{b}.attn2" for b in blocks], [f"{b}.attn1" for b in blocks]
    args, kwargs = entry.inputs(0)
    reference = attach(lambda m: ref.TGATE(m, cross, own, gate_step=6, self_interval=3), model)
    seen: list[Tensor] = []
    hook = model.get_submodule(cross[2]).register_forward_hook(lambda m, a, output: seen.append(output))
    outputs = [reference(args[0] + 0.1 * i, *args[1:], **kwargs)[0] for i in range(9)]
    hook.remove()
    assert bits(reference.decisions["cross"]) == "111111000"
    assert bits(reference.decisions["self"]) == "111101111"
    mean = sum(seen[5].chunk(2)) / 2
    assert torch.equal(seen[6], torch.cat([mean, mean]))
    assert torch.equal(seen[8], seen[6])
    assert outputs[8].isfinite().all()


@pytest.mark.parametrize("name", ["UNet2DModel", "UNet2DConditionModel"])
def test_deepcache_holds_what_lies_below_skip_0(name: str, attach: Any) -> None:
    entry = corpus()[name]
    model = entry.build()
    last = f"up_blocks.{len(model.up_blocks) - 1}.resnets.{len(model.up_blocks[-1].resnets) - 1}"
    resnet = model.get_submodule(last)
    calls = [entry.inputs(seed) for seed in range(3)]
    taken: list[Tensor] = []

    def swap(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = args[0].shape[1] - model.conv_in.out_channels
        taken.append(args[0][:, :hidden])
        return torch.cat([taken[0], args[0][:, hidden:]], dim=1), *args[1:]

    hook = resnet.register_forward_pre_hook(swap)
    with torch.no_grad():
        expected = [model(*args, **kwargs).sample for args, kwargs in calls]
    hook.remove()
    reference = attach(lambda m: ref.DeepCache(m, last, 3), model)
    runs: list[int] = []
    model.mid_block.resnets[0].conv1.register_forward_hook(lambda *_: runs.append(1))
    outputs = [reference(*args, **kwargs).sample for args, kwargs in calls]
    assert bits(reference.decisions) == "100"
    assert len(runs) == 1
    assert same(outputs, expected)


def guided(call: Callable[..., Any], steps: int) -> list[tuple[Tensor, Tensor]]:
    """Outputs of both branches on one noise, at timesteps 900, 800 and so on."""
    x = torch.randn(2, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    pairs = []
    for i in range(steps):
        t = torch.full((2,), 900 - 100 * i)
        cond = call(x, timestep=t, class_labels=torch.tensor([3, 7]), context="cond").sample
        pairs.append((cond, call(x, timestep=t, class_labels=torch.tensor([10, 10]), context="uncond").sample))
    return pairs


def test_fastercache(attach: Any) -> None:
    model = demo().model
    with torch.no_grad():
        expected = guided(lambda *a, context, **k: model(*a, **k), 8)
    reference = attach(lambda m: ref.FasterCache(m, ATTENTION, interval=1), model)
    assert all(same(list(a), list(b)) for a, b in zip(guided(reference, 8), expected, strict=True))
    reference.remove()
    reference = attach(lambda m: ref.FasterCache(m, interval=5, alpha=1.0), model)
    pairs = guided(reference, 8)
    assert bits(reference.decisions["uncond"]) == "11100100"  # timesteps 600 and below from step 3 on
    delta = expected[2][1] - expected[2][0]
    torch.testing.assert_close(pairs[4][1], expected[4][0] + delta, rtol=1e-4, atol=1e-5)
    reference.remove()
    reference = attach(lambda m: ref.FasterCache(m, interval=9, window=(-1, 1000)), model)
    pairs = guided(reference, 3)
    low, high = (torch.fft.ifft2(torch.fft.ifftshift(band, dim=(-2, -1))).real for band in reference.bands)
    torch.testing.assert_close(pairs[2][1], expected[2][0] + low + high, rtol=1e-4, atol=1e-5)
    whole = expected[0][1] - expected[0][0]
    torch.testing.assert_close(low / 1.1**2 + high, whole, rtol=1e-3, atol=1e-4)
    reference.remove()
    reference = attach(lambda m: ref.FasterCache(m, ATTENTION, interval=5), model)
    assert all(torch.stack(pair).isfinite().all() for pair in guided(reference, 8))
    assert bits(reference.decisions["attention"]) == "11101110"
