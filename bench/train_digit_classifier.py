"""The stages of ``bench.train_digits`` that use the classifier: training it, and scoring the denoiser's samples."""

from __future__ import annotations

import argparse

import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from safetensors.torch import save_file
from torch import Tensor, nn

from bench.train_digits import halved, load_split
from diffcache_fx.demo.classifier import DigitClassifier
from diffcache_fx.demo.digits import load_digits
from diffcache_fx.demo.sampling import generate, image_grid

console = Console(width=120)


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


def frechet_distance(first: Tensor, second: Tensor) -> float:
    """Squared Fréchet distance between the Gaussians that fit two sets of features [N, D] and [M, D]."""
    first, second = first.double(), second.double()
    product = torch.linalg.eigvals(first.T.cov() @ second.T.cov()).real.clamp(min=0).sqrt().sum()
    trace = first.T.cov().trace() + second.T.cov().trace() - 2 * product
    return float((first.mean(0) - second.mean(0)).square().sum() + trace)


def score(args: argparse.Namespace) -> float:
    """Draw samples of all classes with the files in ``--out``; the share read as the class asked for.

    Also prints the distance of the samples' features from those of the real test digits, and writes a picture of the
    first hundred samples next to the checkpoints.
    """
    demo = load_digits()
    labels = torch.arange(args.samples) % demo.num_classes
    with Progress(console=console) as bar:
        task = bar.add_task("samples")
        images = generate(
            demo.model,
            demo.scheduler(),
            labels,
            num_steps=args.steps,
            guidance_scale=args.guidance_scale,
            seed=args.seed,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    read, features = demo.classifier.predict(images)
    share = (read == labels).float().mean().item()
    distance = frechet_distance(features, demo.reference_features)
    missed = [f"{digit}: {int(((read != labels) & (labels == digit)).sum())}" for digit in range(demo.num_classes)]
    setting = f"{args.samples} samples, {args.steps} steps, guidance {args.guidance_scale}"
    console.print(f"{setting}: {100 * share:.1f} % read as asked, feature distance {distance:.2f}", highlight=False)
    console.print(f"misread by class: {', '.join(missed)}", highlight=False)
    args.runs.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image_grid(images[:100]).numpy()).save(args.runs / "samples.png")
    return share
