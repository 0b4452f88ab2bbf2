"""FoldEmpty: what is empty is not computed."""

from __future__ import annotations

import pytest
import torch
from diffcache_fx.passes.fold_empty import FoldEmpty
from diffcache_fx.passes.normalize import Normalize
from torch import nn

from .conftest import captured, equal, run, text

pytestmark = pytest.mark.usefixtures("one_thread")
X = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))


class AbsentImage(nn.Module):
    """Attends to the first tokens of its context, of which there are none."""

    def __init__(self, absent: int) -> None:
        super().__init__()
        self.absent = absent
        self.keys = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        context = self.keys(x[:, : -self.absent]).view(2, 6 - self.absent, 2, 4).transpose(1, 2)
        query = x.view(2, 6, 2, 4).transpose(1, 2)
        found = nn.functional.scaled_dot_product_attention(query, context, context)
        return x + found.transpose(1, 2).flatten(2)


def test_before_and_after() -> None:
    model = AbsentImage(6)
    program = Normalize()(captured(model, X))
    before = text(program.graph)
    after = FoldEmpty()(program)
    shown = text(after.graph)
    assert "linear(" in before
    assert "linear(" not in shown
    assert "scaled_dot_product_attention" not in shown
    assert "zeros(" in shown
    assert text(program.graph) == before
    assert text(FoldEmpty()(after).graph) == shown
    assert equal(run(after, model, [X]).outputs, [model(X)])


def test_what_has_elements_stays() -> None:
    program = Normalize()(captured(AbsentImage(5), X))
    assert FoldEmpty()(program) is program
