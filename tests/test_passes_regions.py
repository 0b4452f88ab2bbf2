"""Finding regions: stacks of blocks, nested scales, sub-layers, module globs."""

from __future__ import annotations

import itertools

import pytest
import torch
from diffcache_fx.passes.normalize import Normalize
from diffcache_fx.passes.reach import Reach, latent_input, timestep_input, varying
from diffcache_fx.passes.regions import SelectRegions
from diffcache_fx.passes.scales import find_scales, is_unet
from diffcache_fx.passes.stacks import find_stacks, find_trunk
from diffcache_fx.passes.sublayers import find_sublayers
from torch import nn
from torch.nn import functional as F

from diffcache_fx import Blocks, Listed, Modules, RegionError, Scale, Sublayers, Trunk
from diffcache_fx.program import StepProgram

from .conftest import captured, sample, text

pytestmark = pytest.mark.usefixtures("one_thread")
DIM = 8


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(DIM, DIM) for _ in range(4))

    def forward(self, x: torch.Tensor, context: torch.Tensor | None = None) -> torch.Tensor:
        source = x if context is None else context
        heads = [
            layer(s).unflatten(-1, (2, 4)).transpose(1, 2)
            for layer, s in ((self.query, x), (self.key, source), (self.value, source))
        ]
        return self.out(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))


class Mlp(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(DIM, 16), nn.GELU(), nn.Linear(16, DIM))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn, self.cross, self.mlp = Attention(), Attention(), Mlp()

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(x)
        x = x + self.cross(x, context)
        return x + self.mlp(x)


