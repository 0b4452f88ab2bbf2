"""cache-dit as contenders of `bench.peers`: the transformer-only interface, through its BlockAdapter."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

from .peer_contenders import Contender, statements


class CacheDiT(Contender):
    """What the three settings share: the first block computed (F1B0), the residual of all further blocks cached."""

    library = "cache-dit"
    glue = ("install", "begin")
    recompile_limit = 96  # its user guide, COMPILE.md
    static: ClassVar[bool] = False
    taylor: ClassVar[bool] = False
    how = (
        "its own options: max_warmup_steps and max_continuous_cached_steps of the plan, and a residual threshold "
        "(0.999) that is not reached; the signal is computed and read at the steps that may be reused"
    )

    def install(self) -> None:
        import cache_dit
        from cache_dit import BlockAdapter, ForwardPattern

        adapter = BlockAdapter(
            transformer=self.model,
            blocks=self.model.transformer_blocks,  # type: ignore[arg-type]
            forward_pattern=ForwardPattern.Pattern_3,
            patch_functor=self.functor(),
        )
        cache_dit.enable_cache(adapter, cache_config=self.config(), calibrator_config=self.calibrator())

    def functor(self) -> Any:
        """This model's forward reads an embedding out of its first block, which the cached blocks lack: cache-dit's own
        replacement of that forward is needed."""
        from cache_dit.caching.patch_functors import DiTPatchFunctor

        return DiTPatchFunctor() if type(self.model).__name__.startswith("DiT") else None

    def adapter_lines(self) -> int:
        return super().adapter_lines() + (statements(CacheDiT.functor) if self.functor() is not None else 0)

    def config(self) -> Any:
        """The plan as cache-dit's options."""
        from cache_dit import DBCacheConfig

        plan = self.plan
        config = DBCacheConfig(
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            residual_diff_threshold=0.999,  # from 1 on it reuses without looking
            max_warmup_steps=plan.warm_up,
            max_continuous_cached_steps=plan.every - 1,
            num_inference_steps=plan.steps,
        )
        if self.static:
            config.steps_computation_mask = list(plan.bits)
            config.steps_computation_policy = "static"
        return config

    def calibrator(self) -> Any:
        """The forecast of order 1, or none."""
        if not self.taylor:
            return None
        from cache_dit import TaylorSeerCalibratorConfig

        return TaylorSeerCalibratorConfig(taylorseer_order=1)

    def begin(self) -> None:
        # Without it the first call of a generation still belongs to the last one: its refresh comes a call late.
        import cache_dit

        cache_dit.refresh_context(self.model, num_inference_steps=self.plan.steps)

    def contexts(self) -> list[Any]:
        """The cache contexts; one for each list of blocks."""
        model: Any = self.model
        return [model._context_manager.get_context(name) for name in model._context_names]

    def refreshed(self) -> bool:
        context = self.contexts()[0]
        return context.get_current_step() not in context.get_cached_steps()

    def roots(self) -> Iterable[Any]:
        """The buffers of each context, and the states of its calibrators."""
        return self.contexts()


class DBCache(CacheDiT):
    name, method = "cache-dit-dbcache", "first block"


class DBCacheStatic(CacheDiT):
    name, method = "cache-dit-dbcache-static", "first block"
    static = True
    how = "its own options: steps_computation_mask with the static policy, which computes no signal"


class DBCacheTaylorSeer(CacheDiT):
    name, method = "cache-dit-taylorseer", "first block, line"
    taylor = True
    unequal = (
        "it counts steps from the first stored value and takes no difference before its step 2: until the second "
        "refresh after the warm-up it holds, where the others continue the line"
    )


CACHE_DIT: tuple[type[CacheDiT], ...] = (DBCache, DBCacheStatic, DBCacheTaylorSeer)
