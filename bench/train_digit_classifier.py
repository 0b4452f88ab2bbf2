"""The stage of ``bench.train_digits`` that trains the classifier."""

from __future__ import annotations

import argparse

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from bench.training import console, halved, load_split
from diffcache_fx.demo.classifier import DigitClassifier


def jitter(images: Tensor, source: torch.Generator) -> Tensor:
    """Turn by up to 12 degrees, scale by up to 10 % and move by up to 2.5 pixels, each image on its own."""
    count, edge = len(images), images.shape[-1]

    def spread(limit: float) -> Tensor:
        return (torch.rand(count, generator=source) * 2 - 1) * limit

    angle, scale, shear = spread(0.21), 1 + spread(0.1), spread(0.15)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    move = 2 / edge * 2.5
    rows = [torch.stack((cos, -sin + shear, spread(move)), 1), torch.stack((sin, cos, spread(move)), 1)]
    grid = nn.functional.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return nn.functional.grid_sample(images + 1, grid, align_corners=False) - 1  # zero padding is the background


def train_classifier(args: argparse.Namespace) -> float:
    """Train, write ``digit_classifier.safetensors`` and ``digit_reference.safetensors``; the accuracy on the test set.

    The accuracy is that of the float16 weights which are shipped, run in float32.
    """
    images, labels = load_split(args.data, "train")
    torch.manual_seed(args.seed + 1)
    source = torch.Generator().manual_seed(args.seed + 2)
    model = DigitClassifier()
    size = 128
    total = args.classifier_epochs * (len(images) // size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=total, pct_start=0.2)
    for epoch in range(args.classifier_epochs):
        model.train()
        order = torch.randperm(len(images), generator=source)
        running = 0.0
        for index in order.split(size)[: len(images) // size]:
            loss = nn.functional.cross_entropy(model(jitter(images[index], source)), labels[index])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            running += (loss.item() - running) * 0.02
        console.print(f"classifier  epoch {epoch + 1}  loss {running:.4f}", highlight=False)
    shipped = halved(model.state_dict())
    model.load_state_dict(shipped)
    model.eval()
    images, labels = load_split(args.data, "test")
    read, features = model.predict(images)
    accuracy = (read == labels).float().mean().item()
    args.out.mkdir(parents=True, exist_ok=True)
    facts = {"test_accuracy": f"{accuracy:.4f}"}
    save_file(shipped, args.out / "digit_classifier.safetensors", metadata=facts)
    reference = {"features": features.half(), "labels": labels.to(torch.uint8)}
    save_file(reference, args.out / "digit_reference.safetensors", metadata=facts)
    console.print(f"classifier  {100 * accuracy:.2f} % of the test digits", highlight=False)
    return accuracy
