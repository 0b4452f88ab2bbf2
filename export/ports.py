"""Inputs and outputs of a program as an artefact has them: names, kinds, dtypes and sizes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from diffcache_fx.program import InputKind, Output, OutputKind, StepProgram, returned, size_hint

# Kinds of inputs that an artefact holds itself.
WEIGHTS = frozenset({InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT})


def name_of_dtype(dtype: torch.dtype) -> str:
    """`float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def dtype_named(name: str) -> torch.dtype:
    """The dtype called so. Raises ValueError for another name."""
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ValueError(f"no dtype is called {name!r}")
    return found


def hints_of(shape: Iterable[int | torch.SymInt]) -> tuple[int, ...]:
    """Sizes as they were at capture."""
    return tuple(size_hint(size) for size in shape)


def input_names(program: StepProgram, weights: bool = False) -> list[str]:
    """A name for each input, in order: arguments by their own, state by region. weights: those too."""
    return [entry.name for entry in program.inputs if weights or entry.kind not in WEIGHTS]


def output_names(program: StepProgram) -> list[str]:
    """A name for each output, in order, different from all inputs' names.

    The model's own: out_FIELD. What goes into the next step: next_INPUT where the program has that input, else
    fresh_REGION_VALUE. Signals: signal_RULE_NAME. Decisions: refresh_RULE.
    """
    inputs = {(entry.kind.name, entry.target): entry.name for entry in program.inputs}
    fields = _fields(program)
    found: list[str] = []
    for output in program.outputs:
        found.append(_output_name(output, inputs, fields))
    seen: dict[str, int] = {}
    for index, name in enumerate(found):
        seen[name] = seen.get(name, 0) + 1
        if seen[name] > 1:
            found[index] = f"{name}_{seen[name]}"
    return found


def _output_name(output: Output, inputs: dict[tuple[str, str], str], fields: Sequence[str]) -> str:
    target = output.target
    if output.kind is OutputKind.USER:
        return f"out_{fields[int(target)]}"
    if output.kind is OutputKind.STATE:
        fed = inputs.get((InputKind.HISTORY.name, target))
        return f"next_{fed}" if fed else f"fresh_{identifier(target)}"
    if output.kind is OutputKind.MEMORY:
        fed = inputs.get((InputKind.MEMORY.name, target))
        return f"next_{fed}" if fed else f"next_kept_{identifier(target)}"
    prefix = {OutputKind.SIGNAL: "signal", OutputKind.LIVE: "live", OutputKind.DECISION: "refresh"}
    return f"{prefix.get(output.kind, 'extra')}_{identifier(target)}"


def identifier(text: str) -> str:
    """Text with everything but letters and digits as single underscores."""
    made = "".join(c if c.isalnum() else "_" for c in text)
    while "__" in made:
        made = made.replace("__", "_")
    return made.strip("_")


def _fields(program: StepProgram) -> list[str]:
    """Names of the model's output tensors: those of its output class where it has any."""
    spec = program.signature.out_spec
    constants = {index for index, _ in program.signature.out_constants}
    names: list[str] = []
    children = spec.children()
    if isinstance(spec.context, (list, tuple)) and len(spec.context) == len(children):
        for name, child in zip(spec.context, children, strict=True):
            names += [str(name)] if child.is_leaf() else [f"{name}_{i}" for i in range(child.num_leaves)]
    else:
        names = [str(i) for i in range(max(spec.num_leaves, 1))]
    return [identifier(name) for index, name in enumerate(names) if index not in constants]


def example_of(program: StepProgram) -> list[torch.Tensor]:
    """The example value of each output, in order."""
    return [value.meta["val"] for value in returned(program.graph)]
