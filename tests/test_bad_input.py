"""Bad input: each refused with a message that names the fault and the way out, and nothing half-done."""

from __future__ import annotations

import copy
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from diffcache_fx import (
    Blocks,
    CacheError,
    CacheSchedule,
    CacheWarning,
    CallError,
    CaptureError,
    Interval,
    Listed,
    Mask,
    Modules,
    RegionError,
    Rule,
    Scale,
    ScheduleError,
    StaleProgramError,
    Sublayers,
    Trunk,
    compile_with_cache,
    schedules,
)

from .tracked import MODEL, OTHER, PROMPT, TIMES, Denoiser, latents, time

pytestmark = pytest.mark.usefixtures("one_thread")
CALL = (latents(0), time(900.0), PROMPT)


def compiled(schedule: Any = "interval", model: nn.Module = MODEL, **options: Any) -> Any:
    return compile_with_cache(model, schedule, backend=options.pop("backend", "eager"), **options)


def on(regions: Any, guard: Any = None) -> CacheSchedule:
    return CacheSchedule(rules=(Rule(regions, guard or Interval(2)),))


def works(cached: Any, *call: Any) -> None:
    """The object still answers like the model."""
    call = call or CALL
    with torch.no_grad():
        assert torch.equal(cached(*call), MODEL(*call))


def says(error: pytest.ExceptionInfo[BaseException], *words: str) -> None:
    message = str(error.value)
    for word in words:
        assert word in message, message


# --- regions ---


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.second(torch.sin(t) * self.first(x))


@pytest.mark.parametrize("regions", [Trunk(), Blocks(each=True)])
def test_no_repeated_blocks(regions: Any) -> None:
    model = Flat().eval()
    cached = compiled(on(regions), model)
    for _ in range(2):
        with pytest.raises(RegionError) as error:
            cached(latents(0), time(1.0))
        says(error, "no repeated blocks", "Modules", "first")
    assert compiled(on(Modules(("first",))), model)(latents(0), time(1.0)).shape == (2, 8)


@pytest.mark.parametrize(
    ("regions", "words"),
    [
        (Modules(("*.atn1",)), ("'*.atn1'", "'blocks.0.inner'")),
        (Modules(("blocks.0.iner",)), ("blocks.0.iner", "'blocks.0.inner'")),
        (Modules(("blocks.0", "block.1")), ("'block.1'", "'blocks.1'")),
        (Listed((("blocks.0",), ("bloks.1",))), ("bloks.1", "'blocks.1'")),
    ],
)
def test_a_glob_that_matches_nothing(regions: Any, words: tuple[str, ...]) -> None:
    with pytest.raises(RegionError) as error:
        compiled(on(regions), example_inputs=(CALL, {}))
    says(error, "no module", *words)


@pytest.mark.parametrize(
    ("regions", "words"),
    [
        (Scale(0), ("no nested scales", "Trunk")),
        (Sublayers(), ("no attention", "Modules")),
        (Blocks(first=3, last=2), ("first 3", "fewer")),
        (Modules(("blocks",)), ("no module",)),
    ],
)
def test_a_selection_that_finds_nothing(regions: Any, words: tuple[str, ...]) -> None:
    with pytest.raises(RegionError) as error:
        compiled(on(regions), example_inputs=(CALL, {}))
    says(error, *words)


def test_regions_that_overlap() -> None:
    schedule = CacheSchedule(rules=(Rule(Modules(("blocks.1",))), Rule(Blocks(first=1))))
    with pytest.raises(RegionError) as error:
        compiled(schedule, example_inputs=(CALL, {}))
    says(error, "overlap", "blocks.1", "disjoint")


def test_a_decision_in_the_graph_over_a_region_that_is_not_convex() -> None:
    gap = Rule(Listed((("blocks.0", "blocks.2"),), fill=False), Interval(2), storage="value")
    schedule = CacheSchedule(rules=(gap, Rule(Modules(("blocks.1",)), Interval(3))))
    cached = compiled(schedule, decide="graph")
    for _ in range(2):
        with pytest.raises(RegionError) as error, torch.no_grad():
            cached(*CALL)
        says(error, "blocks.0+blocks.2", "a path leaves it and comes back", "decide='host'")
    works(compiled(schedule))
    works(compiled(CacheSchedule(rules=(gap,)), decide="graph"))  # one decision for all may be of any shape


# --- schedules ---


