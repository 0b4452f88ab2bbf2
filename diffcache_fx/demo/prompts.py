"""Prompts of two digits, "3 7", as the tokens that the second demo model attends to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

START, END = 10, 11  # after the ten digits
LENGTH = 4
WIDTH = 64


def tokens_of(prompts: Sequence[str]) -> Tensor:
    """[N, 4] int64: the start, the two digits, the end; an empty prompt is the start and three ends.

    Raises ValueError for what is neither empty nor two digits with a space between.
    """
    rows = []
    for prompt in prompts:
        words = prompt.split()
        if len(words) not in (0, 2) or not all(word in tuple("0123456789") for word in words):
            raise ValueError(f'a prompt is two digits, such as "3 7", or empty, not {prompt!r}')
        row = [START, *(int(word) for word in words)]
        rows.append(row + [END] * (LENGTH - len(row)))
    return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), LENGTH)


class PromptEncoder(nn.Module):
    """Tokens [N, 4] int64 as hidden states [N, 4, 64]: embeddings with their places, and two layers that read the
    row as a whole."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.words = nn.Embedding(END + 1, width)
        self.places = nn.Parameter(torch.zeros(LENGTH, width))
        nn.init.normal_(self.places, std=0.5)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0, activation="gelu", batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layers(self.words(tokens) + self.places)
