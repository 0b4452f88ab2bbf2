"""This library's schedules as contenders of `bench.peers`."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from diffcache_fx import CachedDenoiser, CacheSchedule, Linear, Sublayers, Trunk, compile_with_cache, schedules

from .peer_contenders import CONTEXT, Contender

NEVER = 1e9  # a threshold that no signal reaches


class Ours(Contender):
    """A static schedule of this library, written as a mask."""

    library = "diffcache_fx"
    how = "its own schedules.mask"
    glue = ("schedule", "install")

    def schedule(self) -> CacheSchedule:
        raise NotImplementedError

    def forced(self, schedule: CacheSchedule) -> CacheSchedule:
        """The schedule with the decisions of the plan."""
        return schedule

    def install(self) -> None:
        self.denoiser = compile_with_cache(self.model, self.forced(self.schedule()), **self.options())

    def options(self) -> dict[str, Any]:
        """What a user may leave out: the backend (default inductor), and what lets it capture before the first call."""
        backend = "inductor" if self.mode == "compiled" else "eager"
        return {"backend": backend, "example_inputs": self.example, "num_steps": self.plan.steps}

    def compile(self) -> None:
        self.cached.prepare()

    @property
    def cached(self) -> CachedDenoiser:
        """The denoiser, by its own type."""
        assert isinstance(self.denoiser, CachedDenoiser)
        return self.denoiser

    def begin(self) -> None:
        self.cached.reset()

    def context(self) -> AbstractContextManager[Any]:
        return self.cached.cache_context(CONTEXT)

    def refreshed(self) -> bool:
        decision = self.cached.stats().decisions[-1]
        if decision.refreshed and decision.reused:
            raise RuntimeError(f"step {decision.step} refreshed some regions and reused others")
        return not decision.reused

    def cache_bytes(self) -> int:
        return self.cached.stats().cache_bytes

    def unseen_reads(self) -> int:
        return self.cached.stats().reads  # signals go to the host in one copy


class OursFirstBlock(Ours):
    name, method = "ours-first-block", "first block"

    def schedule(self) -> CacheSchedule:
        return schedules.mask(self.plan.bits, regions=Trunk(first=1), storage="residual")


class OursFirstBlockLine(Ours):
    name, method = "ours-first-block-line", "first block, line"

    def schedule(self) -> CacheSchedule:
        return schedules.mask(self.plan.bits, regions=Trunk(first=1), forecast=Linear(), storage="residual")


class OursSublayers(Ours):
    name, method = "ours-sublayers-line", "sublayers, line"

    def schedule(self) -> CacheSchedule:
        return schedules.mask(self.plan.bits, regions=Sublayers(), forecast=Linear(), storage="value")


class OursTrunk(Ours):
    name, method = "ours-trunk", "trunk"

    def schedule(self) -> CacheSchedule:
        return schedules.mask(self.plan.bits, regions=Trunk(first=0), storage="residual")


class OursAttention(Ours):
    name, method = "ours-attention", "attention"

    def schedule(self) -> CacheSchedule:
        kinds = ("attention", "cross_attention")
        return schedules.mask(self.plan.bits, regions=Sublayers(kinds=kinds), storage="value")


class OursFactory(Ours):
    """A published method by its factory in `schedules`, its guard at work where it has one."""

    how = "its own options: the plan's warm-up and longest run of reuses, and a threshold that is never reached"

    @property
    def longest(self) -> int:
        """Most reuses in a row."""
        return self.plan.every - 1


class OursFirstBlockCache(OursFactory):
    name, method = "ours-first_block_cache", "first block"

    def schedule(self) -> CacheSchedule:
        return schedules.first_block_cache(NEVER, warm_up=self.plan.warm_up, longest_reuse=self.longest)


class OursDBCache(OursFactory):
    name, method = "ours-db_cache", "first block, line"

    def schedule(self) -> CacheSchedule:
        return schedules.db_cache(1, 0, NEVER, forecast=Linear(), warm_up=self.plan.warm_up, longest_reuse=self.longest)


class OursTaylorSeer(OursFactory):
    name, method = "ours-taylor_seer", "sublayers, line"
    how = "its own options: interval and warm-up of the plan"

    def schedule(self) -> CacheSchedule:
        return schedules.taylor_seer(self.plan.every, order=1, warm_up=self.plan.warm_up)


class OursMagCache(OursFactory):
    name, method = "ours-mag_cache", "trunk"
    how = "its own options: ratios of 1, retention for the warm-up, and the plan's longest run of reuses"

    def schedule(self) -> CacheSchedule:
        plan = self.plan
        ratios = (1.0,) * plan.steps
        return schedules.mag_cache(0.06, ratios, longest=self.longest, retention=plan.warm_up / plan.steps)


class OursPAB(OursFactory):
    name, method = "ours-pab", "attention"
    how = "its own options: the plan's interval for all attention and a window of all timesteps; and its warm-up"

    def schedule(self) -> CacheSchedule:
        every = self.plan.every
        return schedules.pab(every, every if self.crosses() else 0, window=(-1.0, math.inf))

    def forced(self, schedule: CacheSchedule) -> CacheSchedule:
        return replace(schedule, warm_up=self.plan.warm_up)

    def crosses(self) -> bool:
        """Whether the model has cross-attention: without, the method has one rule only."""
        return any(getattr(module, "is_cross_attention", False) for module in self.model.modules())


OURS: tuple[type[Ours], ...] = (
    OursFirstBlock,
    OursFirstBlockCache,
    OursFirstBlockLine,
    OursDBCache,
    OursSublayers,
    OursTaylorSeer,
    OursTrunk,
    OursMagCache,
    OursAttention,
    OursPAB,
)