def test_a_mask_of_the_wrong_length() -> None:
    cached = compiled(schedules.mask([1, 0, 1]), num_steps=5)
    with pytest.raises(ScheduleError) as error:
        cached(*CALL)
    says(error, "3 steps", "5", "one entry for each step")
    cached = compiled(schedules.mask([1, 0, 1]))
    with pytest.raises(ScheduleError, match="3 steps"), cached.cache_context("cond", num_inference_steps=5):
        cached(*CALL)
    with cached.cache_context("cond", num_inference_steps=3):
        works(cached)
    two = CacheSchedule(
        rules=(Rule(Modules(("blocks.0",)), Mask(((1,), (0,)))), Rule(Modules(("blocks.1",)), Mask(((1,),))))
    )
    with pytest.raises(ScheduleError, match="same steps"):
        compiled(two)(*CALL)


def test_a_mask_of_the_wrong_width() -> None:
    cached = compiled(schedules.mask([(1, 1), (0, 1)], regions=Blocks(each=True)))
    with pytest.raises(ScheduleError) as error:
        cached(*CALL)
    says(error, "2 bits", "3 regions", "one for each region")
    with pytest.raises(ScheduleError, match="one bit for each region"):
        schedules.mask([(1, 1), (0,)])
    with pytest.raises(ScheduleError, match=r"1 .refresh. and 0 .reuse."):
        schedules.mask([1, 2])
    with pytest.raises(ScheduleError, match="one entry for each step"):
        schedules.mask([])


def test_a_schedule_that_never_refreshes() -> None:
    for bits in ([0, 0, 0], [(0, 0), (0, 0)]):
        with pytest.raises(ScheduleError) as error:
            schedules.mask(bits)
        says(error, "never refreshes", "first step")


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "2", None])
def test_an_interval_that_is_no_count(every: Any) -> None:
    with pytest.raises(ScheduleError) as error:
        schedules.interval(every)
    says(error, "whole number", "from 1", repr(every))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: schedules.interval(2, warm_up=0), ("warm_up", "from 1")),
        (lambda: schedules.interval(2, cool_down=-1), ("cool_down", "from 0")),
        (lambda: schedules.interval(2, longest_reuse=0), ("longest_reuse", "from 1")),
        (lambda: schedules.interval(2, storage="values"), ("storage", "'values'", "residual")),
        (lambda: schedules.interval(2, regions="trunk"), ("regions", "Trunk")),  # type: ignore[arg-type]
        (lambda: schedules.interval(2, forecast="linear"), ("forecast", "Linear")),  # type: ignore[arg-type]
        (lambda: Interval(2, begin=-1), ("begin", "from 0")),
        (lambda: Interval(2, end=1.5), ("end", "fraction")),
        (lambda: Trunk(first=-1), ("first", "from 0")),
        (lambda: Blocks(last=1.0), ("last", "fraction")),
        (lambda: Scale(-1), ("branch", "from 0")),
        (lambda: Sublayers(kinds=("attn",)), ("kinds", "attention", "attn")),
        (lambda: Modules(()), ("patterns", "glob")),
        (lambda: Listed(()), ("groups", "at least one")),
        (lambda: CacheSchedule(rules=()), ("a Rule or several", "()")),
        (lambda: CacheSchedule(rules="fora"), ("a Rule or several", "'fora'")),  # type: ignore[arg-type]
        (lambda: CacheSchedule(rules=3), ("a Rule or several", "3")),  # type: ignore[arg-type]
        (lambda: CacheSchedule(name=""), ("name",)),
        (lambda: schedules.get("intervall"), ("'intervall'", "'interval'")),
        (lambda: schedules.get("interval", evry=3), ("schedules.interval", "evry")),
        (lambda: compiled("fist_block"), ("'fist_block'",)),
        (lambda: compiled("fora:intervall=3"), ("'intervall'", "'interval'")),
        (lambda: compiled("no/such/place.json"), ("no schedule file", "place.json")),
        (lambda: compiled(3), ("a schedule is", "3")),
    ],
)
def test_an_impossible_schedule(make: Any, words: tuple[str, ...]) -> None:
    with pytest.raises(ScheduleError) as error:
        make()
    says(error, *words)


def test_what_needs_the_number_of_steps() -> None:
    cached = compiled(schedules.interval(2, cool_down=1))
    with pytest.raises(ScheduleError) as error:
        cached(*CALL)
    says(error, "num_steps=", "num_inference_steps=")
    with cached.cache_context("cond", num_inference_steps=4):
        works(cached)


