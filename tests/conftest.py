"""What the tests share: one capture per model of the corpus, and running a step program by hand.

The intermediate form is verified after every pass in all tests.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from weakref import WeakKeyDictionary

import pytest
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

os.environ["DIFFCACHE_FX_VERIFY"] = "1"

from diffcache_fx.passes.cut import ComputeCut, RuleStorage
from diffcache_fx.passes.normalize import Normalize
from diffcache_fx.passes.regions import SelectRegions

import diffcache_fx.compile as compiling
from bench.zoo import Entry, corpus
from diffcache_fx import CachedDenoiser, CacheSchedule, compile_with_cache
from diffcache_fx.calling import Call, ShapeRules, number_tensor
from diffcache_fx.capture import capture
from diffcache_fx.compile import Traced, run_passes
from diffcache_fx.models import Target, load_target
from diffcache_fx.parameters import Parameters, fingerprint
from diffcache_fx.program import TENSOR, InputKind, OutputKind, StepProgram
from diffcache_fx.selection import Selection
from diffcache_fx.signatures import FlatCall

# The files that take longest. What is left of a run when few files are is done by one process alone, so they go first.
_LONG = (
    "test_methods",
    "test_bench_engines",
    "test_bench_exports",
    "test_published",
    "test_export_aot",
    "test_export_tensorrt",
    "test_invariants",
    "test_bench_methods",
    "test_export_onnx",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first; otherwise as they are."""
    ranks = {name: rank for rank, name in enumerate(_LONG)}
    items.sort(key=lambda item: ranks.get(item.path.stem, len(_LONG)))


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Tiny kernels are slower on several threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@dataclass
class Sample:
    """A model, one call of it, and what capture made of them. `raw` is the program before Normalize."""

    name: str
    entry: Entry
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    raw: StepProgram
    rules: ShapeRules
    program: StepProgram
    reference: list[torch.Tensor] = field(default_factory=list)
    selected: dict[Any, StepProgram] = field(default_factory=dict)

    def users(self, seed: int = 0) -> list[torch.Tensor]:
        """The caller's tensors of another call of the same kind, flat."""
        args, kwargs = self.entry.inputs(seed)
        return flat_users(self.module, args, kwargs, self.program)

    def with_regions(self, selection: Selection, storage: str = "value", slots: int = 1) -> StepProgram:
        """The program with regions and cuts; made once for each combination."""
        key = (selection, storage, slots)
        if key not in self.selected:
            passes = (SelectRegions((selection,)), ComputeCut((RuleStorage(storage, slots),)))
            self.selected[key] = run_passes(self.program, passes)
        return self.selected[key]


def with_regions(program: StepProgram, *selections: Selection, storage: str = "value", slots: int = 1) -> StepProgram:
    """A captured program with regions and cuts: one rule for each selection, all stored the same way."""
    rules = tuple(RuleStorage(storage, slots) for _ in selections)
    return run_passes(program, (Normalize(), SelectRegions(selections), ComputeCut(rules)))


def flat_users(module: nn.Module, args: Any, kwargs: Any, program: StepProgram) -> list[torch.Tensor]:
    leaves = Call.of(module, args, kwargs).leaves
    chosen = [leaves[i] for i in program.signature.tensor_leaves]
    return [leaf if isinstance(leaf, torch.Tensor) else number_tensor(leaf) for leaf in chosen]


_samples: dict[str, Sample] = {}


def sample(name: str) -> Sample:
    """A model of the corpus, captured once for all tests. Never change the module it holds."""
    if name not in _samples:
        _samples[name] = _sample(name)
    return _samples[name]


def _sample(name: str) -> Sample:
    entry = corpus()[name]
    module = entry.build()
    args, kwargs = entry.inputs(0)
    with torch.no_grad():
        leaves = pytree.tree_leaves(module(*args, **kwargs))
    reference = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    raw, rules = capture(module, args, kwargs)
    program = run_passes(raw, (Normalize(),))
    return Sample(name, entry, module, args, kwargs, raw, rules, program, reference)


def captured(module: nn.Module, *args: Any, **kwargs: Any) -> StepProgram:
    """A hand-made module as a program, before any pass."""
    return capture(module.eval(), args, kwargs)[0]


_traces: WeakKeyDictionary[nn.Module, list[tuple[FlatCall, Any, Traced]]] = WeakKeyDictionary()


@pytest.fixture(autouse=True, scope="session")
def shared_traces() -> Iterator[None]:
    """Cached denoisers around a module that is still what it was take what tracing it gave before."""

    def once(module: nn.Module, args: Any = (), kwargs: Any = None, **options: Any) -> Traced:
        call, mark = FlatCall(tuple(args), kwargs or {}), fingerprint(module)
        if options.get("dynamic"):
            return capture(module, args, kwargs, **options)
        for other, then, traced in _traces.get(module, ()):
            if other.key == call.key and then == mark and _same_values(traced[0], call):
                return traced
        traced = capture(module, args, kwargs, **options)
        _traces.setdefault(module, []).append((call, mark, traced))
        return traced

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiling, "capture", once)
        yield


def _same_values(program: StepProgram, call: FlatCall) -> bool:
    """Whether what is no input of a program, numbers and tensors that are known, is the same in a call."""
    pairs = zip(program.signature.leaves, call.leaves, strict=True)
    known = [(ours, theirs) for ours, theirs in pairs if ours is not TENSOR]
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in known)


@cache
def _digits() -> Target:
    return load_target("digits")


