"""Train the second demo denoiser, of pairs of digits, and write the files that ``diffcache_fx.demo`` ships.

    python -m bench.train_pairs --data digits.npz

A U-Net with cross-attention over the tokens of a prompt ("3 7"), trained with flow matching (Lipman et al., 2023): of a
clean image x and noise e it sees (1 - s) x + s e and predicts e - x, for s from 0 to 1. The archive is that of
``bench.train_digits``, whose classifier reads the samples. Stages: ``denoiser``, ``export`` (write the shipped files
from the newest checkpoint), ``score``, or ``all``. Training continues from ``--runs`` as there.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, UNet2DConditionModel
from safetensors.torch import save_file
from torch import Tensor, nn

from bench.training import console, drawn_at, fit, halved, load_split, narrow, parser_of, score, strata
from diffcache_fx.demo.pairs import load_pairs
from diffcache_fx.demo.prompts import WIDTH, PromptEncoder, tokens_of

MODEL_CONFIG: dict[str, Any] = {
    "sample_size": [32, 64],
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [16, 48, 96],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "cross_attention_dim": WIDTH,
    "attention_head_dim": [1, 1, 2],  # diffusers means the number of heads
    "norm_num_groups": 8,
}
SCHEDULER_CONFIG: dict[str, Any] = {"num_train_timesteps": 1000, "shift": 1.0}


class Trained(nn.Module):
    """Both parts, which are trained together."""

    def __init__(self) -> None:
        super().__init__()
        self.denoiser = UNet2DConditionModel(**MODEL_CONFIG)
        self.prompts = PromptEncoder()

    def forward(self, images: Tensor, timesteps: Tensor, tokens: Tensor) -> Tensor:
        return self.denoiser(images, timesteps, self.prompts(tokens), return_dict=False)[0]


def build_model(seed: int) -> Trained:
    """The untrained parts; the output starts at zero."""
    torch.manual_seed(seed)
    model = Trained()
    nn.init.zeros_(model.denoiser.conv_out.weight)
    nn.init.zeros_(model.denoiser.conv_out.bias)
    return model.eval()  # nothing in it drops out


def batch_at(iteration: int, images: Tensor, tokens: Tensor, args: argparse.Namespace) -> list[Tensor]:
    """Noisy pairs [B, 1, 32, 64], timesteps [B] in [0, 1000), tokens [B, 4] with some empty, and what to predict.

    tokens: of each digit by itself, [N].
    """
    size = args.batch_size
    left, source = drawn_at(iteration, len(images), size, args.seed)
    right, _ = drawn_at(iteration, len(images), size, args.seed + 500)
    clean = torch.cat((images[left], images[right]), dim=3)
    noise = torch.randn(clean.shape, generator=source)
    level = strata(size, source)
    prompts = tokens_of(["0 0"]).repeat(size, 1)
    prompts[:, 1], prompts[:, 2] = tokens[left], tokens[right]
    prompts[torch.rand(size, generator=source) < args.label_dropout] = tokens_of([""])
    share = level[:, None, None, None]
    return [(1 - share) * clean + share * noise, 1000 * level, prompts, noise - clean]


def train_denoiser(args: argparse.Namespace) -> None:
    """Until the budget is spent."""
    images, labels = load_split(args.data, "train")
    model = build_model(args.seed)
    forward = torch.compile(model) if args.compile else model

    def loss_at(iteration: int) -> Tensor:
        noisy, timesteps, tokens, velocity = batch_at(iteration, images, labels, args)
        with narrow(args):
            output = forward(noisy, timesteps, tokens)
        return nn.functional.mse_loss(output.float(), velocity)

    fit(model, loss_at, args)


def export(args: argparse.Namespace) -> None:
    """Write the averaged weights in float16, and pairs.json."""
    state = torch.load(args.runs / "denoiser.pt", weights_only=True)
    args.out.mkdir(parents=True, exist_ok=True)
    model = Trained()
    model.load_state_dict(state["average"])
    save_file(halved(dict(model.state_dict())), args.out / "pairs.safetensors")
    description = {
        "model": {"_class_name": "UNet2DConditionModel", **MODEL_CONFIG},
        "scheduler": {"_class_name": FlowMatchEulerDiscreteScheduler.__name__, **SCHEDULER_CONFIG},
        "guidance_scale": args.guidance_scale,
        "image_shape": [1, *MODEL_CONFIG["sample_size"]],
        "training": {"data": "MNIST, pairs of its 60000 training digits, each padded to 32 x 32", **state["facts"]},
    }
    (args.out / "pairs.json").write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")
    console.print(f"wrote {args.out}/pairs.json and pairs.safetensors at iteration {state['iteration']}")


def main() -> None:
    args = parser_of(__doc__, "pairs", ("denoiser", "export", "score"), guidance=2.0).parse_args()
    torch.set_num_threads(args.threads)
    if args.stage in ("all", "denoiser"):
        train_denoiser(args)
    if args.stage in ("all", "export"):
        export(args)
    if args.stage in ("all", "score"):
        score(load_pairs(), args)


if __name__ == "__main__":
    main()
