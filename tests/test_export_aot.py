"""AOTInductor bundles from Python and from C++: the same decisions and the same outputs."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from diffcache_fx.export.manifest import read_manifest
from safetensors.torch import load_file, save_file

from diffcache_fx import Linear, compile_with_cache, export, schedules
from diffcache_fx.demo.digits import load_digits
from diffcache_fx.errors import BundleError
from diffcache_fx.measure import psnr, relative_error

from .conftest import digits_denoiser, sample
from .drawing import SCHEDULES, STEPS, decided_alike, drawn, forced, letters, margins, sampler
from .test_export_onnx import FEW, decisions, generation

pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler: g++"),
]
HOST = Path(__file__).parent / "cpp_host"
# A package takes a compiler half a minute: `make sweep` builds all of them.
SWEEP = bool(os.environ.get("DIFFCACHE_FX_SWEEP"))
DRAWN = [name for name in SCHEDULES if SWEEP or name != "taylor"]
FORMS = ["pair", "branch"] if SWEEP else ["branch"]


@pytest.mark.parametrize("form", FORMS)
def test_a_generation(form: str, tmp_path: Path) -> None:
    """More of the corpus: `python -m bench.exports --only aot_inductor`."""
    name = FEW[0]
    found = sample(name)
    denoiser = compile_with_cache(
        found.module,
        schedules.interval(3, forecast=Linear()),
        backend="eager",
        num_steps=STEPS,
        decide="graph" if form == "branch" else "host",
        example_inputs=(found.args, found.kwargs),
    )
    expected = generation(denoiser, name)
    folder = export.to_aot_inductor(denoiser, tmp_path / "bundle", form)
    loaded = export.load_bundle(folder)
    made = generation(loaded, name)
    assert decisions(loaded) == decisions(denoiser)
    assert max(relative_error(a, b) for a, b in zip(made, expected, strict=True)) < 1e-4


# --- the demo model, from Python and from C++ ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C++ host, built."""
    if shutil.which("cmake") is None:
        pytest.skip("needs cmake")
    build = tmp_path_factory.mktemp("host")
    prefix = f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"
    subprocess.run(["cmake", "-S", HOST, "-B", build, prefix], check=True, capture_output=True)
    subprocess.run(["cmake", "--build", build], check=True, capture_output=True)
    return build / "host"


@pytest.fixture(scope="module", params=DRAWN)
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Path]:
    """A schedule's name, the demo model's eager denoiser under it, and the bundle of that."""
    cached = digits_denoiser(SCHEDULES[request.param], STEPS)
    return request.param, cached, export.to_aot_inductor(cached, tmp_path_factory.mktemp(request.param) / "bundle")


def test_python_draws_the_same_images(bundle: tuple[str, Any, Path]) -> None:
    name, cached, folder = bundle
    inputs, loaded = sampler(), export.load_bundle(folder)
    cached.reset()
    expected, found = drawn(cached, inputs), drawn(loaded, inputs)
    print(name, margins(loaded))
    decided_alike(loaded, cached)
    assert psnr(found, expected) > 60


def test_the_same_images_with_decisions_forced(tmp_path: Path) -> None:
    """What the first-block guard decided, as a plan from outside."""
    adaptive = SCHEDULES["first-block"]
    guided = digits_denoiser(adaptive, STEPS)
    expected = drawn(guided, sampler())
    planned = digits_denoiser(forced(adaptive, guided), STEPS)
    loaded = export.load_bundle(export.to_aot_inductor(planned, tmp_path / "bundle"))
    found = drawn(loaded, sampler())
    decided_alike(loaded, guided)
    assert psnr(found, expected) > 60


def test_cpp_draws_the_same_images(bundle: tuple[str, Any, Path], host: Path, tmp_path: Path) -> None:
    _, cached, folder = bundle
    inputs = sampler()
    cached.reset()
    expected = drawn(cached, inputs)
    save_file(inputs, tmp_path / "inputs.safetensors")
    command = [host, folder, tmp_path / "inputs.safetensors", tmp_path / "outputs.safetensors"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.strip() == letters(cached)
    assert psnr(load_file(tmp_path / "outputs.safetensors")["images"], expected) > 60


def test_packages_share_one_copy_of_the_weights(bundle: tuple[str, Any, Path]) -> None:
    name, _, folder = bundle
    manifest = read_manifest(folder)
    weights = sum(p.numel() * 4 for p in load_digits().model.parameters())
    packages = [manifest.files[program.file].bytes for program in manifest.programs.values()]
    assert manifest.files["weights.safetensors"].bytes < 1.01 * weights + (1 << 16)
    assert max(packages) < 0.5 * weights
    if name == "static":
        refresh, reuse = (set(manifest.programs[part].weights) for part in ("refresh", "reuse"))
        assert {name for name in reuse if not name.startswith("correction_")} < refresh


def test_no_path_of_this_machine_is_in_the_sources(bundle: tuple[str, Any, Path]) -> None:
    import zipfile

    home = str(Path(__file__).parents[1]).encode()
    for path in bundle[2].glob("*.pt2"):
        with zipfile.ZipFile(path) as archive:
            for entry in archive.namelist():
                if not entry.endswith(".so"):  # the compiler writes its command line there
                    assert home not in archive.read(entry), entry


def test_a_package_that_does_not_load(bundle: tuple[str, Any, Path], tmp_path: Path) -> None:
    copied = Path(shutil.copytree(bundle[2], tmp_path / "bundle"))
    (copied / "refresh.pt2").write_bytes(b"not a package")
    with pytest.raises(BundleError, match=r"refresh\.pt2 is not the file that was exported"):
        export.load_bundle(copied)
    with pytest.raises(BundleError, match="does not load here"):
        export.load_bundle(copied, verify=False)


def test_options_of_another_runtime(bundle: tuple[str, Any, Path]) -> None:
    with pytest.raises(BundleError, match="are for ONNX Runtime"):
        export.load_bundle(bundle[2], providers=["CPUExecutionProvider"])


def test_the_host_says_what_it_cannot_do(host: Path, tmp_path: Path) -> None:
    ran = subprocess.run([host, tmp_path, "x", "y"], capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert "cannot read" in ran.stderr
    assert subprocess.run([host], capture_output=True, check=False).returncode == 2
