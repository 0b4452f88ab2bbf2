"""Drawing the images of one setting, kept on disk batch by batch, so that an interrupted run goes on where it
stopped."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from bench.method_calibration import Calibration, calibrate
from bench.method_settings import NOT_APPLICABLE, Setting, even_hold, same_cost, uncached
from bench.quality import FrechetDistance, score
from bench.samplers import SAMPLERS
from diffcache_fx import CachedDenoiser, compile_with_cache
from diffcache_fx.demo.demo import Demo
from diffcache_fx.measure import compiled_baseline, executed_flops
from diffcache_fx.models import load_demo

SEED = 0
Record = dict[str, Any]
Told = Callable[[int, int], None]  # steps done, steps there are


def write_json(path: Path, data: Any) -> None:
    """Whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(data, indent=1) + "\n")
    part.replace(path)


def read_json(path: Path) -> Record:
    """Nothing where there is no file."""
    return json.loads(path.read_text()) if path.exists() else {}


def plain(data: Any) -> Any:
    """As it comes back from a JSON file."""
    return json.loads(json.dumps(data))


@dataclass
class Drawn:
    """Images [N, 1, H, W] so far, and of each batch: FLOPs spent, FLOPs of the uncached model in all steps, seconds."""

    images: Tensor
    batches: list[tuple[int, int, float]]

    @classmethod
    def load(cls, path: Path, config: Record) -> Drawn | None:
        """What was drawn before, if with the same configuration."""
        if not path.exists():
            return None
        with safe_open(path, "pt") as file:
            known = json.loads(file.metadata()["run"])
            if known["config"] != plain(config):
                return None
            return cls(file.get_tensor("images"), [tuple(batch) for batch in known["batches"]])

    def save(self, path: Path, config: Record) -> None:
        """Write next to the target, then rename."""
        part = path.with_suffix(".part")
        save_file({"images": self.images}, part, {"run": json.dumps({"config": config, "batches": self.batches})})
        part.replace(path)


