"""The caching hooks of diffusers as contenders of `bench.peers`.

Neither model class here has diffusers' CacheMixin, and neither pipeline enters a cache context: both are glue.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, ClassVar

import torch

from .peer_contenders import CONTEXT, Contender


class Diffusers(Contender):
    """What the four hooks share."""

    library = "diffusers"
    glue = ("mix_in", "install", "context")
    hook: ClassVar[str]  # the name a hook is registered under

    def mix_in(self) -> None:
        """Give the model enable_cache, cache_context and _reset_stateful_cache."""
        from diffusers import CacheMixin

        kind = type(self.model)
        self.model.__class__ = type(kind.__name__, (CacheMixin, kind), {})

    def begin(self) -> None:  # pipelines do this one
        self.model._reset_stateful_cache()  # type: ignore[operator]

    def context(self) -> AbstractContextManager[Any]:
        return self.model.cache_context(CONTEXT)  # type: ignore[operator]

    def hooks(self) -> Iterator[Any]:
        """Every hook of this kind, in the order of the modules."""
        for module in self.model.modules():
            registry = getattr(module, "_diffusers_hook", None)
            found = registry.get_hook(self.hook) if registry is not None else None
            if found is not None:
                yield found

    def found(self) -> list[Any]:
        """The hooks, looked up once. Raises RuntimeError if the configuration matched no module."""
        if "_found" not in vars(self):
            self._found = list(self.hooks())
            if not self._found:
                raise RuntimeError(f"{type(self).__name__} put no hook {self.hook!r} on {type(self.model).__name__}")
        return self._found

    def state(self) -> Any:
        """The first hook's state of the generation under way; all hooks decide alike."""
        return self.found()[0].state_manager._state_cache[CONTEXT]

    def roots(self) -> Iterable[Any]:
        """The states of all hooks, by context."""
        return [hook.state_manager._state_cache for hook in self.found()]


class FirstBlockCache(Diffusers):
    """The first block's residual decides; the residual of all further blocks is held."""

    name, method = "diffusers-first-block", "first block"
    hook = "fbc_leader_block_hook"
    how = (
        "the threshold of its head hook is set ahead of each step: -1 to refresh, infinite to reuse; the signal is "
        "computed and read at every step as ever"
    )

    def install(self) -> None:
        from diffusers import FirstBlockCacheConfig

        self.mix_in()
        self.model.enable_cache(FirstBlockCacheConfig(threshold=0.05))  # type: ignore[operator]

    def force(self, step: int) -> None:
        self.found()[0].threshold = -1.0 if self.plan.bits[step] else math.inf

    def refreshed(self) -> bool:
        return bool(self.state().should_compute)


class MagCache(Diffusers):
    """Known magnitude ratios decide; the residual of all blocks is held."""

    name, method = "diffusers-magcache", "trunk"
    hook = "mag_cache_leader_block_hook"
    how = "its own options: ratios of 1, retention_ratio for the warm-up, max_skip_steps for the interval"

    def install(self) -> None:
        from diffusers import MagCacheConfig

        plan = self.plan
        config = MagCacheConfig(
            threshold=0.06,
            max_skip_steps=plan.every - 1,
            retention_ratio=plan.warm_up / plan.steps,
            num_inference_steps=plan.steps,
            mag_ratios=torch.ones(plan.steps),
        )
        self.mix_in()
        self.model.enable_cache(config)  # type: ignore[operator]

    def refreshed(self) -> bool:
        return bool(self.state().should_compute)


class TaylorSeer(Diffusers):
    """Attention and feed-forward outputs continued by a Taylor polynomial of order 1."""

    name, method = "diffusers-taylorseer", "sublayers, line"
    hook = "taylorseer_cache"
    how = (
        "cache_interval beyond the run, and disable_cache_before_step of each hook set ahead of each step: its own "
        "interval counts from the step after the warm-up and cannot give this plan"
    )
    unequal = (
        "cache_identifiers name attn1, attn2 and ff, as in the method's paper: the default patterns end in 'attn' and "
        "match no module of this model, so that nothing would be cached; factors in float32, as in its documentation's "
        "example, not in bfloat16"
    )

    def install(self) -> None:
        from diffusers import TaylorSeerCacheConfig

        config = TaylorSeerCacheConfig(
            cache_interval=self.plan.steps + 1,
            disable_cache_before_step=self.plan.warm_up,
            max_order=1,
            taylor_factors_dtype=torch.float32,
            cache_identifiers=[r"transformer_blocks\.\d+\.(attn1|attn2|ff)"],
        )
        self.mix_in()
        self.model.enable_cache(config)  # type: ignore[operator]

    def force(self, step: int) -> None:
        # Below it a step is computed; at it (step - it - 1) % (steps + 1) is not 0, and the step is predicted.
        before = step + self.plan.bits[step]
        for hook in self.found():
            hook.disable_cache_before_step = before

    def refreshed(self) -> bool:
        state = self.state()
        return state.last_update_step == state.current_step


class PyramidAttentionBroadcast(Diffusers):
    """Attention outputs held."""

    name, method = "diffusers-pab", "attention"
    hook = "pyramid_attention_broadcast"
    how = (
        "its own options: the timestep callback that the user supplies says a timestep inside the range to reuse and "
        "one outside to refresh; the skip range is beyond the run"
    )

    def install(self) -> None:
        from diffusers import PyramidAttentionBroadcastConfig

        self.moment = 0
        beyond = self.plan.steps + 1
        config = PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=beyond,
            cross_attention_block_skip_range=beyond,
            spatial_attention_timestep_skip_range=(0, 2),
            cross_attention_timestep_skip_range=(0, 2),
            current_timestep_callback=lambda: self.moment,
        )
        self.mix_in()
        self.model.enable_cache(config)  # type: ignore[operator]

    def force(self, step: int) -> None:
        self.moment = 0 if self.plan.bits[step] else 1
        self._before = self._held()

    def _held(self) -> int | None:
        cache = self.found()[0].state.cache
        return None if cache is None else cache.data_ptr()

    def refreshed(self) -> bool:
        return self._held() != self._before

    def roots(self) -> Iterable[Any]:
        return [hook.state for hook in self.found()]


DIFFUSERS: tuple[type[Diffusers], ...] = (FirstBlockCache, TaylorSeer, MagCache, PyramidAttentionBroadcast)
