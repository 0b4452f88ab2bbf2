"""RecordingDenoiser: what it tells of a run, against the plain model with hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diffcache_fx.demo.demo import Demo
from diffcache_fx.demo.digits import load_digits
from diffcache_fx.errors import CalibrationError
from diffcache_fx.recording import Recording, RecordingDenoiser
from diffcache_fx.selection import Blocks, Trunk

STEPS, LABELS = 8, [1, 5]


@pytest.fixture(scope="module")
def demo() -> Demo:
    return load_digits()


class Seen:
    """Inputs and outputs of the blocks, and the outputs of the model, step by step."""

    def __init__(self, demo: Demo) -> None:
        self.residuals: list[list[torch.Tensor]] = []
        self.outputs: list[torch.Tensor] = []
        blocks: Any = demo.model.get_submodule("transformer_blocks")
        handles = [block.register_forward_hook(self._block, with_kwargs=True) for block in blocks]
        handles.append(demo.model.register_forward_hook(lambda m, a, out: self.outputs.append(out[0])))
        self.residuals.append([])
        self.images = demo.draw(demo.model, LABELS, num_steps=STEPS, seed=5)
        for handle in handles:
            handle.remove()
        flat = [entry for step in self.residuals for entry in step]
        count = len(flat) // STEPS
        self.residuals = [flat[i * count : (i + 1) * count] for i in range(STEPS)]

    def _block(self, module: Any, args: Any, kwargs: Any, output: torch.Tensor) -> None:
        self.residuals[-1].append(output - args[0])


@pytest.fixture(scope="module")
def seen(demo: Demo) -> Seen:
    return Seen(demo)


@pytest.fixture(scope="module")
def recorded(demo: Demo) -> tuple[Recording, torch.Tensor]:
    recorder = RecordingDenoiser(demo.model, [(Blocks(first=0, each=True), "residual")], backend="eager", width=509)
    images = demo.draw(recorder, LABELS, num_steps=STEPS, seed=5)
    return recorder.recording(), images


def test_the_run_is_the_uncached_one(recorded: tuple[Recording, torch.Tensor], seen: Seen) -> None:
    assert torch.equal(recorded[1], seen.images)
    assert recorded[0].steps == STEPS
    assert recorded[0].runs == 1
    assert len(recorded[0].timesteps) == STEPS


def test_changes_are_those_of_the_blocks(recorded: tuple[Recording, torch.Tensor], seen: Seen) -> None:
    recording = recorded[0]
    assert len(recording.regions) == 12
    for block in (0, 5, 11):
        found = recording.regions[block]
        values = [step[block] for step in seen.residuals]
        for step in range(STEPS):
            assert float(found.size[step]) == pytest.approx(float(values[step].abs().mean()), rel=1e-4)
            for lag in (1, 2, 3):
                if step < lag:
                    assert found.change[step, lag - 1] == torch.inf
                    continue
                expected = float((values[step] - values[step - lag]).abs().mean())
                assert float(found.change[step, lag - 1]) == pytest.approx(expected, rel=1e-3)
            if step:
                ratio = float((values[step].norm(dim=-1) / values[step - 1].norm(dim=-1)).mean())
                assert float(found.growth[step]) == pytest.approx(ratio, rel=1e-3)
        assert found.growth[0] == 1.0


def test_inner_products_come_near_from_sketches(recorded: tuple[Recording, torch.Tensor], seen: Seen) -> None:
    for block in (0, 11):
        flat = torch.stack([step[block].flatten() for step in seen.residuals]).double()
        exact, found = flat @ flat.T, recorded[0].regions[block].gram
        assert (found - exact).abs().max() < 0.1 * exact.diagonal().max()
        moved = torch.tensor([-0.5, 0.5, 1.0, -1.0, 0.0, 1.0, 0.0, -1.0]).double()  # any weighted sum
        assert float(moved @ found @ moved) == pytest.approx(float(moved @ exact @ moved), rel=0.25)


def test_quantities_that_guards_watch(recorded: tuple[Recording, torch.Tensor], seen: Seen) -> None:
    recording = recorded[0]
    assert set(recording.quantities) == {"modulated_input", "first_block", "latents", "output"}
    change, size = recording.quantities["output"]
    for step in range(1, STEPS):
        expected = float((seen.outputs[step] - seen.outputs[step - 1]).abs().mean())
        assert float(change[step]) == pytest.approx(expected, rel=1e-3)
        assert float(size[step]) == pytest.approx(float(seen.outputs[step].abs().mean()), rel=1e-3)


def test_guidance_branches_are_runs_of_their_own(demo: Demo) -> None:
    recorder = RecordingDenoiser(demo.model, [(Trunk(), "auto")], backend="eager")
    demo.draw(recorder, LABELS, num_steps=3, batched_guidance=False)
    demo.draw(recorder, LABELS, num_steps=3, batched_guidance=False, seed=1)
    assert recorder.recording().runs == 4
    assert len(recorder.recording().regions) == 1


def test_what_cannot_be_told(demo: Demo) -> None:
    recorder = RecordingDenoiser(demo.model, [(Trunk(), "auto")], backend="eager")
    with pytest.raises(CalibrationError, match="nothing was recorded"):
        recorder.recording()
    for steps in (2, 3):
        demo.draw(recorder, LABELS, num_steps=steps)
    with pytest.raises(CalibrationError, match=r"differ in length \(2, 3 steps\)"):
        recorder.recording()


@pytest.mark.inductor
def test_the_compiled_program_tells_the_same(demo: Demo, recorded: tuple[Recording, torch.Tensor]) -> None:
    recorder = RecordingDenoiser(demo.model, [(Blocks(first=0, each=True), "residual")], width=509)
    demo.draw(recorder, LABELS, num_steps=STEPS, seed=5)
    for found, expected in zip(recorder.recording().regions, recorded[0].regions, strict=True):
        torch.testing.assert_close(found.change, expected.change, rtol=1e-2, atol=1e-5)
        torch.testing.assert_close(found.gram, expected.gram, rtol=1e-2, atol=1e-2 * float(expected.gram.max()))
