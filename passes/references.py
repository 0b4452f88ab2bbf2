"""Where in a graph the reference quantities of adaptive guards are: from blocks, def-use and what depends on the
latents and the timestep. No model is named."""

from __future__ import annotations

import torch
from torch import fx

from diffcache_fx.errors import RegionError
from diffcache_fx.program import StepProgram, returned, size_hint, value_of
from diffcache_fx.references import BlocksOutput, Latents, ModelOutput, ModulatedInput, Reference, TrunkInput

from .cut import carried_from
from .flops import flops_of
from .reach import Reach, latent_input, timestep_input, varying
from .scales import find_scales, is_unet
from .stacks import Block, find_trunk

_OTHERS = (
    "guards that apply to any model: easy_cache (watches the latents and the output), mag_cache (given ratios), and "
    "the static schedules"
)

# Operators that take the type or the shape of another tensor, not its values.
_LIKE = tuple(
    f"aten::{name}"
    for name in (
        *("type_as", "expand_as", "view_as", "reshape_as"),
        *("zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like"),
    )
)


class References:
    """Finds reference quantities in one program. Raises RegionError where the model has no such quantity."""

    def __init__(self, program: StepProgram) -> None:
        self.program = program
        self.reach = Reach(program.graph)
        self._trunk: list[Block] | None = None

    def find(self, reference: Reference) -> tuple[fx.Node, fx.Node | None]:
        """The node of the quantity, and the node to subtract from it (None: nothing)."""
        if isinstance(reference, Latents):
            return self._latents(), None
        if isinstance(reference, ModelOutput):
            value = returned(self.program.graph)[0]
            assert isinstance(value, fx.Node)
            return value, None
        if isinstance(reference, ModulatedInput):
            return self._modulated(), None
        if isinstance(reference, TrunkInput):
            return self._stream(1)[1], None
        assert isinstance(reference, BlocksOutput)
        out, base = self._stream(reference.first)
        return out, base if reference.residual else None

    def _touched(self, start: fx.Node | None) -> int:
        """The nodes whose values depend on `start`, itself included; what only takes its type or shape does not."""
        found = {start}
        for node in self.reach.nodes:
            sources = node.all_input_nodes
            name = getattr(getattr(node.target, "_schema", None), "name", "")
            if name in _LIKE:
                sources = [] if name.endswith("_like") else sources[:1]
            if any(source in found for source in sources):
                found.add(node)
        return self.reach.bits(node for node in found if node is not None)

    def _latents(self) -> fx.Node:
        node = latent_input(self.program)
        if node is None:
            raise RegionError("no input of this model looks like latents (a floating tensor of two dimensions or more)")
        return node

    @property
    def trunk(self) -> list[Block]:
        if self._trunk is None:
            if is_unet(find_scales(self.program, self.reach)):
                raise RegionError(
                    f"this model is a U-Net: it has no first block whose change tells that of the rest; {_OTHERS}, "
                    "deep_cache among them"
                )
            self._trunk = find_trunk(self.program, self.reach)
            if not self._trunk:
                raise RegionError(f"no repeated blocks were found in this model, so none is the first; {_OTHERS}")
        return self._trunk

    def _stream(self, first: int) -> tuple[fx.Node, fx.Node]:
        """What leaves the first blocks on the latents' residual stream, and what entered them on it."""
        if first >= len(self.trunk):
            raise RegionError(
                f"the guard watches the first {first} blocks, and this model has {len(self.trunk)}: watch fewer, so "
                "that some are left to reuse"
            )
        touched = self._touched(self._latents())
        nodes = [node for block in self.trunk[:first] for node in block.nodes]
        inside = set(self.reach.members(self.reach.between(nodes)))
        changing = varying(self.program)
        found = []
        for node in sorted(inside):
            if any(user not in inside for user in node.users):
                base = carried_from(node, inside, changing)
                if base is not None and touched >> self.reach.position[base] & 1:
                    found.append((_elements(node), self.reach.position[node], node, base))
        if not found:
            raise RegionError(
                f"the first {first} block(s) ({self.trunk[0].path}, ...) add nothing onto a stream that depends on the "
                f"latents; {_OTHERS}"
            )
        _, _, out, base = max(found, key=lambda entry: entry[:2])
        return out, base

    def _modulated(self) -> fx.Node:
        """The input of the first weighted layer of block 0 that comes from the latents, scaled or shifted inside the
        block by what comes from the timestep alone."""
        block = self.trunk[0]
        touched, timed = self._touched(self._latents()), self._touched(timestep_input(self.program))

        def on(bits: int, node: fx.Node) -> bool:
            return bool(bits >> self.reach.position[node] & 1)

        own = set(block.nodes)
        for node in block.nodes:
            source = node.args[0] if node.args else None
            if not flops_of(node) or not isinstance(source, fx.Node) or not on(touched, source):
                continue
            seen, stack = {source}, [source]
            while stack:
                value = stack.pop()
                arguments = value.all_input_nodes if value in own else []
                if any(on(timed, a) and not on(touched, a) for a in arguments):
                    return source
                for argument in arguments:
                    if argument not in seen and on(touched, argument):
                        seen.add(argument)
                        stack.append(argument)
            break
        raise RegionError(
            f"what enters the first layer of {block.path} is not modulated by the timestep, so there is nothing for "
            f"this guard to watch; first_block_cache, db_cache and di_cache watch a block's output; {_OTHERS}"
        )


def _elements(node: fx.Node) -> int:
    value = value_of(node)
    if not isinstance(value, torch.Tensor):
        return 0
    count = 1
    for size in value.shape:
        count *= size_hint(size)
    return count
