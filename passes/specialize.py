"""Specialize: straight-line code for one known set of reused regions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from diffcache_fx.errors import RegionError, nearest
from diffcache_fx.judgement import relative_l1
from diffcache_fx.program import Input, InputKind, Output, OutputKind, StepProgram, output_node, returned

from .compare import compared
from .correct import corrected
from .emit import (
    aten,
    call,
    detach_outputs,
    drop_unused_inputs,
    history_target,
    placeholder,
    row_of,
    safe,
    set_outputs,
    to_stored,
    weighted_sum,
)
from .inline import inline
from .purity import eliminate_dead


@dataclass(frozen=True)
class Specialize:
    """Write the step program in which the regions in `reused` come from the cache and all others are computed.

    Rules:
    1. A reused region's cut is the weighted sum of its history (one slot: the slot itself), scaled and shifted where
       its rule corrects it, plus the fresh base where stored as a residual. The region's nodes die, and with them what
       only fed them, down to the parameters.
    2. A computed region's cut is returned as state; the fresh value itself flows on, so refreshing is exact.
    3. State is returned contiguous and in memory of its own; no output aliases the cache.
    4. A region whose forecast is verified (`program.measured`) is computed all the same, on what enters it at this
       step; nothing but the SIGNAL output "rule/error", the relative L1 difference to the forecast, uses the result.
    5. With `compare`, every reused region is computed like that, and SIGNAL outputs "region/index/moments" tell how the
       forecast, before it is corrected, relates to what is computed, channel by channel (see `compare`).

    Before:  a = block0(x); b = block1(a); return head(b)                       region: block1, cut: b
    After:   reused={}:        ...; return head(b), b
             reused={block1}:  (h) a = block0(x) [dead]; return head(h)

    Refuses: names that are no regions of the program; a program that is specialised already.
    """

    reused: frozenset[str] = frozenset()
    compare: bool = False

    def __call__(self, program: StepProgram) -> StepProgram:
        names = [region.name for region in program.regions]
        for name in self.reused:
            if name not in names:
                raise RegionError(f"no region is called {name!r}{nearest(name, names)}")
        takes, gives = {entry.kind for entry in program.inputs}, {entry.kind for entry in program.outputs}
        if InputKind.HISTORY in takes or OutputKind.STATE in gives:
            raise RegionError("this program is specialised already: specialise the captured one")
        result = program.copy()
        graph = result.graph
        nodes = result.named_nodes()
        inputs = list(program.inputs)
        held: set[fx.Node] = set()
        users = [value for value in returned(graph) if isinstance(value, fx.Node)]
        reused = [region for region in program.regions if region.name in self.reused]

        rows: fx.Node | None = None
        width = max((value.slots for region in reused for value in region.cut), default=1)
        slots: dict[str, fx.Node] = {}
        device = next((value.device for region in program.regions for value in region.cut), None)
        for region in reused:
            for index, value in enumerate(region.cut):
                for slot in range(value.slots):
                    node = placeholder(
                        graph, f"h_{safe(region.name)}_{index}_{slot}", value.shape, value.dtype, value.device
                    )
                    target = history_target(region.name, index, slot)
                    slots[target] = node
                    held.add(node)
                    inputs.append(Input(InputKind.HISTORY, node.name, target))
        if width > 1:
            assert device is not None
            rows = placeholder(graph, "rows", (len(names), width), torch.float32, device)
            inputs.append(Input(InputKind.ROWS, rows.name, "rows"))
            held.add(rows)

        checked = {name: entry.rule for entry in program.measured for name in entry.checks}
        verified: dict[str, tuple[fx.Node, fx.Node]] = {}
        beside: dict[str, fx.Node] = {}
        for region in reused:
            inside = {nodes[name] for name in region.nodes}
            for index, value in enumerate(region.cut):
                fresh = nodes[value.node]
                with graph.inserting_after(fresh):
                    anchor = graph.call_function(aten.alias.default, (fresh,))
                with graph.inserting_before(anchor):
                    row = row_of(graph, rows, names.index(region.name), value.slots)
                    history = [slots[history_target(region.name, index, slot)] for slot in range(value.slots)]
                    filled = weighted_sum(graph, history, row, value)
                    base = nodes[value.base] if value.base is not None else None
                    forecast = filled
                    if value.scale is not None and value.shift is not None:
                        filled = corrected(graph, filled, value, nodes[value.scale], nodes[value.shift])
                    if base is not None:
                        filled = call(graph, aten.add.Tensor, base, filled, like=fresh)
                    fresh.replace_all_uses_with(
                        filled,
                        delete_user_cb=lambda user, stay=inside | {anchor}: user not in stay,  # type: ignore[misc]
                    )
                    if self.compare and value.dtype.is_floating_point:
                        beside[f"{region.name}/{index}"] = compared(graph, forecast, fresh, base)
                graph.erase_node(anchor)
                nodes[value.node] = filled
                if region.name in checked and index == 0:
                    verified[region.name] = (filled, fresh)

        users = [value for value in returned(graph) if isinstance(value, fx.Node)]
        states: list[fx.Node] = []
        outputs = list(program.outputs)
        with graph.inserting_before(output_node(graph)):
            for name, rule in checked.items():
                fresh = nodes[program.region(name).cut[0].node]
                pair = verified.get(name, (fresh, fresh))
                users.append(inline(graph, lambda values: relative_l1(*values), list(pair)))
                outputs.append(Output(OutputKind.SIGNAL, f"{rule}/error"))
            users += beside.values()
            outputs += [Output(OutputKind.SIGNAL, f"{target}/moments") for target in beside]
            for region in program.regions:
                if region.name in self.reused:
                    continue
                for index, value in enumerate(region.cut):
                    node = nodes[value.node]
                    if value.base is not None:
                        node = call(graph, aten.sub.Tensor, node, nodes[value.base], like=node)
                    states.append(to_stored(graph, node, value))
                    outputs.append(Output(OutputKind.STATE, f"{region.name}/{index}"))
        users, states = detach_outputs(graph, users, states, held)
        set_outputs(graph, [*users, *states])
        eliminate_dead(graph)
        result = result.replace(inputs=tuple(inputs), outputs=tuple(outputs), reused=self.reused)
        return drop_unused_inputs(
            result,
            frozenset({InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT, InputKind.USER, InputKind.MOMENT}),
        )
