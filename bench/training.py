"""What training the demo models shares: the data, the loop with its budget and checkpoints, the averaged weights."""

from __future__ import annotations

import argparse
import contextlib
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn

from bench.quality import FrechetDistance
from diffcache_fx.demo.demo import Demo
from diffcache_fx.demo.sampling import image_grid

console = Console(width=120)
DEMO = Path(__file__).parents[1] / "diffcache_fx" / "demo"


def parser_of(description: str | None, runs: str, stages: tuple[str, ...], guidance: float) -> argparse.ArgumentParser:
    """The options that every training script has; runs: the folder of its checkpoints."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the .npz archive of the digits")
    parser.add_argument("--out", type=Path, default=DEMO)
    parser.add_argument("--runs", type=Path, default=Path("runs") / runs, help="where checkpoints are kept")
    parser.add_argument("--stage", choices=("all", *stages), default="all")
    parser.add_argument("--minutes", type=float, default=60.0, help="wall-clock budget of the denoiser")
    parser.add_argument("--iterations", type=int, default=1_000_000, help="iteration budget, if it ends first")
    parser.add_argument("--save-minutes", type=float, default=2.5)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--label-dropout", type=float, default=0.1)
    parser.add_argument("--guidance-scale", type=float, default=guidance)
    parser.add_argument("--samples", type=int, default=1000, help="how many samples to score")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps of each scored sample")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    return parser


def load_split(path: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images [N, 1, 32, 32] float32 in [-1, 1] (zero-padded from 28 to 32) and labels [N] int64."""
    with np.load(path) as archive:
        images = torch.from_numpy(archive[f"{split}_images"]).float()
        labels = torch.from_numpy(archive[f"{split}_labels"]).long()
    images = nn.functional.pad(images[:, None], (2, 2, 2, 2))
    return images / 127.5 - 1.0, labels


def drawn_at(iteration: int, total: int, size: int, seed: int) -> tuple[Tensor, torch.Generator]:
    """The indices of an iteration's batch, each epoch in an order of its own, and a generator for its noise."""
    epoch, position = divmod(iteration, total // size)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed * 1009 + epoch))
    source = torch.Generator().manual_seed(seed * 1_000_003 + iteration)
    return order[position * size : (position + 1) * size], source


def strata(size: int, source: torch.Generator) -> Tensor:
    """Numbers in [0, 1), one in each of `size` equal parts, so that a batch covers all noise levels."""
    return (torch.arange(size) + torch.rand(size, generator=source)) / size


def learning_rate(iteration: int, progress: float, peak: float, warmup: int) -> float:
    """Linear warm-up in iterations, then a cosine to 1 % of the peak over the fraction ``progress`` of the budget."""
    warm = min(1.0, (iteration + 1) / warmup)
    return peak * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write next to the target, then rename, so that a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def narrow(args: argparse.Namespace) -> Any:
    """The context in which a forward pass is computed."""
    return torch.autocast("cpu", torch.bfloat16) if args.bf16 else contextlib.nullcontext()


def fit(model: nn.Module, loss_at: Callable[[int], Tensor], args: argparse.Namespace) -> None:
    """Train until the wall-clock or the iteration budget is spent, whichever comes first; goes on from a checkpoint.

    loss_at: the loss of an iteration, by its number, computed with the model's present weights.
    """
    params: list[Tensor] = list(model.parameters())
    average = [p.detach().clone() for p in params]
    optimizer = torch.optim.AdamW(params, lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    start, spent, smooth = 0, 0.0, 1.0
    checkpoint = args.runs / "denoiser.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average = [state["average"][name] for name, _ in model.named_parameters()]
        start, spent, smooth = state["iteration"], state["seconds"], state["facts"]["loss"]
        console.print(f"continuing at iteration {start}, {spent / 60:.1f} minutes spent")
    console.print(f"{sum(p.numel() for p in params) / 1e6:.2f} M parameters")

    def snapshot(iteration: int, seconds: float, loss: float) -> None:
        names = [name for name, _ in model.named_parameters()]
        ema = {**model.state_dict(), **dict(zip(names, average, strict=True))}
        facts = {"iterations": iteration, "batch_size": args.batch_size, "minutes": round(seconds / 60, 1)}
        facts |= {"peak_learning_rate": args.lr, "label_dropout": args.label_dropout, "ema": args.ema}
        facts |= {"seed": args.seed, "bfloat16_autocast": args.bf16, "loss": round(loss, 5)}
        state = {"model": model.state_dict(), "average": ema, "optimizer": optimizer.state_dict(), "facts": facts}
        save_checkpoint(checkpoint, {**state, "iteration": iteration, "seconds": seconds})

    began, saved, iteration, seconds = time.monotonic(), time.monotonic(), start, spent
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("denoiser", total=1.0)
        while True:
            seconds = spent + time.monotonic() - began
            progress = max(iteration / args.iterations, seconds / (60 * args.minutes))
            if progress >= 1:
                break
            rate = learning_rate(iteration, progress, args.lr, args.warmup)
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss = loss_at(iteration)
            loss.backward()
            nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():  # the average forgets the first, random weights quickly
                torch._foreach_lerp_(average, params, 1 - min(args.ema, (1 + iteration) / (10 + iteration)))
            iteration += 1
            smooth += (loss.item() - smooth) * max(0.01, 1 / iteration)
            bar.update(task, completed=progress, description=f"denoiser  it {iteration}  loss {smooth:.4f}")
            if iteration % 100 == 0:
                line = f"it {iteration:6d}  loss {smooth:.4f}  lr {rate:.2e}  {seconds / 60:.1f} min"
                console.print(line, highlight=False)
            if time.monotonic() - saved > 60 * args.save_minutes:
                snapshot(iteration, seconds, smooth)
                saved = time.monotonic()
    snapshot(iteration, seconds, smooth)


def halved(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies, floating point as float16."""
    return {key: (v.half() if v.is_floating_point() else v).contiguous().clone() for key, v in state.items()}


def score(demo: Demo, args: argparse.Namespace) -> float:
    """Draw samples of all labels with the files that are shipped; the share read as asked for.

    Also prints the distance of the samples' features from real ones, and writes a picture of the first hundred samples
    next to the checkpoints.
    """
    labels = torch.arange(args.samples) * 37 % demo.num_classes
    with Progress(console=console) as bar:
        task = bar.add_task("samples")
        images = demo.draw(
            demo.model,
            labels,
            num_steps=args.steps,
            guidance_scale=args.guidance_scale,
            seed=args.seed,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    read, features = demo.read(images)
    share = (read == labels).float().mean().item()
    distance = FrechetDistance(demo.reference_features)(features)
    wrong = labels[read != labels].bincount(minlength=demo.num_classes)
    missed = [f"{label}: {count}" for label, count in enumerate(wrong.tolist()) if count]
    setting = f"{args.samples} samples, {args.steps} steps, guidance {args.guidance_scale}"
    console.print(f"{setting}: {100 * share:.1f} % read as asked, feature distance {distance:.2f}", highlight=False)
    console.print(f"misread: {', '.join(missed) or 'none'}", highlight=False)
    args.runs.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image_grid(images[:100]).numpy()).save(args.runs / "samples.png")
    return share
