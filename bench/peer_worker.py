"""One contender of `bench.peers` in a process of its own: prepare it, then generate on command.

A process each, since what a library patches, what Dynamo marks on a code object shared by all copies of a class, and
what is in the compiler's caches must not reach another contender. The samples are still taken in turn, by the parent.
"""

from __future__ import annotations

import copy
import logging
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from diffcache_fx.measure import compiler_use

from .peer_cache_dit import CACHE_DIT
from .peer_contenders import Contender, NotRun, Plan, Uncached
from .peer_diffusers import DIFFUSERS
from .peer_ours import OURS
from .peer_workloads import Subject, subject

_KINDS: tuple[type[Contender], ...] = (Uncached, *DIFFUSERS, *CACHE_DIT, *OURS)
CONTENDERS = {kind.name: kind for kind in _KINDS}
Facts = dict[str, Any]


class Reads(TorchDispatchMode):
    """Counts tensors read as Python numbers or truth values: `every` one, and of these the ones computed `on_device`.

    A tensor counts as the device's if weights or latents took part in it: there the host waits, on a GPU.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()
        self.every = self.on_device = 0
        self.follow(weights)

    def follow(self, values: Any) -> None:
        """Count what is computed from these tensors as the device's."""
        for value in tree_leaves(list(values)):
            if isinstance(value, Tensor):
                value._peers_on_device = True  # type: ignore[attr-defined]

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        there = any(getattr(value, "_peers_on_device", False) for value in tree_leaves((args, kwargs)))
        if function is torch.ops.aten._local_scalar_dense.default:
            self.every += 1
            self.on_device += there
        output = function(*args, **kwargs)
        if there:
            self.follow([output])
        return output


class LimitHit(logging.Handler):
    """Whether Dynamo gave up on a function, which runs uncompiled from then on."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.hit = False
        logging.getLogger("torch._dynamo.convert_frame").addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.hit |= "recompile_limit" in record.getMessage()


@dataclass
class Watch:
    """What a contender did in one generation: bits (1: refreshed) by step, and the most bytes held after a step."""

    bits: list[int] = field(default_factory=list)
    held: int = 0

    def note(self, contender: Contender) -> None:
        self.bits.append(int(contender.refreshed()))
        self.held = max(self.held, contender.cache_bytes())


class Stepping:
    """A contender as the denoiser of one generation: it counts the steps and keeps them to the plan."""

    def __init__(self, contender: Contender, watch: Watch | None = None, reads: Reads | None = None) -> None:
        self.contender, self.watch, self.reads, self.step = contender, watch, reads, 0
        contender.begin()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.contender.force(self.step)
        self.step += 1
        if self.reads is not None:
            self.reads.follow(args)
        with torch.no_grad(), self.contender.context():
            output = self.contender.denoiser(*args, **kwargs)
        if self.watch is not None:
            self.watch.note(self.contender)
        return output


def twin(model: nn.Module) -> nn.Module:
    """A copy with modules of its own and the same parameters."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def prepare(kind: type[Contender], work: Subject, plan: Plan, mode: str) -> tuple[Contender, Facts]:
    """Install a contender, watch one generation, run another, and say what was seen.

    Raises NotRun, in one sentence, where its library is missing, does not support the model or fails.
    """
    start = time.perf_counter()
    contender = kind(twin(work.model), plan, mode, work.example)
    try:
        contender.install()
        facts = _compiled(contender, work, start) if mode == "compiled" else _eager(contender, work)
    except NotRun:
        raise
    except ImportError as error:
        missing = (error.name or "").partition(".")[0]
        raise NotRun(f"{missing.replace('_', '-') or kind.library} cannot be imported here ({brief(error)})") from error
    except Exception as error:
        raise NotRun(brief(error)) from error
    return contender, {**facts, "adapter_lines": contender.adapter_lines()}


def brief(error: BaseException) -> str:
    """Kind and first line of an error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__


def _eager(contender: Contender, work: Subject) -> Facts:
    """One generation under counters: decisions, bytes held, executed FLOPs and reads."""
    watch, reads = Watch(), Reads((*contender.model.parameters(), *contender.model.buffers()))
    with FlopCounterMode(display=False) as flops, reads:
        work.generate(Stepping(contender, watch, reads), 0)
    return {
        "bits": watch.bits,
        "held": watch.held,
        "flops": int(flops.get_total_flops()),
        "reads": reads.on_device + contender.unseen_reads(),
        "every_read": reads.every + contender.unseen_reads(),
    }


def _compiled(contender: Contender, work: Subject, start: float) -> Facts:
    """The first generation, which compiles, and a second one, which should not."""
    watch, limit = Watch(), LimitHit()
    with compiler_use() as first:
        contender.compile()
        work.generate(Stepping(contender, watch), 0)
    seconds = time.perf_counter() - start
    with compiler_use() as second:
        work.generate(Stepping(contender), 0)
    return {
        "bits": watch.bits,
        "held": watch.held,
        "first_s": seconds,
        "compilations": first.compilations,
        "graph_breaks": first.graph_breaks + second.graph_breaks,
        "break_reasons": [_told(reason) for reason in first.reasons],
        "recompiles": second.compilations,
        "limit_hit": limit.hit,
    }


def _told(reason: object) -> str:
    """Why a graph broke, in short, without the folders of this machine."""
    return re.sub(r"/(?:[\w.+-]+/)+", "", " ".join(str(reason).split()))[:240]


def serve(connection: Connection, model: str, name: str, plan: Plan, log: str) -> None:
    """Answer commands until "stop": each is a tuple, each answer ("done", value) or ("not run", reason)."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        work = subject(model, plan.steps)
        made: dict[str, Contender] = {}
        outputs: dict[str, list[Tensor]] = {}
        commands: dict[str, Callable[..., Any]] = {}

        def ready(mode: str) -> Facts:
            made[mode], facts = prepare(CONTENDERS[name], work, plan, mode)
            outputs[mode] = []
            return facts

        def generate(mode: str, turn: int) -> tuple[int, int]:
            with compiler_use() as use:
                outputs[mode].append(work.generate(Stepping(made[mode]), turn))
            return use.compilations, use.graph_breaks

        commands = {"prepare": ready, "generate": generate, "outputs": lambda mode: [x.numpy() for x in outputs[mode]]}
        while (message := connection.recv())[0] != "stop":
            try:
                connection.send(("done", commands[message[0]](*message[1:])))
            except NotRun as reason:
                connection.send(("not run", str(reason)))
            except Exception as error:
                connection.send(("not run", brief(error)))
