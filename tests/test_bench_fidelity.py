"""`bench.fidelity`: methods tuned to budgets, rows that survive an interruption, and what the report says of them; and
`bench.distances`, which goes on from there."""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import distances, fidelity, perceptual
from bench.fidelity import Seeded, Study, Table
from bench.fidelity_methods import FEW, OURS, Contender, Tuner, chosen, contenders, respaced, spaced
from bench.fidelity_report import markdown, pictures, verdict
from bench.method_runs import Record, read_json
from bench.method_settings import Setting
from bench.quality import Neighbourhoods
from diffcache_fx import Mask, RegionError, compile_with_cache, schedules
from diffcache_fx.measure import executed_flops

from .toy import MODEL, STEPS, sampler

pytestmark = pytest.mark.usefixtures("one_thread")


def toy_draw(denoiser: Any, labels: torch.Tensor, seed: int, **_: Any) -> torch.Tensor:
    with torch.no_grad():
        return sampler(denoiser, seed)


@pytest.fixture
def tuner(tmp_path: Path) -> Tuner:
    demo = SimpleNamespace(model=MODEL, num_classes=10, draw=toy_draw)
    runs = SimpleNamespace(
        demo=demo,
        model="digits",
        backend="eager",
        steps=STEPS,
        sampler_steps=STEPS,
        dtype=torch.float32,
        work=tmp_path,
        sampling=lambda: None,
        example=lambda images: ((torch.zeros(24, 16), torch.tensor(1.0)), {}),
    )
    return Tuner(runs)


def test_refreshes_are_spaced() -> None:
    assert [step for step, bit in enumerate(spaced(5, 12, 2)) if bit] == [0, 1, 4, 7, 9]
    for count in range(1, 13):
        assert sum(spaced(count, 12, 3)) == count
    made = respaced(schedules.taylor_seer(3, 2), 5, 12)
    assert made.warm_up == 1
    assert isinstance(made.rules[0].guard, Mask)
    assert made.rules[0].forecast == schedules.taylor_seer(3, 2).rules[0].forecast


def test_names() -> None:
    names = [contender.method for contender in contenders()]
    assert len(set(names)) == len(names)
    assert names[0] == OURS
    assert [contender.method for contender in chosen(["fora"])] == [OURS, "fora"]
    with pytest.raises(ValueError, match="no method is called 'forra'"):
        chosen(["forra"])


# They cache attention and feed-forward layers, or what lies below a skip connection: the toy has neither.
LAYERS = ("fora", "taylor_seer, order 1", "taylor_seer, order 2", "hi_cache", "foca", "ab_cache", "cheb_booster")
LAYERS += ("deep_cache", "pab", "t_gate", "smooth_cache")


@pytest.mark.parametrize("contender", contenders(), ids=lambda contender: contender.method)
def test_methods_come_as_near_to_a_budget_as_they_can(contender: Contender, tuner: Tuner) -> None:
    """What was tuned costs what it says, on a model and noise of its own."""
    if contender.method in LAYERS:
        with pytest.raises(RegionError):
            tuner.tuned(contender, 2.0)
        return
    found = tuner.tuned(contender, 2.0)
    cached = compile_with_cache(MODEL, found.schedule, backend="eager", num_steps=STEPS, max_programs=None)
    toy_draw(cached, torch.arange(FEW), 12)
    spent = executed_flops(cached)
    assert spent.full / spent.spent == pytest.approx(found.speedup, rel=0.02)
    if contender.kind == "refreshes" and contender.method not in ("lemica",):
        assert found.speedup == pytest.approx(2.0, rel=0.25)  # of twelve steps, one is eight hundredths
    assert tuner.tuned(contender, 2.0).schedule == found.schedule  # as kept
    assert f"{contender.method} at 2x" in read_json(tuner.runs.work / "tuned.json")
    tuner.forget([contender.method])
    assert set(read_json(tuner.runs.work / "tuned.json")) == {"made_for"}


def test_labels_go_on_from_seed_to_seed(tmp_path: Path) -> None:
    """Images of all seeds together are of all classes, however few there are of each seed."""
    runs = [Seeded(tmp_path / str(seed), 4, batch=2, seed=seed) for seed in range(3)]
    for each in runs:
        each.demo = SimpleNamespace(num_classes=7)  # type: ignore[assignment]
    labels = torch.cat([each.labels(first, 2) for each in runs for first in (0, 2)])
    assert labels.tolist() == [number % 7 for number in range(12)]
    settings = [each.config(Setting("uncached", "10 steps")) for each in runs]
    assert [entry.get("first_label", 0) for entry in settings] == [0, 4, 1]


