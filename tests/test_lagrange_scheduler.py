"""LagrangeScheduler: what it is equal to, its order of convergence, and that it is a scheduler like any other."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, HeunDiscreteScheduler
from torch import Tensor

from diffcache_fx import LagrangeScheduler
from diffcache_fx.collocation import table
from diffcache_fx.demo.digits import load_digits
from diffcache_fx.errors import CallError, ScheduleError
from diffcache_fx.measure import psnr
from diffcache_fx.probability_flow import Angular

Model = Callable[[Tensor, Any], Tensor]
MEANS = torch.tensor([[2.0, 0.0, -1.0], [-1.5, 1.0, 0.5], [0.0, -2.0, 1.0]])
SPREAD = 0.6


def noise_of_mixture(u: Tensor, s: Tensor) -> Tensor:
    """The exact noise of a Gaussian mixture at u = x0 + s * noise."""
    variance = SPREAD**2 + s**2
    apart = u[:, None, :] - MEANS
    share = torch.softmax(-(apart**2).sum(-1) / (2 * variance), dim=1)
    return s * (share[..., None] * apart).sum(1) / variance


def variance_preserving(scheduler: LagrangeScheduler) -> Model:
    """Predicts noise from x at a timestep, fractional ones included."""

    def model(x: Tensor, moment: Any) -> Tensor:
        s = torch.from_numpy(scheduler.flow.places(np.array([float(moment)]))).double()
        s = s.tan() if isinstance(scheduler.flow, Angular) else s
        return noise_of_mixture(x.double() * (1 + s**2).sqrt(), s)

    return model


def flow(x: Tensor, moment: Any) -> Tensor:
    """The exact velocity, noise - x0, of the same mixture at x = (1 - s) x0 + s * noise."""
    s = torch.tensor([float(moment) / 1000]).double()
    noise = noise_of_mixture(x.double() / (1 - s).clamp(min=1e-9), s / (1 - s).clamp(min=1e-9))
    return (noise - x) / (1 - s).clamp(min=1e-9)


def run(scheduler: Any, model: Model, x: Tensor) -> Tensor:
    for moment in scheduler.timesteps:  # as pipelines do; those of flow models do not ask for scaling
        scaled = scheduler.scale_model_input(x, moment) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(model(scaled, moment), moment, x).prev_sample
    return x


def noise() -> Tensor:
    return torch.randn(64, 3, generator=torch.Generator().manual_seed(0))


def test_tables_of_the_literature() -> None:
    assert table(2).inner[1] == pytest.approx((1 / 2, 1 / 2))
    assert table(3).inner[1] == pytest.approx((5 / 24, 8 / 24, -1 / 24))
    assert table(3).whole == pytest.approx((1 / 6, 4 / 6, 1 / 6))
    assert table(4).inner[1] == pytest.approx((9 / 72, 19 / 72, -5 / 72, 1 / 72))
    assert table(4).whole == pytest.approx((1 / 8, 3 / 8, 3 / 8, 1 / 8))
    assert table(3, "chebyshev").nodes == pytest.approx(table(3).nodes)
    assert table(5, "chebyshev").nodes[1] < 0.25
    assert table(3, open_end=True).nodes == pytest.approx((0, 1 / 3, 2 / 3))


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_two_nodes_and_one_round_is_heun(prediction: str) -> None:
    options = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    ours = LagrangeScheduler(
        2, 1, sweep="jacobi", reuse_last=False, final="euler", prediction_type=prediction, **options
    )
    heun = HeunDiscreteScheduler(prediction_type=prediction, timestep_spacing="leading", **options)
    ours.set_timesteps(10)
    heun.set_timesteps(10)
    assert torch.equal(ours.timesteps, heun.timesteps)

    def model(x: Tensor, moment: Any) -> Tensor:
        return torch.tanh(x * (1 + float(moment) / 500)) + 0.1

    x = noise()
    expected = run(heun, model, x * heun.init_noise_sigma)
    assert (run(ours, model, x) - expected).abs().max() < 2e-5


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_what_is_integrated_over_does_not_change_the_solution(prediction: str) -> None:
    """In small steps; and the slope is the v of v-prediction, whatever the model predicts."""
    ends = []
    for variable in ("noise_to_signal", "angle"):
        scheduler = LagrangeScheduler(4, 3, variable=variable, prediction_type=prediction)
        scheduler.set_timesteps(50)

        def model(x: Tensor, moment: Any, scheduler: Any = scheduler, variable: str = variable) -> Tensor:
            epsilon = variance_preserving(scheduler)(x, moment)
            s = float(scheduler.flow.places(np.array([float(moment)]))[0])
            angle = torch.tensor(s if variable == "angle" else np.arctan(s)).double()
            clean = (x - angle.sin() * epsilon) / angle.cos()
            return {"epsilon": epsilon, "sample": clean, "v_prediction": angle.cos() * epsilon - angle.sin() * clean}[
                prediction
            ]

        ends.append(run(scheduler, model, noise().double()))
    assert (ends[0] - ends[1]).abs().max() < 2e-3


def test_over_the_angle_few_steps_from_pure_noise_lose_less() -> None:
    """On the trained digits, whose noise-to-signal ratio starts at 157."""
    demo, labels = load_digits(), [3, 8]

    def drawn(steps: int, variable: str, nodes: int = 3) -> Tensor:
        config = {**demo.scheduler().config, "timestep_spacing": "trailing"}
        scheduler = LagrangeScheduler.from_config(config, nodes=nodes, variable=variable)
        return demo.draw(demo.model, labels, scheduler=scheduler, num_steps=steps)

    reference = drawn(24, "angle", nodes=2)
    assert psnr(drawn(6, "angle"), reference) > 30
    assert psnr(drawn(6, "noise_to_signal"), reference) < 15


def test_what_is_integrated_over_by_default() -> None:
    flows = [LagrangeScheduler(nodes).flow for nodes in (1, 2, 3)]
    assert [isinstance(flow, Angular) for flow in flows] == [False, False, True]


def test_one_node_is_ddim() -> None:
    ours, ddim = LagrangeScheduler(1), DDIMScheduler(clip_sample=False)
    ours.set_timesteps(20)
    ddim.set_timesteps(20)
    assert ours.timesteps.tolist() == ddim.timesteps.tolist()
    assert ours.order == 1
    model = variance_preserving(ours)
    assert (run(ours, model, noise()) - run(ddim, model, noise())).abs().max() < 1e-4


def test_one_node_is_euler_for_flows() -> None:
    euler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    ours = LagrangeScheduler.from_config(euler.config, nodes=1)
    for scheduler in (ours, euler):
        scheduler.set_timesteps(12)
    assert torch.equal(ours.timesteps, euler.timesteps)
    assert (run(ours, flow, noise()) - run(euler, flow, noise())).abs().max() < 1e-5


def error(scheduler: LagrangeScheduler, steps: int, reference: Tensor) -> float:
    scheduler.set_timesteps(steps)
    model = flow if scheduler.is_flow else variance_preserving(scheduler)
    return float((run(scheduler, model, noise().double()) - reference).norm(dim=1).mean())


@pytest.mark.parametrize("kind", ["epsilon", "angle", "flow_prediction"])
@pytest.mark.parametrize(("nodes", "refinements", "order"), [(1, 1, 1), (2, 1, 2), (3, 1, 2), (3, 2, 3), (4, 3, 4)])
@pytest.mark.parametrize("sweep", ["jacobi", "gauss-seidel"])
def test_order_of_convergence(kind: str, nodes: int, refinements: int, order: int, sweep: str) -> None:
    """Against a fine solution, on a Gaussian mixture with exact scores: halving steps divides the error by 2^order."""
    made = [_smooth(nodes, refinements, kind, sweep) for _ in range(2)]
    coarse, finer = (error(scheduler, steps, _solution(kind)) for scheduler, steps in zip(made, (32, 64), strict=True))
    measured = float(np.log2(coarse / finer))
    assert order - 0.35 < measured < order + 1.3, measured


@functools.cache
def _solution(kind: str) -> Tensor:
    fine = _smooth(4, 4, kind, "jacobi")
    fine.set_timesteps(1024)
    return run(fine, flow if fine.is_flow else variance_preserving(fine), noise().double())


def _smooth(nodes: int, refinements: int, kind: str, sweep: str) -> LagrangeScheduler:
    """With an outer grid that ends before 0 and is smooth: the order shows on it, not the end of the schedule."""
    variable, prediction = ("angle", "epsilon") if kind == "angle" else ("noise_to_signal", kind)
    made_for = {"variable": variable, "prediction_type": prediction}
    scheduler = LagrangeScheduler(nodes, refinements, reuse_last=False, sweep=sweep, **made_for)

    def set_timesteps(steps: int) -> None:
        scheduler.num_inference_steps = steps
        grids = {"epsilon": np.geomspace(20, 0.1, steps + 1), "angle": np.linspace(1.5, 0.1, steps + 1)}
        scheduler._outer = grids.get(kind, np.linspace(0.95, 0.05, steps + 1))
        scheduler._calls = scheduler._layout()
        places = np.array([scheduler._place(call) for call in scheduler._calls])
        scheduler.timesteps = torch.from_numpy(scheduler.flow.moments(places))
        scheduler._step_index = None
        scheduler._forget()

    scheduler.set_timesteps = set_timesteps  # type: ignore[method-assign, assignment]
    return scheduler


def test_the_last_evaluation_may_be_the_first_of_the_next_step() -> None:
    saving, plain = (LagrangeScheduler(3, 2, reuse_last=held, final="euler") for held in (True, False))
    for scheduler in (saving, plain):
        scheduler.set_timesteps(10)
    assert (saving.order, plain.order) == (4, 5)
    assert len(plain.timesteps) == 9 * 5 + 1
    assert len(saving.timesteps) == 1 + 9 * 4 + 1
    fine = LagrangeScheduler(4, 4, final="euler")
    fine.set_timesteps(200)
    reference = run(fine, variance_preserving(fine), noise())
    errors = [float((run(s, variance_preserving(s), noise()) - reference).norm()) for s in (saving, plain)]
    assert errors[0] < 3 * errors[1]


def test_a_run_may_begin_at_a_later_step() -> None:
    """As pipelines that start from an image do."""
    whole, late = (LagrangeScheduler(3, 2, reuse_last=False) for _ in range(2))
    for scheduler in (whole, late):
        scheduler.set_timesteps(8)
    begin = 3 * whole.order
    x, model = noise(), variance_preserving(whole)
    for moment in whole.timesteps[:begin]:
        x = whole.step(model(x, moment), moment, x).prev_sample
    late.set_begin_index(begin)
    ends = []
    for scheduler in (whole, late):
        y = x
        for moment in scheduler.timesteps[begin:]:
            y = scheduler.step(model(y, moment), moment, y).prev_sample
        ends.append(y)
    assert torch.equal(*ends)


def test_saved_and_loaded_like_any_scheduler(tmp_path: Path) -> None:
    scheduler = LagrangeScheduler(4, 3, placing="chebyshev", prediction_type="v_prediction")
    scheduler.save_pretrained(tmp_path)
    loaded = LagrangeScheduler.from_pretrained(tmp_path)
    own = [{k: v for k, v in x.config.items() if not k.startswith("_")} for x in (loaded, scheduler)]
    assert own[0] == own[1]
    taken = LagrangeScheduler.from_config(DDIMScheduler(beta_schedule="squaredcos_cap_v2").config, nodes=2)
    assert taken.config.beta_schedule == "squaredcos_cap_v2"
    assert taken.config.prediction_type == "epsilon"


def test_noise_is_added_as_the_others_do() -> None:
    x, moments = noise(), torch.randint(0, 1000, (64,), generator=torch.Generator().manual_seed(1))
    other = torch.randn(64, 3, generator=torch.Generator().manual_seed(2))
    expected = DDIMScheduler().add_noise(x, other, moments)
    assert torch.allclose(LagrangeScheduler().add_noise(x, other, moments), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"nodes": 0}, "nodes must be a whole number of at least 1, not 0"),
        ({"refinements": 1.5}, "refinements must be a whole number"),
        ({"sweep": "seidel"}, "sweep must be one of gauss-seidel, jacobi, not 'seidel'"),
        ({"prediction_type": "eps"}, "prediction_type must be one of"),
        ({"variable": "time"}, "variable must be one of None, noise_to_signal, angle, not 'time'"),
    ],
)
def test_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ScheduleError, match=words):
        LagrangeScheduler(**options)


def test_calls_that_make_no_sense() -> None:
    scheduler = LagrangeScheduler()
    x = noise()
    with pytest.raises(CallError, match="set_timesteps comes before step"):
        scheduler.step(x, 0, x)
    with pytest.raises(CallError, match="belong to flow matching"):
        scheduler.set_timesteps(4, mu=1.0)
    scheduler.set_timesteps(4)
    scheduler.set_begin_index(6)
    with pytest.raises(CallError, match=r"reuse_last=False, where every step has one.*this is call 6"):
        scheduler.step(x, scheduler.timesteps[6], x)
    with pytest.raises(ScheduleError, match="invert_sigmas is not offered"):
        LagrangeScheduler.from_config(FlowMatchEulerDiscreteScheduler(invert_sigmas=True).config)
    scheduler.set_timesteps(2)
    run(scheduler, lambda x, _: x, x)
    with pytest.raises(CallError, match="model calls of this run are done"):
        scheduler.step(x, 0, x)
