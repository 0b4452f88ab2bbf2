"""bench.exports: the tables say of each cell what was done, and count only what is right."""

from __future__ import annotations

from typing import Any

from bench.export_table import cell, good, markdown, overview, sizes, summary
from bench.exports import AOT, entries, forms_of

RUN = {"files": {"a": 30, "b": 10}, "conditionals": 0, "executed": "cpu", "error": 2e-6, "same_decisions": True}
BUILT = {"files": {"a": 21}, "conditionals": 1, "executed": ""}


def rows() -> dict[str, dict[str, Any]]:
    return {
        "big": {
            "name": "big",
            "family": "unet",
            "uncached": {"conditionals": 0, "onnx": {**RUN, "files": {"a": 20}}},
            "pair": {"conditionals": 1, "onnx": RUN, "aot_inductor": {"failure": "ValueError: x"}},
            "branch": {"conditionals": 1, "tensorrt": BUILT, "onnx": {**RUN, "conditionals": 1, "files": {"a": 21}}},
            "split": {"not_applicable": "no blocks"},
        },
        "small": {
            "name": "small",
            "family": "unet",
            "pair": {"conditionals": 1, "onnx": {**RUN, "error": 0.5}},
            "branch": {"conditionals": 2, "tensorrt": BUILT},
        },
    }


def test_what_a_cell_says_and_whether_it_counts() -> None:
    big, small = rows().values()
    told = {
        ("onnx", "pair"): ("built, run on cpu: 2e-06", True),
        ("aot_inductor", "pair"): ("failed: ValueError: x", False),
        ("tensorrt", "branch"): ("built", True),
        ("tensorrt", "pair"): ("not run", False),
        ("onnx", "split"): ("does not apply", False),
    }
    for head, (words, counts) in told.items():
        assert (cell(big, *head), good(big, *head)) == (words, counts)
    assert not good(small, "onnx", "pair")  # another result
    small["pair"]["onnx"]["rounding"] = 0.25
    assert cell(small, "onnx", "pair") == "built, run on cpu: 5e-01 (eager itself against float64: 2e-01)"
    assert not good(small, "onnx", "pair")
    assert not good(small, "tensorrt", "branch")  # other conditionals than explained
    assert not good({**big, "pair": {**big["pair"], "onnx": {**RUN, "same_decisions": False}}}, "onnx", "pair")


def test_the_tables() -> None:
    assert "- onnx pair: 1 of 2" in summary(rows())
    assert sizes(rows()) == "- big, onnx: uncached 0.0 MiB; times that: pair 2.000, branch 1.050"
    assert markdown(rows()).count("\n| ") == 3
    shown = overview(rows(), {"model": "SD", "run": {"errors": [1e-7, 3e-6]}}).splitlines()
    by_title = {line.split(" | ")[0]: line.strip("| ").split(" | ")[1:] for line in shown[2:]}
    assert by_title["| big"][:3] == ["run on cpu", "run on cpu", "does not apply"]
    assert by_title["| unet, tiny"][:2] == ["0 of 1", "not run"]
    assert by_title["| SD, full size, float32"][:2] == ["not run", "run on cpu, 3e-06"]


def test_what_is_exported() -> None:
    assert set(AOT) <= set(entries())
    assert forms_of("digits") == ("uncached", "pair", "branch", "split")
    assert forms_of("DiTTransformer2DModel") == ("pair", "branch", "split")
