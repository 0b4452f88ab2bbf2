"""Drop state: what no program ever takes from the cache is not returned for it."""

from __future__ import annotations

from dataclasses import dataclass

from diffcache_fx.errors import RegionError, nearest
from diffcache_fx.program import InputKind, OutputKind, StepProgram, returned

from .emit import drop_unused_inputs, set_outputs
from .purity import eliminate_dead


@dataclass(frozen=True)
class DropState:
    """Remove the STATE outputs of these regions, and what only they needed.

    regions: those that no program of the set reuses. A schedule that never reuses becomes the plain, uncached step.

    Before:  a = block0(x); b = block1(a); return head(b), b        regions: {block1}
    After:   a = block0(x); b = block1(a); return head(b)

    Refuses: names that are no regions of the program.
    """

    regions: frozenset[str] = frozenset()

    def __call__(self, program: StepProgram) -> StepProgram:
        names = [region.name for region in program.regions]
        for name in sorted(self.regions - set(names)):
            raise RegionError(f"no region is called {name!r}{nearest(name, names)}")
        result = program.copy()
        kept = [
            (value, output)
            for value, output in zip(returned(result.graph), program.outputs, strict=True)
            if output.kind is not OutputKind.STATE or output.target.rpartition("/")[0] not in self.regions
        ]
        set_outputs(result.graph, [value for value, _ in kept])
        eliminate_dead(result.graph)
        result = result.replace(outputs=tuple(output for _, output in kept))
        return drop_unused_inputs(result, frozenset({InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT}))
