"""Does a cache make refinement nearly free? `python -m bench.refinement`.

The demo model under `LagrangeScheduler` with three nodes: a round of refinement comes back to timesteps that the round
before has seen, with samples moved a little, where a first-block guard should reuse. Measured: what share of the calls
of each round is reused, the FLOPs executed in units of full model calls, and the error of the final images to a fine
solution of the same probability-flow ODE, beside rounds that are computed and beside plain DDIM. Writes
`bench/results/refinement.json` and `refinement.md`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from diffcache_fx import LagrangeScheduler, compile_with_cache, schedules
from diffcache_fx.demo.digits import load_digits
from diffcache_fx.measure import executed_flops, relative_error

RESULTS = Path(__file__).parent / "results" / "refinement.json"
FINE = 160  # steps of the solution that others are compared with
THRESHOLDS = (0.002, 0.005, 0.02)
Row = dict[str, Any]


class Bench:
    """One batch of digits from the same noise through every contender."""

    def __init__(self, images: int, backend: str) -> None:
        self.demo, self.backend = load_digits(), backend
        self.labels = torch.arange(images) % self.demo.num_classes
        self.exact = self._drawn(self.demo.model, self._lagrange(2), FINE)

    def _lagrange(self, rounds: int, nodes: int = 3) -> LagrangeScheduler:
        config = {**self.demo.scheduler().config, "timestep_spacing": "trailing"}
        return LagrangeScheduler.from_config(config, nodes=nodes, refinements=rounds)

    def _drawn(self, denoiser: Any, scheduler: Any, steps: int) -> torch.Tensor:
        count = len(self.labels)
        return self.demo.draw(denoiser, self.labels, scheduler=scheduler, num_steps=steps, batch_size=count)

    def plain(self, name: str, scheduler: Any, steps: int) -> Row:
        """The uncached model."""
        images = self._drawn(self.demo.model, scheduler, steps)
        calls = len(scheduler.timesteps)
        return {
            "name": name,
            "steps": steps,
            "calls": calls,
            "cost": calls,
            "error": relative_error(images, self.exact),
        }

    def cached(self, rounds: int, threshold: float, steps: int) -> Row:
        """With a first-block guard."""
        scheduler = self._lagrange(rounds)
        denoiser = compile_with_cache(
            self.demo.model, schedules.first_block_cache(threshold), backend=self.backend, refinement=True
        )
        images = self._drawn(denoiser, scheduler, steps)
        spent = executed_flops(denoiser)
        calls = len(scheduler.timesteps)
        by_round: dict[int, list[bool]] = {}
        for turn, decision in zip(scheduler.rounds, denoiser.stats().decisions, strict=True):
            by_round.setdefault(turn, []).append(bool(decision.reused))
        return {
            "name": f"{rounds} rounds, first block {threshold:g}",
            "steps": steps,
            "calls": calls,
            "cost": calls / spent.ideal_speedup,
            "error": relative_error(images, self.exact),
            "reused": {turn: sum(found) / len(found) for turn, found in sorted(by_round.items())},
        }

    def rows(self, steps: int) -> list[Row]:
        found = [
            self.plain(f"{rounds} round{'s'[: rounds - 1]}", self._lagrange(rounds), steps) for rounds in (1, 2, 3)
        ]
        found += [self.cached(rounds, threshold, steps) for rounds in (2, 3) for threshold in THRESHOLDS]
        for calls in (2 * steps, 4 * steps):
            found.append(self.plain("DDIM", self._lagrange(1, nodes=1), calls))
        return found


def table(rows: list[Row]) -> Table:
    """For a terminal."""
    made = Table(title="final images against a fine solution", title_justify="left")
    for title in ("steps", "contender", "model calls", "cost in full calls", "error", "reused by round"):
        made.add_column(title)
    for row in rows:
        made.add_row(*_cells(row))
    return made


def _cells(row: Row) -> list[str]:
    reused = ", ".join(f"{turn}: {100 * share:.0f} %" for turn, share in row.get("reused", {}).items())
    return [
        str(row["steps"]),
        row["name"],
        str(row["calls"]),
        f"{row['cost']:.1f}",
        f"{row['error']:.2e}",
        reused or "-",
    ]


def markdown(rows: list[Row]) -> str:
    """The same as a file."""
    head = ["steps", "contender", "model calls", "cost in full calls", "error", "reused by round"]
    lines = ["# Refinement under a cache", "", " ".join((__doc__ or "").split("\n\n")[1].split()), ""]
    lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20])
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--backend", default="eager")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    bench = Bench(options.images, options.backend)
    rows = [row for steps in options.steps for row in bench.rows(steps)]
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({"images": options.images, "fine": FINE, "rows": rows}, indent=1) + "\n")
    options.out.with_suffix(".md").write_text(markdown(rows))
    Console().print(table(rows))


if __name__ == "__main__":
    main()