class Single(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(x)


class Transformer(nn.Module):
    """Two stacks in series on the latents' path, one beside it on the text, and a head of two numbered linears."""

    def __init__(self) -> None:
        super().__init__()
        self.text = nn.ModuleList(Single() for _ in range(2))
        self.twins = nn.ModuleList(Layer() for _ in range(3))
        self.single = nn.ModuleList(Single() for _ in range(4))
        self.head = nn.Sequential(nn.Linear(DIM, DIM), nn.Linear(DIM, DIM))

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        for block in self.text:
            context = block(context)
        x = hidden_states + torch.sin(timestep)
        for block in self.twins:
            x = block(x, context)
        for block in self.single:
            x = block(x)
        return self.head(x)


@pytest.fixture(scope="module")
def program() -> StepProgram:
    torch.manual_seed(0)
    raw = captured(Transformer(), torch.randn(2, 5, DIM), torch.tensor(0.5), torch.randn(2, 3, DIM))
    return Normalize()(raw)


def names(program: StepProgram, *selections: object) -> list[str]:
    before = text(program.graph)
    result = SelectRegions(selections)(program)  # type: ignore[arg-type]
    assert text(program.graph) == before
    assert program.regions == ()
    seen: set[str] = set()
    for region in result.regions:
        assert region.nodes
        assert not seen & region.nodes
        seen |= region.nodes
    return [region.name for region in result.regions]


def test_stacks(program: StepProgram) -> None:
    stacks = find_stacks(program)
    assert [(s.container, len(s.blocks)) for s in stacks] == [("text", 2), ("twins", 3), ("single", 4)]
    assert all(block.flops > 0 for stack in stacks for block in stack.blocks)
    trunk = [block.path for block in find_trunk(program)]
    assert trunk == [f"twins.{i}" for i in range(3)] + [f"single.{i}" for i in range(4)]


def test_trunk_and_blocks(program: StepProgram) -> None:
    assert names(program, Trunk()) == ["twins.1..single.3"]
    assert names(program, Trunk(first=2, last=1)) == ["twins.2..single.2"]
    assert names(program, Blocks(first=3, last=3)) == ["single.0"]
    assert names(program, Blocks(first=0.5, each=True)) == ["single.1", "single.2", "single.3"]
    assert len(names(program, Blocks(first=0, each=True))) == 7


def test_a_trunk_is_one_convex_piece(program: StepProgram) -> None:
    (region,) = SelectRegions((Trunk(),))(program).regions
    nodes = program.named_nodes()
    assert Reach(program.graph).is_convex(nodes[name] for name in region.nodes)
    assert region.blocks == ("twins.1", "twins.2", "single.0", "single.1", "single.2", "single.3")


def test_sublayers(program: StepProgram) -> None:
    kinds = {layer.path: layer.kind for layer in find_sublayers(program)}
    assert kinds["twins.0.attn"] == "attention"
    assert kinds["twins.0.cross"] == "cross_attention"
    assert kinds["twins.2.mlp"] == "mlp"
    assert names(program, Sublayers(kinds=("attention",))) == [f"twins.{i}.attn" for i in range(3)]
    assert names(program, Sublayers(kinds=("cross_attention",), first=1)) == ["twins.1.cross", "twins.2.cross"]


def test_modules_by_glob(program: StepProgram) -> None:
    assert names(program, Modules(("*.attn",))) == [f"twins.{i}.attn" for i in range(3)]
    assert names(program, Modules(("twins.?", "*.mlp"))) == [
        *(f"twins.{i}" for i in range(3)),
        *(f"text.{i}.mlp" for i in range(2)),
        *(f"single.{i}.mlp" for i in range(4)),
    ]


def test_listed_regions_fill_their_gaps(program: StepProgram) -> None:
    groups = (("single.0", "single.2"),)
    (filled,) = SelectRegions((Listed(groups),))(program).regions
    (loose,) = SelectRegions((Listed(groups, fill=False),))(program).regions
    assert loose.nodes < filled.nodes
    reach, nodes = Reach(program.graph), program.named_nodes()
    assert reach.is_convex(nodes[name] for name in filled.nodes)
    assert not reach.is_convex(nodes[name] for name in loose.nodes)
    assert names(program, Listed((("twins.0",), ("twins.1", "twins.2")))) == ["twins.0", "twins.1+twins.2"]


def test_several_rules(program: StepProgram) -> None:
    chosen = SelectRegions((Modules(("twins.0.attn",)), Modules(("single.*",))))(program).regions
    assert [(region.name, region.rule) for region in chosen] == [("twins.0.attn", 0)] + [
        (f"single.{i}", 1) for i in range(4)
    ]


@pytest.mark.parametrize(
    ("selection", "word"),
    [
        (Modules(("*.atn",)), "no module"),
        (Listed((("sinlge.0",),)), "did you mean 'single.0'"),
        (Blocks(first=4, last=3), "leave out fewer"),
        (Scale(0), "no nested scales"),
    ],
)
def test_refusals(program: StepProgram, selection: object, word: str) -> None:
    with pytest.raises(RegionError, match=word):
        names(program, selection)
    with pytest.raises(RegionError, match="overlap"):
        names(program, Trunk(), Modules(("twins.1.attn",)))


class Shared(nn.Module):
    """One block called three times, and a table that depends on nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Tabled()])

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x, table = self.blocks[0](x)
        return x * t + table


class Tabled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        table = torch.arange(DIM, dtype=torch.float32).cos()
        return x + self.mlp(x) * table, table


def test_each_call_of_a_shared_module_is_a_region_and_constants_leave() -> None:
    shared = Normalize()(captured(Shared(), torch.randn(2, DIM), torch.tensor(0.5)))
    chosen = SelectRegions((Modules(("blocks.0",)),))(shared).regions
    assert len(chosen) == 3
    free = {node.name for node in set(shared.graph.nodes) - varying(shared)}
    nodes = shared.named_nodes()
    for region in chosen:
        leaving = {name for name in region.nodes if any(user.name not in region.nodes for user in nodes[name].users)}
        assert not leaving & free


def test_latents_and_timestep(program: StepProgram) -> None:
    latents, timestep = latent_input(program), timestep_input(program)
    assert latents is not None
    assert timestep is not None
    assert (latents.name, timestep.name) == ("hidden_states", "timestep")


@pytest.mark.parametrize(
    "name", ["plain-unet", "plain-mlp", "plain-vit", "plain-dit-shared-adaln", "DiTTransformer2DModel"]
)
def test_inputs_of_the_corpus(name: str) -> None:
    model = sample(name)
    latents, timestep = latent_input(model.program), timestep_input(model.program)
    assert latents is not None
    assert timestep is not None
    named = {node.name: i for i, node in enumerate(n for n in model.program.graph.nodes if n.op == "placeholder")}
    leaves = {e.name: int(e.target) for e in model.program.inputs if e.name in (latents.name, timestep.name)}
    flat = [*model.args, *(model.kwargs[key] for key in sorted(model.kwargs))]
    assert flat[leaves[latents.name]] is (
        model.args[model.entry.latent] if isinstance(model.entry.latent, int) else model.kwargs[model.entry.latent]
    )
    assert flat[leaves[timestep.name]] is (
        model.args[model.entry.timestep]
        if isinstance(model.entry.timestep, int)
        else model.kwargs[model.entry.timestep]
    )
    assert named[latents.name] >= 0


def test_scales_of_a_unet() -> None:
    program = sample("plain-unet").program
    scales = find_scales(program)
    assert is_unet(scales)
    assert len(scales) == 6  # one for each skip
    reach = Reach(program.graph)
    for outer, inner in itertools.pairwise(scales):
        assert inner.inside & ~outer.inside == 0
        assert inner.flops < outer.flops
    for scale in scales:
        assert reach.is_convex(reach.members(scale.inside))
    assert names(program, Scale(2)) == ["scale2"]
    assert names(program, Trunk()) == ["scale0"]
    with pytest.raises(RegionError, match="0 to 5"):
        names(program, Scale(6))


def test_a_transformer_has_no_scales(program: StepProgram) -> None:
    assert not is_unet(find_scales(program))
    assert not is_unet(find_scales(sample("plain-dit-shared-adaln").program))


def test_reach(program: StepProgram) -> None:
    reach = Reach(program.graph)
    nodes = reach.nodes
    for place in range(0, len(nodes), 7):
        node = nodes[place]
        below = {node}
        for later in nodes[place:]:
            if any(source in below for source in later.all_input_nodes):
                below.add(later)
        assert reach.descendants([node]) == reach.bits(below - {node})
        assert all(reach.above[reach.position[n]] >> place & 1 for n in below - {node})
    assert reach.members(reach.bits(nodes[3:9])) == nodes[3:9]
