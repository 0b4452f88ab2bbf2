"""The `--schedule` argument: a factory's name, `name:option=value,...`, or the path of a saved schedule."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

from . import schedules, selection
from .errors import ScheduleError, nearest
from .forecasts import FORECASTS
from .schedule import CacheSchedule


def parse_schedule(text: str) -> CacheSchedule:
    """A schedule as typed: `fora`, `interval:every=3,forecast=linear`, `mask:bits=[1,0,0,1]`, or a path.

    Values are Python literals; a forecast or a selection of regions is given by its kind (`linear`, `trunk`,
    `sublayers`). Raises ScheduleError.
    """
    name, colon, rest = text.partition(":")
    known = schedules.list()
    if name in known:
        return schedules.get(name, **(_options(name, rest) if colon else {}))
    if Path(text).exists() or Path(text).suffix == ".json" or len(Path(text).parts) > 1:
        return schedules.resolve(text)
    raise ScheduleError(f"no schedule is called {name!r}{nearest(name, known)} (`diffcache-fx schedules` lists them)")


def _options(name: str, text: str) -> dict[str, Any]:
    """`a=1,b=[1,0],c=linear` as keyword arguments of the factory, each name checked against its signature."""
    known = list(inspect.signature(getattr(schedules, name)).parameters)
    options: dict[str, Any] = {}
    for part in _split(text):
        key, equals, value = part.partition("=")
        key = key.strip()
        if not equals or not value.strip():
            raise ScheduleError(f"{part!r} is no option of {name}: write it as option=value, options apart by commas")
        if key not in known:
            raise ScheduleError(f"the schedule {name} has no option {key!r}{nearest(key, known)}")
        if key in options:
            raise ScheduleError(f"the option {key!r} of {name} is given twice")
        options[key] = _value(key, value.strip())
    return options


def _split(text: str) -> list[str]:
    """Parts between the commas that lie outside brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[(") - (letter in "])")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part for part in parts if part.strip()]


def _value(key: str, text: str) -> Any:
    if key in ("forecast", "regions"):
        kinds = FORECASTS if key == "forecast" else selection.SELECTIONS
        by_name = {kind.kind: kind for kind in kinds}  # type: ignore[attr-defined]
        if text not in by_name:
            raise ScheduleError(f"{key} has no kind {text!r}{nearest(text, by_name)}")
        try:
            return by_name[text]()
        except ScheduleError as error:
            raise ScheduleError(
                f"{key}={text} needs details that do not fit a command line ({error}): make the schedule in Python, "
                "save_pretrained() it and pass the path"
            ) from error
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text  # a plain word