def changed(path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    data = copy.deepcopy(schedules.interval(3).to_dict())
    place: Any = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return data


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in schedules.interval(3).to_dict().items() if key != name}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (changed(("version",), 99), ("version 99", "version 1", "make it again")),
        (changed(("version",), None), ("version None",)),
        (changed(("format",), "other"), ("format", "diffcache_fx.schedule")),
        (changed(("warmup",), 2), ("unknown field 'warmup'", "'warm_up'")),
        (changed(("rules", 0, "storge"), "value"), ("unknown field 'storge'", "'storage'")),
        (changed(("rules", 0, "guard", "evry"), 2), ("unknown field 'evry'", "'every'")),
        (changed(("rules", 0, "guard", "kind"), "intervall"), ("unknown guard 'intervall'", "'interval'")),
        (changed(("rules", 0, "regions", "kind"), "trunks"), ("unknown regions 'trunks'", "'trunk'")),
        (changed(("rules", 0, "forecast", "kind"), "holt"), ("unknown forecast 'holt'", "'hold'")),
        (changed(("rules", 0, "guard"), "interval"), ("guard", "kind")),
        (changed(("rules", 0, "guard", "every"), 0), ("from 1",)),
        ([], ("no cache schedule",)),
        (without("rules"), ("field 'rules' is missing",)),
    ],
)
def test_a_schedule_file_that_is_wrong(tmp_path: Path, data: Any, words: tuple[str, ...]) -> None:
    file = tmp_path / "cache_schedule.json"
    file.write_text(json.dumps(data))
    for load in (lambda: CacheSchedule.from_pretrained(tmp_path), lambda: compiled(file)):
        with pytest.raises(ScheduleError) as error:
            load()
        says(error, str(file), *words)


@pytest.mark.parametrize("rules", [None, 3, [], "interval"])
def test_rules_that_are_no_list(rules: Any) -> None:
    with pytest.raises(ScheduleError, match=r"(?i)rule"):
        CacheSchedule.from_dict(changed(("rules",), rules))


def test_a_schedule_file_that_is_no_schedule(tmp_path: Path) -> None:
    (tmp_path / "cache_schedule.json").write_text("{")
    with pytest.raises(ScheduleError, match="not a JSON file"):
        CacheSchedule.from_pretrained(tmp_path)
    with pytest.raises(ScheduleError, match=r"cache_schedule\.json"):
        CacheSchedule.from_pretrained(tmp_path / "nowhere")


# --- options ---


@pytest.mark.parametrize("name", ["max_programs", "num_steps"])
@pytest.mark.parametrize("value", [0, -1, 1.5, True, "4"])
def test_counts_among_the_options(name: str, value: Any) -> None:
    with pytest.raises(CacheError) as error:
        compiled(**{name: value})
    says(error, name, "from 1", repr(value))


def test_unknown_options() -> None:
    with pytest.raises(CacheError, match="'host', 'graph' or 'lagged'"):
        compiled(decide="gpu")
    with pytest.raises(CacheError, match=r"eager backend takes no options.*max_autotune"):
        compiled(max_autotune=True)
    with pytest.raises(CacheError, match=r"inductor backend has no option 'bakend'.*did you mean 'backend'"):
        compiled(backend="inductor", bakend="eager")
    with pytest.raises(CacheError, match=r"eager backend takes no options.*num_step.*did you mean 'num_steps'"):
        compiled(num_step=3)
    with pytest.raises(CacheError, match=r"onnxruntime backend has no option 'provider'.*'providers'"):
        compiled(backend="onnxruntime", provider=["x"])
    with pytest.raises(CacheError, match=r"no backend is called 'inductr'.*inductor"):
        compiled(backend="inductr")


def test_not_a_model() -> None:
    with pytest.raises(CallError, match=r"nn\.Module"):
        compile_with_cache(lambda x: x)  # type: ignore[arg-type]
    cached = compiled()
    with pytest.raises(CallError, match=r"cached already.*cached\.model"):
        compiled(model=cached)


# --- the model ---


def test_a_model_on_two_devices() -> None:
    model = Denoiser().eval()
    model.head.to("meta")
    with pytest.raises((CallError, StaleProgramError)) as error:
        compiled(model=model)
    says(error, "head.weight", "meta")
    model = Denoiser().eval()
    cached = compiled(model=model)
    works(cached)
    model.head.to("meta")
    cached.reset()
    with pytest.raises((CallError, StaleProgramError)) as error:
        cached(*CALL)
    says(error, "head.weight", "meta")
    model.head.to_empty(device="cpu").load_state_dict(MODEL.head.state_dict())
    works(cached)


def test_training_mode() -> None:
    model = Denoiser().train()
    cached = compiled(model=model)
    with pytest.raises(CallError) as error:
        cached(*CALL)
    says(error, "training mode", ".eval()")
    model.eval()
    works(cached)
    with pytest.raises(CallError, match=r"cached\.model"):
        cached.train()
    works(cached.eval())


def test_gradients_requested() -> None:
    cached = compiled()
    x = latents(0).requires_grad_()
    with pytest.raises(CallError) as error:
        cached(x, *CALL[1:])
    says(error, "gradients", "no_grad", "cached.model")
    works(cached, x, *CALL[1:])  # under no_grad
    assert not cached(*CALL).requires_grad


