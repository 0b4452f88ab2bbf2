"""Train the demo denoiser and write the files that ``diffcache_fx.demo`` ships.

    python -m bench.train_digits --data digits.npz

The archive holds ``train_images`` and ``test_images`` [N, 28, 28] uint8 with ``train_labels`` and ``test_labels`` [N].
Stages: ``denoiser`` (a class-conditional diffusion transformer), ``classifier`` (a small CNN), ``export`` (write the
shipped files from the newest checkpoint, possible while the denoiser still trains), ``score`` (draw samples and have
the classifier read them), or ``all`` of them in that order.

Training continues from ``--runs`` where it holds a checkpoint. Batches, noise and timesteps are functions of the seed
and the iteration number, so a continued run sees the data an uninterrupted one would have seen.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors.torch import save_file
from torch import Tensor, nn

console = Console(width=120)

NUM_CLASSES = 10
NULL_CLASS = 10  # the last row of the label embedding: "no class", for classifier-free guidance
MODEL_CONFIG: dict[str, Any] = {
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "in_channels": 1,
    "out_channels": 1,
    "num_layers": 12,
    "sample_size": 32,
    "patch_size": 4,
    "num_embeds_ada_norm": NUM_CLASSES,
    "attention_bias": True,
    "activation_fn": "gelu-approximate",
}
SCHEDULER_CONFIG: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "clip_sample": False,  # with guidance, clipping x0 but not the noise it implies drifts: thin strokes grow fat
    "set_alpha_to_one": True,
}


def load_split(path: Path, split: str) -> tuple[Tensor, Tensor]:
    """Images [N, 1, 32, 32] float32 in [-1, 1] (zero-padded from 28 to 32) and labels [N] int64."""
    with np.load(path) as archive:
        images = torch.from_numpy(archive[f"{split}_images"]).float()
        labels = torch.from_numpy(archive[f"{split}_labels"]).long()
    images = nn.functional.pad(images[:, None], (2, 2, 2, 2))
    return images / 127.5 - 1.0, labels


def build_model(seed: int) -> nn.Module:
    """The untrained denoiser; modulations and output start at zero, so each block starts as the identity."""
    torch.manual_seed(seed)
    model = DiTTransformer2DModel(**MODEL_CONFIG)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for block in model.transformer_blocks:
        nn.init.normal_(block.norm1.emb.class_embedder.embedding_table.weight, std=0.02)
        nn.init.zeros_(block.norm1.linear.weight)
    for layer in (model.proj_out_1, model.proj_out_2):
        nn.init.zeros_(layer.weight)
    # Training mode would drop labels in every block on its own; the loop drops them once for the whole model instead.
    return model.eval()


def batch_at(iteration: int, images: Tensor, labels: Tensor, alphas: Tensor, args: argparse.Namespace) -> list[Tensor]:
    """Noisy images, timesteps [B] int64, labels [B] int64 with some dropped, and the velocity to predict."""
    size, total = args.batch_size, len(images)
    per_epoch = total // size
    epoch, position = divmod(iteration, per_epoch)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(args.seed * 1009 + epoch))
    index = order[position * size : (position + 1) * size]
    source = torch.Generator().manual_seed(args.seed * 1_000_003 + iteration)
    clean = images[index]
    noise = torch.randn(clean.shape, generator=source)
    strata = (torch.arange(size) + torch.rand(size, generator=source)) / size  # timesteps spread evenly over the batch
    timesteps = (strata * len(alphas)).long().clamp_(max=len(alphas) - 1)
    dropped = torch.rand(size, generator=source) < args.label_dropout
    targets = torch.where(dropped, torch.full_like(labels[index], NULL_CLASS), labels[index])
    alpha = alphas[timesteps].sqrt()[:, None, None, None]
    sigma = (1 - alphas[timesteps]).sqrt()[:, None, None, None]
    return [alpha * clean + sigma * noise, timesteps, targets, alpha * noise - sigma * clean]


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


def train_denoiser(args: argparse.Namespace) -> None:
    """Train until the wall-clock or the iteration budget is spent, whichever comes first."""
    images, labels = load_split(args.data, "train")
    model = build_model(args.seed)
    params: list[Tensor] = list(model.parameters())
    average = [p.detach().clone() for p in params]
    optimizer = torch.optim.AdamW(params, lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    alphas = DDIMScheduler(**SCHEDULER_CONFIG).alphas_cumprod
    start, spent, smooth = 0, 0.0, 1.0
    checkpoint = args.runs / "denoiser.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average = [state["average"][name] for name, _ in model.named_parameters()]
        start, spent, smooth = state["iteration"], state["seconds"], state["facts"]["loss"]
        console.print(f"continuing at iteration {start}, {spent / 60:.1f} minutes spent")
    forward = torch.compile(model) if args.compile else model
    autocast = torch.autocast("cpu", torch.bfloat16) if args.bf16 else contextlib.nullcontext()
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
            noisy, timesteps, targets, velocity = batch_at(iteration, images, labels, alphas, args)
            rate = learning_rate(iteration, progress, args.lr, args.warmup)
            for group in optimizer.param_groups:
                group["lr"] = rate
            with autocast:
                output = forward(noisy, timestep=timesteps, class_labels=targets, return_dict=False)[0]
            loss = nn.functional.mse_loss(output.float(), velocity)
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


def export(args: argparse.Namespace) -> None:
    """Write the denoiser's averaged weights in float16, and digits.json."""
    state = torch.load(args.runs / "denoiser.pt", weights_only=True)
    args.out.mkdir(parents=True, exist_ok=True)
    model, scheduler = DiTTransformer2DModel(**MODEL_CONFIG), DDIMScheduler(**SCHEDULER_CONFIG)
    model.load_state_dict(state["average"])
    save_file(halved(dict(model.state_dict())), args.out / "digits.safetensors")
    description = {
        "model": {"_class_name": type(model).__name__, **MODEL_CONFIG},
        "scheduler": {"_class_name": type(scheduler).__name__, **SCHEDULER_CONFIG},
        "guidance_scale": args.guidance_scale,
        "num_classes": NUM_CLASSES,
        "null_class": NULL_CLASS,
        "image_shape": [1, MODEL_CONFIG["sample_size"], MODEL_CONFIG["sample_size"]],
        "training": {"data": "MNIST, 60000 training digits padded to 32 x 32", **state["facts"]},
    }
    (args.out / "digits.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    console.print(f"wrote {args.out}/digits.json and digits.safetensors at iteration {state['iteration']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="the .npz archive of the digits")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "diffcache_fx" / "demo")
    parser.add_argument("--runs", type=Path, default=Path("runs") / "digits", help="where checkpoints are kept")
    parser.add_argument("--stage", choices=("all", "denoiser", "classifier", "export", "score"), default="all")
    parser.add_argument("--minutes", type=float, default=60.0, help="wall-clock budget of the denoiser")
    parser.add_argument("--iterations", type=int, default=1_000_000, help="iteration budget, if it ends first")
    parser.add_argument("--save-minutes", type=float, default=2.5)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=200)
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--label-dropout", type=float, default=0.1)
    parser.add_argument("--guidance-scale", type=float, default=2.0)
    parser.add_argument("--classifier-epochs", type=int, default=6)
    parser.add_argument("--samples", type=int, default=1000, help="how many samples to score")
    parser.add_argument("--steps", type=int, default=50, help="denoising steps of each scored sample")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.stage in ("all", "denoiser"):
        train_denoiser(args)
    if args.stage in ("all", "classifier"):
        from bench.train_digit_classifier import train_classifier

        train_classifier(args)
    if args.stage in ("all", "export"):
        export(args)
    if args.stage in ("all", "score"):
        from bench.train_digit_classifier import score

        score(args)


if __name__ == "__main__":
    main()