def row(method: str, kind: str, psnr: float, frechet: float, budget: float = 2.0) -> Record:
    def estimate(value: float) -> Record:
        draws = [value + off + 0.001 * len(method) * off for off in (-0.1, 0.0, 0.1)]
        return {"value": value, "low": value - 0.1, "high": value + 0.1, "draws": draws}

    quality = {"psnr_db": estimate(psnr), "frechet": estimate(frechet), "accuracy": estimate(0.9)}
    seeds = [{"psnr_db": psnr + off, "frechet": frechet} for off in (-0.2, 0.2)]
    base = {"model": "digits", "sampler": "DDIM", "method": method, "label": f"{budget:g}x", "budget": budget}
    return base | {"kind": kind, "ideal_speedup": budget, "quality": quality, "seeds": seeds}


ROWS = [
    row("uncached", "reference", 96.0, 1.0, 1.0),
    row(OURS, "ours", 40.0, 1.35),
    row("fora", "published", 39.7, 1.5),
    row("foca", "published", 35.0, 1.3),
    row("l2p", "published", 36.0, 1.32),
    row("uncached, DDIM", "control", 39.9, 1.1),
    {"model": "digits", "sampler": "DDIM", "method": "pab", "budget": 2.0, "kind": "out of reach", "nearest": 1.2},
    {"model": "digits", "sampler": "DDIM", "method": "t_gate", "budget": 2.0, "kind": "not applicable", "why": "no."},
]
MADE_FOR = {"samples": 10, "seeds": 2, "steps": 50, "dtype": "float32"}
DATA = {"rows": [entry | {"made_for": MADE_FOR} for entry in ROWS]}


def test_the_verdict() -> None:
    found = verdict(ROWS, 2.0)
    assert found is not None
    assert (found["best"], found["met"], found["nearest"]) == ("fora", False, "foca")
    assert [round(far.value, 2) for far in found["farther"]] == [0.35, -0.15, 0.05]
    assert found["worse"] == ["uncached", "foca", "l2p"]  # paired: by less than the distances' own intervals
    assert found["surely_worse"] == ["uncached", "foca", "l2p"]
    assert found["gain_db"] == pytest.approx(0.3)
    assert found["gain_by_seed_db"] == pytest.approx([0.3, 0.3])
    assert verdict(ROWS, 3.0) is None
    better = [*ROWS[:1], row(OURS, "ours", 40.3, 0.9), *ROWS[2:]]
    found = verdict(better, 2.0)
    assert found is not None
    assert (found["met"], found["worse"], found["surely_worse"]) == (True, [], [])


def test_the_report(tmp_path: Path) -> None:
    text = markdown(DATA)
    assert "10 samples from 2 seeds, 50 steps, float32. Uncached: Fréchet distance 1.00." in text
    assert "| 2x | fora | +0.30 | +0.30, +0.30 | MISSED | 1.35 | +0.35 [+0.35, +0.35] |" in text
    assert "| +0.05 [+0.05, +0.05] (foca) | uncached, foca, l2p | uncached, foca, l2p |" in text
    assert text.index("**calibrated plan**") < text.index("uncached, DDIM") < text.index("| foca")
    assert "Out of reach: pab (nearest 1.20x)." in text
    assert "t_gate does not apply: no." in text
    assert "Not run here: taylor_seer, order 1," in text
    assert all(name not in text.partition("Not run here")[2] for name in ("fora", "pab,", "t_gate,"))
    (picture,) = pictures(DATA, tmp_path)
    assert picture.read_bytes().startswith(b"\x89PNG")


LAST_BLOCK = "taylor_seer, order 1, last block"


