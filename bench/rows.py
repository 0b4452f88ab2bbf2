"""Rows of a table measured in processes of their own: a crash costs one row, and memory is given back."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

Row = dict[str, Any]
_MARK = "bench row: "


@contextlib.contextmanager
def limit(seconds: int) -> Iterator[None]:
    """Raise TimeoutError in what takes longer."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"not done within {seconds} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def brief(error: BaseException) -> str:
    """An error in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:400] if lines else ''}"


def work(names: Sequence[str], measure: Callable[[str], Row], seconds: int) -> None:
    """In a process of its own: measure, printing each row as soon as it is known. seconds: for one row."""
    torch.set_num_threads(1)
    for name in names:
        print(_MARK + json.dumps({"begin": name}), flush=True)
        row: Row = {"name": name}
        try:
            with limit(seconds), torch.no_grad():
                row = measure(name)
        except Exception as error:
            row |= {"failure": brief(error)}
        print(_MARK + json.dumps(row), flush=True)


def rows_of(
    module: str, names: Sequence[str], batch: Callable[[str], int], options: Sequence[str] = ()
) -> Iterator[Row]:
    """The rows that `python -m MODULE --worker NAMES` measures. batch: how many a process that begins with this name
    does."""
    waiting = list(names)
    while waiting:
        some = waiting[: batch(waiting[0])]
        under_way = ""
        command = [sys.executable, "-m", module, "--worker", *options, *some]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if not line.startswith(_MARK):
                    continue
                row = json.loads(line.removeprefix(_MARK))
                if "begin" in row:
                    under_way = row["begin"]
                    continue
                waiting.remove(row["name"])
                under_way = ""
                yield row
        if under_way or process.returncode:
            name = under_way or waiting[0]
            if name in waiting:
                waiting.remove(name)
                yield {"name": name, "failure": f"the process ended with {process.returncode}"}
