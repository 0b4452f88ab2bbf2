"""A small convolutional classifier of the demo's digits: it scores samples, and its features give distances."""

from __future__ import annotations

import torch
from torch import Tensor, nn

FEATURES = 64


class DigitClassifier(nn.Module):
    """Reads images [N, 1, 32, 32], floating point in [-1, 1], as one of ``num_classes`` digits."""

    def __init__(self, num_classes: int = 10, features: int = FEATURES) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 5, stride=2, padding=2, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1, bias=False),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(64 * 4 * 4, features, bias=False),
            nn.BatchNorm1d(features),
            nn.ReLU(),
        )
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(features, num_classes)

    def features(self, images: Tensor) -> Tensor:
        """Features [N, 64] before the last layer, none of them negative, without unit."""
        return self.body(images)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, num_classes]."""
        return self.head(self.dropout(self.features(images)))

    @torch.no_grad()
    def predict(self, images: Tensor, batch_size: int = 500) -> tuple[Tensor, Tensor]:
        """The class read in each image [N] int64 and the images' features [N, 64], computed in batches."""
        features = torch.cat([self.features(part) for part in images.split(batch_size)])
        return self.head(features).argmax(1), features