@pytest.fixture(scope="module")
def studied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[argparse.Namespace, Path]]:
    """A study of the demo in six steps: its options and its rows' file, which had a row of other options."""
    folder = tmp_path_factory.mktemp("study")
    options = argparse.Namespace(
        samples=4,
        seeds=2,
        steps=6,
        batch=2,
        dtype="float32",
        backend="eager",
        work=folder / "work",
        methods=[LAST_BLOCK],
        budgets=[2.0],
        measures={"clip": perceptual.clip(lambda image, prompt: image.float().mean())},
    )
    path = folder / "rows.json"
    path.write_text(
        json.dumps({"rows": [ROWS[1] | {"made_for": MADE_FOR, "model": "digits", "sampler": fidelity.OWN}]})
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bench.fidelity_methods.IMAGES", 2)
        patch.setattr(fidelity, "CONTROLS", ("UniPC",))
        # Of the real images a few: all distances between all of them take long.
        patch.setattr(fidelity, "Neighbourhoods", lambda features: Neighbourhoods(features[:500]))
        fidelity.study(Study("digits", fidelity.OWN, options), Table(path))
        yield options, path


def test_a_study_of_a_demo(studied: tuple[argparse.Namespace, Path]) -> None:
    rows = read_json(studied[1])["rows"]  # without that of other options
    assert [entry["kind"] for entry in rows] == ["reference", "ours", "published", "control", "control"]
    for entry in rows[1:]:
        assert ("psnr_db" in entry["quality"]) == ("UniPC" not in entry["method"])
        assert {"accuracy", "frechet", "precision", "recall", "clip"} <= set(entry["quality"])
        assert len(entry["seeds"]) == 2
        assert entry["ideal_speedup"] == pytest.approx(2.0, rel=0.3)  # of six steps


def test_it_goes_on_where_it_was_interrupted(
    studied: tuple[argparse.Namespace, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the file alone, or drawn before; scored again is what is to be done again."""
    options, path = argparse.Namespace(**vars(studied[0])), tmp_path / "rows.json"
    rows = read_json(studied[1])["rows"]
    path.write_text(studied[1].read_text())
    monkeypatch.setattr(fidelity.Seeded, "draw", lambda *_: pytest.fail("drawn again"))
    fidelity.study(Study("digits", fidelity.OWN, options), Table(path, redo=(LAST_BLOCK,)))
    assert sorted(map(repr, read_json(path)["rows"])) == sorted(map(repr, rows))
    options.work = tmp_path / "nowhere"
    fidelity.study(Study("digits", fidelity.OWN, options), Table(path))
    assert not list(options.work.rglob("*.safetensors"))


def test_what_of_an_error_is_weaker_guidance(studied: tuple[argparse.Namespace, Path]) -> None:
    study = Study("digits", fidelity.OWN, studied[0])
    errors = distances.Errors(study)
    percent = errors.direction.reshape(errors.uncached.shape)
    assert percent.abs().max() > 1e-4  # less guidance does change the images
    for share in (1.0, -2.0):
        assert errors.of(errors.uncached + share * percent) == pytest.approx((share, share / abs(share)), rel=1e-3)
    across = torch.randn(percent.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    across -= percent * (across * percent).sum() / percent.square().sum()
    assert errors.of(errors.uncached + percent + across)[0] == pytest.approx(1.0, rel=1e-2)


def test_why_distances_differ(
    studied: tuple[argparse.Namespace, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, path = studied
    out = tmp_path / "distances.json"
    given = {"--work": options.work, "--fidelity": path, "--out": out, "--batch": 2, "--backend": "eager"}
    command = ["bench.distances", *map(str, itertools.chain(*given.items())), "--shares", "0.5"]
    monkeypatch.setattr(sys, "argv", command)
    distances.main()
    (entry,) = read_json(out).values()
    assert {line["method"] for line in entry["guidance"]} == {OURS, LAST_BLOCK}
    assert [line["share"] for line in entry["weakened"]] == [1.0, 0.5]
    whole, half = entry["weakened"]
    assert half["psnr_db"] < whole["psnr_db"]
    text = out.with_suffix(".md").read_text()
    assert f"| {LAST_BLOCK} | 2x |" in text
    assert "| 2x | 50 % |" in text
    monkeypatch.setattr(sys, "argv", [*command, "--model", "digit-pairs"])
    with pytest.raises(SystemExit):
        distances.main()


def test_how_much_weaker_guidance_makes_up_for_a_distance() -> None:
    weakened = [
        {"budget": 2.0, "share": share, "psnr_db": psnr, "frechet": frechet}
        for share, psnr, frechet in ((1.0, 40.0, 1.35), (0.9, 38.0, 1.31), (0.95, 39.0, 1.32))
    ]
    rows = [*ROWS, row("pab", "published", 30.0, 1.0), row("tea_cache", "published", 30.0, 1.3, budget=3.0)]
    found = distances.as_near(weakened, rows)  # fora is farther than ours, and nothing of ours is at 3x
    assert [(line["method"], line.get("share"), line.get("gain_db")) for line in found] == [
        ("foca", None, None),
        ("l2p", 0.95, 3.0),
        ("pab", None, None),
    ]