@dataclass
class Runs:
    """A demo and how it is sampled: `samples` images in batches of `batch`, `steps` steps.

    The folder `work` gets of each setting KEY.safetensors, its images so far, and once they are all there KEY.json.
    """

    work: Path
    samples: int = 1000
    steps: int = 50
    batch: int = 100
    dtype: torch.dtype = torch.float32
    backend: str = "inductor"
    model: str = "digits"
    compared: Setting | None = None
    seed: int = SEED

    def __post_init__(self) -> None:
        self.batch = min(self.batch, self.samples)
        self.work.mkdir(parents=True, exist_ok=True)

    @cached_property
    def demo(self) -> Demo:
        return load_demo(self.model, self.dtype)

    @cached_property
    def calibration(self) -> Calibration:
        """Measured once and kept: a repeated measurement may differ in the last bit, and would be another schedule."""
        path, made_for = self.work / "calibration.json", {"steps": self.steps, "dtype": str(self.dtype)}
        known = read_json(path)
        if any(known.get(name) != value for name, value in made_for.items()):
            known = plain(made_for | asdict(calibrate(self.demo, self.steps)))
            write_json(path, known)
        return Calibration(*(known[entry.name] for entry in fields(Calibration)))

    @cached_property
    def reference(self) -> Tensor:
        """The uncached images in all steps, or of what else is the reference."""
        return self.images(self.compared or uncached(self.steps, self.steps)).images[: self.samples]

    @cached_property
    def distance(self) -> FrechetDistance:
        return FrechetDistance(self.demo.reference_features)

    @cached_property
    def step_flops(self) -> tuple[int, int]:
        """FLOPs of a full step of a batch, and of one that holds the whole trunk."""
        schedule = even_hold(1, self.steps).schedule(lambda: self.calibration)
        example = self.example(self.batch)
        found = compile_with_cache(self.demo.model, schedule, backend="eager", example_inputs=example).explain()
        return found.full_flops, min(flops for _, flops in found.programs)

    def example(self, images: int, apart: bool = False) -> tuple[tuple[Tensor], dict[str, Tensor]]:
        """One call of the denoiser; both sides of the guidance are in one batch unless apart."""
        rows = images * (1 if apart or self.demo.guidance_scale == 1.0 else 2)
        latents = torch.zeros(rows, *self.demo.image_shape, dtype=self.dtype)
        given = self.demo.condition(torch.zeros(rows, dtype=torch.int64))
        narrow = {name: value.to(self.dtype) if value.is_floating_point() else value for name, value in given.items()}
        return (latents,), {"timestep": torch.zeros(rows, dtype=self.demo.scheduler().timesteps.dtype), **narrow}

    def denoiser(self, setting: Setting, images: int) -> Any:
        """The compiled denoiser for batches of so many images. Raises ScheduleError or RegionError where the method
        does not apply to the model."""
        schedule = setting.schedule(lambda: self.calibration)
        if schedule is None:
            return compiled_baseline(self.demo.model, self.backend)
        cached = compile_with_cache(
            self.demo.model,
            schedule,
            backend=self.backend,
            example_inputs=self.example(images, setting.apart),
            num_steps=self.steps,
            decide=setting.decide,
        )
        cached.prepare()
        return cached

    def draw(self, denoiser: Any, setting: Setting, first: int, count: int, told: Told | None = None) -> Tensor:
        """Images `first` to `first + count - 1`; image i has the same noise and class whatever the setting."""
        return self.demo.draw(
            denoiser,
            self.labels(first, count),
            scheduler=self.scheduler(setting),
            num_steps=setting.steps or self.steps,
            guidance_scale=1 + (self.demo.guidance_scale - 1) * setting.guidance,
            seed=self.seed,
            batch_size=count,
            progress=told,
            batched_guidance=not setting.apart,
            first_index=first,
            dtype=self.dtype,
        )

    def scheduler(self, setting: Setting) -> Any:
        """A fresh one, with its timesteps set."""
        made = SAMPLERS[setting.sampler](self.demo.scheduler()) if setting.sampler else self.demo.scheduler()
        made.set_timesteps(setting.steps or self.steps)
        return made

    def calls(self, setting: Setting) -> int:
        """Of the model, in a generation."""
        return len(self.scheduler(setting).timesteps)

    def labels(self, first: int, count: int) -> Tensor:
        return torch.arange(first, first + count) % self.demo.num_classes

    def flops(self, denoiser: Any, setting: Setting) -> tuple[int, int]:
        """FLOPs of the generation that just ended, and of the uncached model in all steps."""
        if isinstance(denoiser, CachedDenoiser):
            found = executed_flops(denoiser)
            return found.spent, found.full
        return self.step_flops[0] * self.calls(setting), self.step_flops[0] * self.steps

    def config(self, setting: Setting) -> Record:
        """What the images depend on. Raises ScheduleError if the method cannot be had with these options."""
        schedule = setting.schedule(lambda: self.calibration)
        return {
            "schedule": schedule.to_dict() if schedule is not None else None,
            "steps": setting.steps or self.steps,
            "apart": setting.apart,
            "batch": self.batch,
            "dtype": str(self.dtype),
            "seed": self.seed,
            "backend": self.backend,
            **({"sampler": setting.sampler} if setting.sampler else {}),
            **({"decide": setting.decide} if setting.decide != "host" else {}),
            **({"guidance": setting.guidance} if setting.guidance != 1 else {}),
            **({"model": self.model} if self.model != "digits" else {}),
        }

    def images(self, setting: Setting, told: Told | None = None) -> Drawn:
        """At least `samples` images, in whole batches; those drawn before come from the work folder."""
        path, config, steps = (
            self.work / f"{setting.key}.safetensors",
            self.config(setting),
            self.calls(setting),
        )
        drawn = Drawn.load(path, config) or Drawn(torch.empty(0, *self.demo.image_shape), [])
        total = -(-self.samples // self.batch) * steps
        denoiser: Any = None
        while len(drawn.images) < self.samples:
            behind = len(drawn.batches) * steps
            tick = None if told is None else (lambda done, _, behind=behind: told(behind + done, total))
            if tick is not None:
                tick(0, total)
            denoiser = self.denoiser(setting, self.batch) if denoiser is None else denoiser
            start = time.perf_counter()
            images = self.draw(denoiser, setting, len(drawn.images), self.batch, tick)
            seconds = round(time.perf_counter() - start, 2)
            drawn.images = torch.cat((drawn.images, images))
            drawn.batches.append((*self.flops(denoiser, setting), seconds))
            drawn.save(path, config)
        return drawn

    def finished(self, setting: Setting) -> Record | None:
        """The record of a setting if it was made with the same configuration and as many samples."""
        known = read_json(self.work / f"{setting.key}.json")
        try:
            same = known.get("config") == plain(self.config(setting)) and known.get("samples") == self.samples
        except NOT_APPLICABLE:
            return known if "not_applicable" in known else None
        return known if same else None

    def quality(self, setting: Setting, told: Told | None = None) -> Record:
        """The record of a setting: as it was written if that is finished, else drawn, scored and written."""
        known = self.finished(setting)
        if known is not None and "quality" in known:  # what did not apply may apply by now
            return known
        record: Record = {"key": setting.key, "method": setting.method, "label": setting.label, "samples": self.samples}
        try:
            record["config"] = self.config(setting)
            drawn = self.images(setting, told)
            batches = drawn.batches[: -(-self.samples // self.batch)]
            images, reference = drawn.images[: self.samples], None if setting.reference else self.reference
            found = score(images, self.labels(0, self.samples), self.demo.read, self.distance, reference)
            spent, full = (sum(batch[index] for batch in batches) for index in (0, 1))
            record |= {"flops": {"spent": spent, "full": full}, "ideal_speedup": full / spent}
            record |= {"quality": {name: estimate.to_dict() for name, estimate in found.items()}}
            record["seconds"] = round(sum(batch[2] for batch in batches), 1)
        except NOT_APPLICABLE as error:
            record["not_applicable"] = " ".join(str(error).split())
        write_json(self.work / f"{setting.key}.json", record)
        return record

    def controls(self, record: Record) -> list[Setting]:
        """What a finished setting is shown beside: fewer steps and even holds at the same cost."""
        if "quality" not in record:
            return []
        full, reuse = self.step_flops
        return same_cost(record["ideal_speedup"], reuse / full, self.steps)
