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
import json
from typing import Any

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor, nn

from bench.training import console, drawn_at, fit, halved, load_split, narrow, parser_of, score, strata
from diffcache_fx.demo.digits import load_digits

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
    size = args.batch_size
    index, source = drawn_at(iteration, len(images), size, args.seed)
    clean = images[index]
    noise = torch.randn(clean.shape, generator=source)
    timesteps = (strata(size, source) * len(alphas)).long().clamp_(max=len(alphas) - 1)
    dropped = torch.rand(size, generator=source) < args.label_dropout
    targets = torch.where(dropped, torch.full_like(labels[index], NULL_CLASS), labels[index])
    alpha = alphas[timesteps].sqrt()[:, None, None, None]
    sigma = (1 - alphas[timesteps]).sqrt()[:, None, None, None]
    return [alpha * clean + sigma * noise, timesteps, targets, alpha * noise - sigma * clean]


def train_denoiser(args: argparse.Namespace) -> None:
    """Until the budget is spent."""
    images, labels = load_split(args.data, "train")
    model = build_model(args.seed)
    alphas = DDIMScheduler(**SCHEDULER_CONFIG).alphas_cumprod
    forward = torch.compile(model) if args.compile else model

    def loss_at(iteration: int) -> Tensor:
        noisy, timesteps, targets, velocity = batch_at(iteration, images, labels, alphas, args)
        with narrow(args):
            output = forward(noisy, timestep=timesteps, class_labels=targets, return_dict=False)[0]
        return nn.functional.mse_loss(output.float(), velocity)

    fit(model, loss_at, args)


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
    parser = parser_of(__doc__, "digits", ("denoiser", "classifier", "export", "score"), guidance=2.0)
    parser.add_argument("--classifier-epochs", type=int, default=6)
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
        score(load_digits(), args)


if __name__ == "__main__":
    main()
