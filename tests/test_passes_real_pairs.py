"""RealPairs: complex numbers as pairs of real ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffcache_fx.passes.guard import InsertGuards
from diffcache_fx.passes.normalize import Normalize
from diffcache_fx.passes.real_pairs import RealPairs, as_pairs, has_complex
from torch import fx, nn

from diffcache_fx import Trunk
from diffcache_fx.errors import VerificationError
from diffcache_fx.measure import relative_error
from diffcache_fx.program import StepProgram

from .conftest import captured, run, sample, text

pytestmark = pytest.mark.usefixtures("one_thread")
X = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))


class Rotary(nn.Module):
    """Rotary embeddings as models write them: a table of complex numbers, indexed, repeated, conjugated."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.polar(torch.ones(10, 4), torch.arange(40.0).reshape(10, 4) / 9)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pairs = torch.view_as_complex(x.reshape(2, 6, 4, 2))
        turns = torch.cat((self.table[torch.arange(3)], self.table[4:7].conj()), dim=0).unsqueeze(0).expand(2, 6, -1)
        first, second = (pairs * turns).split(2, dim=-1)
        grown = torch.cat((first * 0.5, second + first, torch.complex(first.real, first.imag)), dim=-1)
        return torch.view_as_real(grown.permute(1, 0, 2)).flatten(2)


def test_before_and_after() -> None:
    program = Normalize()(captured(Rotary(), X))
    assert has_complex(program)
    before = text(program.graph)
    assert "view_as_complex" in before
    after = RealPairs()(program)
    shown = text(after.graph)
    assert not has_complex(after)
    assert "view_as_complex" not in shown
    assert "conj" not in shown
    assert text(program.graph) == before
    assert RealPairs()(after) is after
    assert all(not tensor.is_complex() for tensor in after.constants.values())
    assert relative_error(run(after, Rotary(), [X]).outputs[0], Rotary()(X)) < 1e-6


def test_inputs_results_and_branches_too() -> None:
    class Through(nn.Module):
        def forward(self, x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
            return torch.view_as_complex(x.reshape(2, 6, 4, 2)) * turn

    turn = torch.polar(torch.ones(4), torch.arange(4.0))
    after = RealPairs()(captured(Through(), X, turn))
    found = run(after, Through(), [X, as_pairs(turn)]).outputs[0]
    assert relative_error(found, torch.view_as_real(Through()(X, turn))) < 1e-6
    guarded = InsertGuards()(sample("QwenImageTransformer2DModel").with_regions(Trunk(), "value"))
    inner = [m for m in RealPairs()(guarded).module.modules() if isinstance(m, fx.GraphModule)]
    assert len(inner) > 2
    assert not any("complex" in text(module.graph) for module in inner)


@pytest.mark.parametrize(
    ("step", "words"),
    [
        (lambda x: torch.fft.fft(x).abs(), r"fft.* of complex tensors has no form in real ones"),
        (lambda x: torch.view_as_complex(x.reshape(2, 6, 4, 2)).sum().real, r"sum.* of complex tensors has no form"),
        (lambda x: (torch.view_as_complex(x.reshape(2, 6, 4, 2)) * 1j).real, "a product with a complex number"),
    ],
    ids=["transform", "sum", "number"],
)
def test_what_has_no_real_form_is_named(step: Any, words: str) -> None:
    class Odd(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return step(x)  # type: ignore[no-any-return]

    program: StepProgram = captured(Odd(), X)
    with pytest.raises(VerificationError, match=words):
        RealPairs()(program)
