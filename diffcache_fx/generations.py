"""Generations and contexts, as a denoiser's user sees them: one driver for each thread, named contexts, reset.

`CachedDenoiser` and a loaded bundle share this, so that they cannot disagree.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .driver import Driver
from .errors import CallError
from .recognition import Hints


class Generations:
    """What every denoiser that drives step programs offers. Subclasses say how a driver is made, and where each
    thread's own things are kept."""

    def _local(self) -> threading.local:
        raise NotImplementedError

    def _make_driver(self) -> Driver:
        raise NotImplementedError

    @property
    def _driver(self) -> Driver:
        local = self._local()
        found: Driver | None = getattr(local, "driver", None)
        if found is None:
            found = local.driver = self._make_driver()
        return found

    @property
    def _hints(self) -> Hints | None:
        """What the innermost `cache_context` around this call has said."""
        hints = self._local().__dict__.get("hints")
        return hints[-1] if hints else None

    def reset(self) -> None:
        """End the generation: the next call starts from an empty cache. Statistics stay readable until then."""
        self._driver.reset()

    def _reset_stateful_cache(self, *args: Any, **kwargs: Any) -> None:
        """Called by diffusers pipelines at the end of each run."""
        self.reset()

    @contextmanager
    def cache_context(self, name: str, **hints: Any) -> Iterator[None]:
        """Name the guidance branch of the calls inside ("cond", "uncond", ...), as diffusers pipelines do.

        Hints that are used: step_index (0 starts a generation), num_inference_steps, timestep, refinement (the sampler
        calls more than once at one timestep). Others are accepted and ignored.
        """
        if not isinstance(name, str) or not name or name.startswith("#"):
            raise CallError(f"a cache context needs a name that does not begin with '#', not {name!r}")
        local = self._local()
        if not hasattr(local, "hints"):
            local.hints = []
        local.hints.append(
            Hints(
                name,
                step_index=hints.get("step_index"),
                num_steps=hints.get("num_inference_steps"),
                timestep=hints.get("timestep"),
                refinement=bool(hints.get("refinement", False)),
            )
        )
        try:
            yield
        finally:
            local.hints.pop()
