"""The `--schedule` argument: a factory's name, `name:option=value,...`, or the path of a saved schedule."""

from __future__ import annotations

import ast
import dataclasses
import inspect
from pathlib import Path
from typing import Any

from . import schedules, selection
from .errors import ScheduleError, nearest
from .forecasts import FORECASTS
from .schedule import CacheSchedule


def parse_schedule(text: str) -> CacheSchedule:
    """A schedule as typed: `fora`, `interval:every=3,forecast=taylor(order=2)`, `mask:bits=[1,0,0,1]`, or a path.

    Values are Python literals; a forecast or a selection of regions is given by its kind (`linear`, `trunk`,
    `sublayers`), with its fields in parentheses where they are not the defaults. Raises ScheduleError.
    """
    name, colon, rest = text.partition(":")
    known = schedules.list()
    if name in known:
        options = _options(name, rest) if colon else {}
        try:
            return schedules.get(name, **options)
        except ScheduleError as error:
            raise ScheduleError(f"{text}: {error}") from error
    if Path(text).exists() or Path(text).suffix == ".json" or len(Path(text).parts) > 1:
        return schedules.resolve(text)
    raise ScheduleError(f"no schedule is called {name!r}{nearest(name, known)} (`diffcache-fx schedules` lists them)")


def _options(name: str, text: str) -> dict[str, Any]:
    """`a=1,b=[1,0],c=linear` as keyword arguments of the factory, each name checked against its signature."""
    known = list(inspect.signature(getattr(schedules, name)).parameters)
    found = _pairs(f"schedule {name}", text, known)
    return {key: _kind(key, value) if key in ("forecast", "regions") else _value(value) for key, value in found.items()}


def _pairs(owner: str, text: str, known: list[str]) -> dict[str, str]:
    """`a=1,b=[1,0]` as {"a": "1", "b": "[1,0]"}; owner: what the options are of, for messages."""
    found: dict[str, str] = {}
    for part in _split(text):
        key, equals, value = part.partition("=")
        key = key.strip()
        if not equals or not value.strip():
            raise ScheduleError(
                f"{part!r} is no option of the {owner}: write it as option=value, options apart by commas"
            )
        if key not in known:
            raise ScheduleError(f"the {owner} has no option {key!r}{nearest(key, known)}")
        if key in found:
            raise ScheduleError(f"the option {key!r} of the {owner} is given twice")
        found[key] = value.strip()
    return found


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


def _kind(key: str, text: str) -> Any:
    """`linear` or `taylor(order=2)` as a forecast, `blocks(first=2)` as a selection of regions."""
    kinds = FORECASTS if key == "forecast" else selection.SELECTIONS
    by_name = {kind.kind: kind for kind in kinds}  # type: ignore[attr-defined]
    name, bracket, rest = text.partition("(")
    name = name.strip()
    if name not in by_name:
        raise ScheduleError(f"{key} has no kind {name!r}{nearest(name, by_name)}")
    if bracket and not rest.rstrip().endswith(")"):
        raise ScheduleError(f"{key}={text} lacks its closing bracket")
    fields = [entry.name for entry in dataclasses.fields(by_name[name])]
    found = _pairs(f"{'forecast' if key == 'forecast' else 'selection'} {name}", rest.rstrip()[:-1], fields)
    try:
        return by_name[name](**{field: _value(value) for field, value in found.items()})
    except TypeError as error:
        raise ScheduleError(f"{key}={text} does not fit: {error}") from error
    except ScheduleError as error:
        if bracket:
            raise
        raise ScheduleError(
            f"{key}={name} needs details ({error}): give its fields in parentheses, {name}(field=value), or make the "
            "schedule in Python, save_pretrained() it and pass the path"
        ) from error


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text  # a plain word
