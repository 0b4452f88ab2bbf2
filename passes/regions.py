"""SelectRegions: resolve a schedule's selections to sets of graph nodes, from module paths and def-use alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import fx

from diffcache_fx.errors import RegionError, nearest
from diffcache_fx.program import Region, StepProgram, module_path, returned, value_of
from diffcache_fx.selection import Blocks, Listed, Modules, Scale, Selection, Sublayers, Trunk, Whole, absolute

from .reach import Reach, varying
from .scales import find_scales, is_unet
from .stacks import Block, find_stacks, find_trunk
from .sublayers import find_sublayers

Found = list[tuple[str, set[fx.Node], tuple[str, ...]]]


@dataclass(frozen=True)
class SelectRegions:
    """Give the program its regions: one selection for each rule of the schedule, in order.

    Rules:
    1. A block or module owns the nodes traced while it was being called (not those of its submodules called from
       elsewhere: an embedder that sits in block 0 but is called by the head belongs to the head).
    2. A region made of several blocks takes in what lies between them.
    3. A node that depends on no input of the step (a table made from constants) leaves its region if something outside
       uses it: it is neither worth caching nor stale.
    4. Sizes (SymInts) leave too.

    Refuses: a selection that finds nothing (the nearest names are offered), and regions that overlap.
    """

    selections: tuple[Selection, ...]

    def __call__(self, program: StepProgram) -> StepProgram:
        reach = Reach(program.graph)
        free = set(reach.nodes) - varying(program)
        taken: dict[fx.Node, str] = {}
        regions: list[Region] = []
        for rule, selection in enumerate(self.selections):
            found = _select(program, selection, reach)
            names = {region.name for region in regions}
            for name, nodes, blocks in found:
                kept = _without_free(nodes, free)
                if not kept:
                    continue
                for node in kept:
                    if node in taken:
                        raise RegionError(
                            f"the regions {taken[node]!r} and {name!r} overlap (at {node.name}): the rules of a "
                            "schedule must select disjoint parts of the model"
                        )
                    taken[node] = name
                unique = name if name not in names else f"{name}#{rule}"
                names.add(unique)
                regions.append(Region(unique, frozenset(n.name for n in kept), rule=rule, blocks=blocks))
        return program.replace(regions=tuple(regions))


def _without_free(nodes: set[fx.Node], free: set[fx.Node]) -> set[fx.Node]:
    """Rules 3 and 4: take out constants and sizes that something outside the region needs."""
    kept = {node for node in nodes if node.op == "call_function"}
    for node in sorted(kept, reverse=True):
        loose = node in free or isinstance(value_of(node), (torch.SymInt, int))
        if loose and any(user not in kept for user in node.users):
            kept.discard(node)
    return kept


def _select(program: StepProgram, selection: Selection, reach: Reach) -> Found:
    if isinstance(selection, Trunk):
        scales = find_scales(program, reach)
        if is_unet(scales):
            return _scale(program, min(selection.branch, len(scales) - 1), reach)
        return _blocks(program, Blocks(selection.first, selection.last), reach)
    if isinstance(selection, Blocks):
        return _blocks(program, selection, reach)
    if isinstance(selection, Whole):
        return _whole(program, reach)
    if isinstance(selection, Scale):
        return _scale(program, selection.branch, reach)
    if isinstance(selection, Sublayers):
        return _sublayers(program, selection, reach)
    if isinstance(selection, Modules):
        return _modules(program, selection.patterns)
    assert isinstance(selection, Listed)
    return _listed(program, selection, reach)


def _trunk(program: StepProgram, reach: Reach, first: float, last: float) -> list[Block]:
    trunk = find_trunk(program, reach)
    if not trunk:
        raise RegionError(
            "no repeated blocks were found in this model (a numbered container of modules of one class, run in "
            "sequence): select regions by module path instead, for example Modules(('*.attn',)) or Listed(...). "
            f"Modules called: {_some(_modules_called(program))}"
        )
    start, stop = absolute(first, len(trunk)), len(trunk) - absolute(last, len(trunk))
    if start >= stop:
        raise RegionError(
            f"leaving out the first {start} and the last {len(trunk) - stop} blocks leaves none of the "
            f"{len(trunk)} blocks: leave out fewer"
        )
    return trunk[start:stop]


def _blocks(program: StepProgram, selection: Blocks, reach: Reach) -> Found:
    trunk = _trunk(program, reach, selection.first, selection.last)
    if selection.each:
        return [(block.path, set(block.nodes), (block.path,)) for block in trunk]
    if len(trunk) <= selection.tail:
        raise RegionError(f"tail={selection.tail} leaves no block before it: {len(trunk)} are selected in all")
    parts = [trunk[: len(trunk) - selection.tail], trunk[len(trunk) - selection.tail :]]
    found: Found = []
    taken: set[fx.Node] = set()
    for part in filter(None, parts):
        nodes = set(reach.members(reach.between([node for block in part for node in block.nodes]))) - taken
        taken |= nodes
        name = part[0].path if len(part) == 1 else f"{part[0].path}..{part[-1].path}"
        found.append((name, nodes, tuple(block.path for block in part)))
    return found


def _whole(program: StepProgram, reach: Reach) -> Found:
    """Everything the outputs are computed from."""
    results = [value for value in returned(program.graph) if isinstance(value, fx.Node)]
    nodes = reach.members(reach.bits(results) | reach.ancestors(results))
    return [("model", set(nodes), ())]


def _scale(program: StepProgram, branch: int, reach: Reach) -> Found:
    scales = find_scales(program, reach)
    if not scales:
        raise RegionError(
            "this model has no nested scales (no skip values that cross from a down path to an up path): deep_cache "
            "and Scale apply to U-Nets; use Trunk or Blocks here"
        )
    if branch >= len(scales):
        raise RegionError(f"branch {branch} asked for, but this model has scales 0 to {len(scales) - 1}")
    nodes = set(reach.members(scales[branch].inside))
    return [(f"scale{branch}", nodes, tuple(dict.fromkeys(_top(node) for node in sorted(nodes))))]


def _sublayers(program: StepProgram, selection: Sublayers, reach: Reach) -> Found:
    layers = find_sublayers(program, reach)
    if selection.first or selection.last:
        inside = {block.path for block in _trunk(program, reach, selection.first, selection.last)}
        layers = [layer for layer in layers if any(layer.path.startswith(path + ".") for path in inside)]
    found: Found = [(layer.path, set(layer.nodes), (layer.path,)) for layer in layers if layer.kind in selection.kinds]
    if not found:
        kinds = sorted({layer.kind for layer in layers})
        raise RegionError(
            f"no {' or '.join(selection.kinds)} layers were found in this model"
            + (
                f"; found: {', '.join(kinds)}: select these, or take a schedule that needs others, such as interval"
                if kinds
                else "; select by module path: Modules(('*.attn',))"
            )
        )
    return found


def _modules_called(program: StepProgram) -> dict[str, list[fx.Node]]:
    """Every module call of the graph (FQN, `@n` for repeated calls) with the nodes traced in it, outermost first."""
    calls: dict[str, list[fx.Node]] = defaultdict(list)
    for node in program.graph.nodes:
        if node.op == "call_function":
            for fqn, _ in module_path(node):
                if fqn:
                    calls[fqn].append(node)
    return calls


def _matching(calls: dict[str, list[fx.Node]], pattern: str) -> list[str]:
    matched = [fqn for fqn in calls if fnmatchcase(fqn.partition("@")[0], pattern)]
    if not matched:
        near = nearest(pattern, {fqn.partition("@")[0] for fqn in calls})
        raise RegionError(f"no module of this model matches {pattern!r}{near or ': model.named_modules() tells names'}")
    return matched


def _modules(program: StepProgram, patterns: Iterable[str]) -> Found:
    calls = _modules_called(program)
    chosen = dict.fromkeys(fqn for pattern in patterns for fqn in _matching(calls, pattern))
    sets = {fqn: set(calls[fqn]) for fqn in chosen}
    # Of nested matches the outermost counts; a smaller set inside a larger one is nested.
    outer = [a for a in sets if not any(a != b and sets[a] < sets[b] for b in sets)]
    unique: dict[frozenset[fx.Node], str] = {}
    for fqn in outer:
        unique.setdefault(frozenset(sets[fqn]), fqn)
    return [(fqn, set(nodes), (fqn,)) for nodes, fqn in unique.items()]


def _listed(program: StepProgram, selection: Listed, reach: Reach) -> Found:
    calls = _modules_called(program)
    found: Found = []
    for group in selection.groups:
        paths = [fqn for pattern in group for fqn in _matching(calls, pattern)]
        nodes = {node for fqn in paths for node in calls[fqn]}
        if selection.fill:
            nodes = set(reach.members(reach.between(nodes)))
        found.append(("+".join(group), nodes, tuple(paths)))
    return found


def _top(node: fx.Node) -> str:
    path = module_path(node)
    return path[1][0] if len(path) > 1 else ""


def _some(calls: Iterable[str], limit: int = 6) -> str:
    names = list(calls)
    return ", ".join(names[:limit]) + (", ..." if len(names) > limit else "")


__all__ = ["SelectRegions", "find_stacks"]