def test_a_model_that_cannot_be_traced() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                if x.sum() > 0:
                    x = block(x)
            return x

    with pytest.raises(CaptureError) as error:
        compiled(model=Branching().eval(), example_inputs=((latents(0), time(1.0)), {}))
    says(error, "Branching", "if x.sum() > 0", "Try:")


# --- calls ---


@pytest.mark.parametrize(
    ("args", "kwargs", "word"),
    [
        ((), {}, "sample"),
        ((latents(0),), {}, "timestep"),
        (CALL, {"promt": PROMPT}, "promt"),
        ((*CALL, None, None), {}, "too many"),
    ],
)
def test_a_wrong_call(args: Any, kwargs: Any, word: str) -> None:
    cached = compiled()
    for _ in range(2):
        with pytest.raises(CallError) as error, torch.no_grad():
            cached(*args, **kwargs)
        says(error, "Denoiser", word, "It takes (sample")
        works(cached)


def test_a_call_without_tensors() -> None:
    with pytest.raises(CallError, match="no tensor"):
        compiled()(1.0, 2.0)


def test_a_call_the_model_itself_refuses_leaves_the_generation_as_it_was() -> None:
    cached = compiled(schedules.interval(3))
    with torch.no_grad():
        cached(*CALL)
        with pytest.raises(RuntimeError):
            cached(torch.randn(2, 9), time(800.0), PROMPT)
        cached(latents(1), time(700.0), PROMPT)
    assert [bool(d.reused) for d in cached.stats().decisions] == [False, True]


@pytest.mark.parametrize("context", [None, "cond"])
def test_shapes_that_change_in_the_middle_of_a_generation(context: str | None) -> None:
    cached = compiled(schedules.interval(5))
    with torch.no_grad(), cached.cache_context(context) if context else nullcontext():
        cached(latents(0), time(900.0))
        cached(latents(1), time(700.0))
        assert cached.stats().decisions[-1].reused
        with pytest.warns(CacheWarning) as found:
            works(cached, latents(2)[:1], time(500.0))
        assert "changed in the middle of a generation" in str(found[0].message)
        assert "reset()" in str(found[0].message)
        assert cached.stats().decisions[-1].reused == ()
        cached(latents(3)[:1], time(300.0))
        assert cached.stats().decisions[-1].reused
        works(cached, latents(4), time(100.0))


def test_two_generations_interleaved_without_contexts() -> None:
    cached = compiled(schedules.interval(3))
    calls = [(latents(seed + off), time(t), PROMPT) for seed, t in enumerate(TIMES) for off in (0, 50)]

    def interleave() -> None:
        for call in calls:
            works(cached, *call)

    with pytest.warns(CacheWarning) as found:
        interleave()
    assert "two generations without contexts" in str(found[0].message)
    assert "cache_context" in str(found[0].message)
    assert len(found) == 1  # said once
    assert cached.stats().reused == 0
    assert "timestep" in cached.summary()
    for first, second in zip(calls[::2], calls[1::2], strict=True):  # the way out
        for name, call in (("a", first), ("b", second)):
            with torch.no_grad(), cached.cache_context(name):
                cached(*call)
    assert cached.stats().reused > 0


def test_asking_before_anything_is_captured() -> None:
    cached = compiled()
    for ask in (cached.explain, cached.program, cached.prepare):
        with pytest.raises(CacheError, match="example_inputs"):
            ask()
    assert "no step has run" in cached.summary()


def test_setting_what_belongs_to_the_model() -> None:
    cached = compiled()
    for name, value in (("forward", None), ("model", MODEL), ("head", nn.Linear(8, 8))):
        with pytest.raises(CallError, match=r"cached\.model"):
            setattr(cached, name, value)
    works(cached, latents(0), time(1.0), OTHER)


def test_example_inputs_of_the_wrong_form() -> None:
    with pytest.raises(CallError, match=r"\(args, kwargs\)"):
        compile_with_cache(MODEL, schedules.interval(2), backend="eager", example_inputs=CALL)  # type: ignore[arg-type]


def test_one_pattern_may_be_a_string() -> None:
    assert Modules("blocks.*") == Modules(("blocks.*",))  # type: ignore[arg-type]
    assert Listed(("blocks.0", "blocks.1")) == Listed((("blocks.0",), ("blocks.1",)))  # type: ignore[arg-type]


def test_a_mask_that_does_not_fit_is_refused_before_compiling() -> None:
    with pytest.raises(ScheduleError, match="3 steps"):
        compile_with_cache(MODEL, schedules.mask([1, 0, 1]), backend="eager", num_steps=5, example_inputs=(CALL, {}))