def digits_denoiser(schedule: CacheSchedule, steps: int, decide: Any = "host") -> CachedDenoiser:
    """The demo model in eager, captured for ten digits with both halves of guidance in one call."""
    target = _digits()
    return compile_with_cache(
        target.module, schedule, backend="eager", num_steps=steps, decide=decide, example_inputs=target.example()
    )


@dataclass
class Result:
    """What a program returned: the model's outputs, and the state by target."""

    outputs: list[torch.Tensor]
    state: dict[str, torch.Tensor]


def run(
    program: StepProgram,
    module: nn.Module,
    users: Sequence[torch.Tensor],
    state: Mapping[str, torch.Tensor] | None = None,
    rows: torch.Tensor | None = None,
    predicates: Mapping[str, bool] | None = None,
    call: Callable[..., Any] | None = None,
    step: int = 0,
) -> Result:
    """Run any form of a step program. state: by history target; predicates: by group, True = refresh. step: its
    number."""
    parameters = Parameters(module)
    tensors = dict(zip(program.signature.tensor_leaves, users, strict=True))
    given: list[Any] = []
    for entry in program.inputs:
        if entry.kind is InputKind.USER:
            given.append(tensors[int(entry.target)])
        elif entry.kind is InputKind.HISTORY:
            assert state is not None
            given.append(state[entry.target])
        elif entry.kind is InputKind.ROWS:
            given.append(rows)
        elif entry.kind is InputKind.MOMENT:
            given.append(torch.tensor([float(step), 0.0]))
        elif entry.kind is InputKind.PREDICATE:
            assert predicates is not None
            given.append(torch.tensor(predicates[entry.target]))
        elif entry.kind is InputKind.CONSTANT:
            given.append(program.constants[entry.target])
        else:
            given.append(parameters(entry.target))
    with torch.no_grad():
        values = (program.module if call is None else call)(*given)
    pairs = list(zip(program.outputs, values, strict=True))
    return Result(
        [value for output, value in pairs if output.kind is OutputKind.USER],
        {output.target: value for output, value in pairs if output.kind is OutputKind.STATE},
    )


def history(program: StepProgram, fresh: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """State as a refresh returns it ("region/value"), as the newest slot of a history whose other slots are zero."""
    found = {}
    for region in program.regions:
        for index, value in enumerate(region.cut):
            for slot in range(value.slots):
                newest = fresh[f"{region.name}/{index}"]
                found[f"{region.name}/{index}/{slot}"] = newest if slot == 0 else torch.zeros_like(newest)
    return found


def hold_rows(program: StepProgram) -> torch.Tensor:
    """Forecast rows that hold the newest slot of every region."""
    width = max(value.slots for region in program.regions for value in region.cut)
    rows = torch.zeros(len(program.regions), width)
    rows[:, 0] = 1.0
    return rows


def equal(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def worst(left: Sequence[torch.Tensor], right: Sequence[torch.Tensor]) -> float:
    """The largest difference relative to the largest value."""
    assert len(left) == len(right)
    found = 0.0
    for a, b in zip(left, right, strict=True):
        scale = max(float(b.abs().amax()), 1e-12)
        found = max(found, float((a.double() - b.double()).abs().amax()) / scale)
    return found


def storages(values: Any) -> set[int]:
    """The memory that tensors lie in."""
    return {t.untyped_storage().data_ptr() for t in values if t.numel()}


def text(graph: fx.Graph) -> str:
    """A graph in short: one line for each call, `name = op(arguments)`, and the return."""

    def short(value: Any) -> str:
        if isinstance(value, fx.Node):
            return value.name
        if isinstance(value, (list, tuple)):
            return "[" + ", ".join(short(entry) for entry in value) + "]"
        return str(value)

    lines = []
    for node in graph.nodes:
        if node.op == "placeholder":
            continue
        arguments = ", ".join(
            [*(short(a) for a in node.args), *(f"{key}={short(a)}" for key, a in node.kwargs.items())]
        )
        if node.op == "output":
            lines.append("return " + ", ".join(short(value) for value in node.args[0]))
        elif node.op == "get_attr":
            lines.append(f"{node.name} = {node.target}")
        else:
            packet = getattr(node.target, "overloadpacket", node.target)
            lines.append(f"{node.name} = {getattr(packet, '__name__', packet)}({arguments})")
    return "\n".join(lines)


def steps_of(entry: Entry, count: int, seed: int = 0) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Calls of one generation: fresh latents and a falling timestep at every step, everything else the same."""
    args, kwargs = entry.inputs(seed)
    calls = []
    for step in range(count):
        changed: dict[str | int, Any] = {}
        latent = argument(args, kwargs, entry.latent)
        generator = torch.Generator().manual_seed(1000 * seed + step)
        fresh = [torch.randn(t.shape, generator=generator) for t in pytree.tree_leaves(latent)]
        changed[entry.latent] = pytree.tree_unflatten(fresh, pytree.tree_flatten(latent)[1])
        if entry.timestep != "":
            time = argument(*entry.inputs(0), entry.timestep)  # all generations take the same timesteps
            changed[entry.timestep] = time * (1.0 - 0.1 * step) if _floating(time) else time - 7 * step
        calls.append(
            (
                tuple(changed.get(i, value) for i, value in enumerate(args)),
                {key: changed.get(key, value) for key, value in kwargs.items()},
            )
        )
    return calls


def argument(args: Any, kwargs: Any, where: str | int) -> Any:
    return args[where] if isinstance(where, int) else kwargs[where]


def _floating(value: Any) -> bool:
    return value.is_floating_point() if isinstance(value, torch.Tensor) else isinstance(value, float)
