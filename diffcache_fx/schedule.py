"""`CacheSchedule`: regions x guard x forecast x limits, as plain validated data that survives a JSON round trip."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .adaptive import AdaptiveGuard
from .correction import CORRECTIONS, ScaleShift
from .errors import ScheduleError, nearest
from .forecasts import FORECASTS, Forecast, Hold
from .guards import GUARDS, Always, Guard, Interval, Mask
from .guidance import SHARES, Reconstruct
from .provenance import Provenance
from .references import REFERENCES
from .selection import SELECTIONS, Selection, Trunk

FORMAT = "diffcache_fx.schedule"
VERSION = 1
FILE_NAME = "cache_schedule.json"
STORAGES = ("auto", "value", "residual")
GUIDANCE = ("apart", "together")


def _check_whole(name: str, value: Any, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ScheduleError(f"{name} must be a whole number from {least}, not {value!r}")


def _check_member(name: str, value: Any, kinds: tuple[type, ...]) -> None:
    if not isinstance(value, kinds):
        known = ", ".join(kind.__name__ for kind in kinds)
        raise ScheduleError(f"{name} must be one of {known}, not {value!r}")


@dataclass(frozen=True)
class Rule:
    """One guard over one selection of regions.

    storage: what is kept of a region: its "value"; its "residual" over the region's input, added to the fresh input at
    a reuse step; "auto": the residual where a value of the same shape enters the region, else the value.
    share: what is reused is the mean of the guidance "branches" (separate calls), or of the two "halves" of each batch.
    correction: how what is reused is aligned with what would be computed; None for not at all.
    """

    regions: Selection = field(default_factory=Trunk)
    guard: Guard = field(default_factory=Interval)
    forecast: Forecast = field(default_factory=Hold)
    storage: str = "auto"
    share: str = "none"
    correction: ScaleShift | None = None

    def __post_init__(self) -> None:
        _check_member("regions", self.regions, SELECTIONS)
        _check_member("guard", self.guard, GUARDS)
        _check_member("forecast", self.forecast, FORECASTS)
        missing = set(self.forecast.wants) - set(getattr(self.guard, "offers", ()))
        if missing:
            able = ", ".join(kind.__name__ for kind in GUARDS if missing <= set(getattr(kind, "offers", ())))
            raise ScheduleError(
                f"the forecast {self.forecast.kind!r} wants a number that the guard measures "
                f"({', '.join(sorted(missing))}), and {type(self.guard).__name__} measures none: use it with {able}, "
                "or take another forecast"
            )
        if self.storage not in STORAGES:
            raise ScheduleError(f"storage must be one of {', '.join(STORAGES)}, not {self.storage!r}")
        if self.share not in SHARES:
            raise ScheduleError(f"share must be one of {', '.join(SHARES)}, not {self.share!r}")
        if self.correction is not None:
            _check_member("correction", self.correction, CORRECTIONS)


@dataclass(frozen=True)
class CacheSchedule:
    """What to cache, when to refresh it, how to fill it, and the limits that hold whatever the guard says.

    rules: each guard with its regions; the regions of different rules must not overlap.
    warm_up: steps at the start that always refresh (at least 1). cool_down: steps at the end that always refresh; needs
    the number of steps. longest_reuse: most reuse steps in a row for a region; None for no limit. most_reuses: most
    reuse steps of a generation for a region. memory_cap: most bytes of cache for one guidance branch; forecasts look
    back less far to stay below it. guidance: whether each guidance branch decides for itself ("apart"), or the one that
    is called first at a step decides for all ("together"); matters to adaptive guards only. branch: when and how the
    unconditional guidance branch is rebuilt from the conditional one; None for never. made_for: the run that it was
    calibrated for; it is refused in others.
    """

    name: str = "custom"
    rules: tuple[Rule, ...] = (Rule(),)
    warm_up: int = 1
    cool_down: int = 0
    longest_reuse: int | None = None
    most_reuses: int | None = None
    memory_cap: int | None = None
    guidance: str = "apart"
    branch: Reconstruct | None = None
    made_for: Provenance | None = None

    def __post_init__(self) -> None:
        rules = (self.rules,) if isinstance(self.rules, Rule) else self.rules
        if not isinstance(rules, (tuple, list)) or not rules or not all(isinstance(rule, Rule) for rule in rules):
            raise ScheduleError(f"rules must be a Rule or several of them, not {self.rules!r}")
        object.__setattr__(self, "rules", tuple(rules))
        _check_whole("warm_up", self.warm_up, 1)
        _check_whole("cool_down", self.cool_down, 0)
        for name in ("longest_reuse", "most_reuses", "memory_cap"):
            if getattr(self, name) is not None:
                _check_whole(name, getattr(self, name), 1)
        if self.guidance not in GUIDANCE:
            raise ScheduleError(f"guidance must be one of {', '.join(GUIDANCE)}, not {self.guidance!r}")
        if self.branch is not None:
            _check_member("branch", self.branch, (Reconstruct,))
        if self.made_for is not None:
            _check_member("made_for", self.made_for, (Provenance,))
        if not isinstance(self.name, str) or not self.name:
            raise ScheduleError(f"name must be a non-empty string, not {self.name!r}")

    @property
    def slots(self) -> int:
        """History slots per cut value: the most any forecast asks for."""
        return max(rule.forecast.slots for rule in self.rules)

    def needs_num_steps(self) -> bool:
        """True if a decision depends on how many steps the run will have."""
        return self.cool_down > 0 or any(rule.guard.needs_num_steps() for rule in self.rules)

    @property
    def adaptive(self) -> dict[int, AdaptiveGuard]:
        """The rules whose guard measures something, by index."""
        return {i: rule.guard for i, rule in enumerate(self.rules) if rule.guard.adaptive}  # type: ignore[misc]

    @property
    def windows(self) -> dict[int, tuple[float, float]]:
        """The rules that may reuse between two timesteps only, by index."""
        return {i: times for i, rule in enumerate(self.rules) if (times := rule.guard.timesteps) is not None}

    @property
    def corrections(self) -> tuple[ScaleShift | None, ...]:
        """How each rule's reused values are corrected."""
        return tuple(rule.correction for rule in self.rules)

    @property
    def needs_timestep(self) -> bool:
        """True if a decision depends on the timestep's value."""
        return bool(self.windows) or self.branch is not None

    @property
    def mask_length(self) -> int | None:
        """Number of steps fixed by a mask, if any rule has one."""
        lengths = {len(rule.guard.bits) for rule in self.rules if isinstance(rule.guard, Mask)}
        if len(lengths) > 1:
            raise ScheduleError(f"the masks of one schedule must cover the same steps, not {sorted(lengths)}")
        return next(iter(lengths), None)

    def to_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, "version": VERSION, **_encode(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> CacheSchedule:
        """Rebuild a schedule; unknown fields, unknown names and other versions are refused."""
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise ScheduleError(f"this is no cache schedule: the field 'format' should say {FORMAT!r}")
        if data.get("version") != VERSION:
            raise ScheduleError(
                f"this schedule has version {data.get('version')!r}, and this library reads version {VERSION}: "
                "make it again with this library, or install the library that wrote it"
            )
        if "rules" not in data:
            raise ScheduleError("the field 'rules' is missing: without it this would be another schedule")
        fields = {key: value for key, value in data.items() if key not in ("format", "version")}
        return _decode_into(
            cls, fields, "schedule", {"rules": _decode_rules, "branch": _decode_branch, "made_for": _decode_made_for}
        )

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> CacheSchedule:
        try:
            return cls.from_dict(json.loads(text))
        except json.JSONDecodeError as error:
            raise ScheduleError(f"not a JSON file: {error}") from error

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write `cache_schedule.json` into a folder (made if missing), whole or not at all; returns its path."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        part = path / (FILE_NAME + ".part")
        part.write_text(self.to_json())
        part.replace(path / FILE_NAME)
        return path / FILE_NAME

    @classmethod
    def from_pretrained(cls, source: str | Path) -> CacheSchedule:
        """Read a schedule from a folder that holds `cache_schedule.json`, or from such a file."""
        path = Path(source)
        path = path / FILE_NAME if path.is_dir() else path
        if not path.is_file():
            raise ScheduleError(f"no schedule at {path}: give the file, or a folder that holds {FILE_NAME}")
        try:
            return cls.from_json(path.read_text())
        except ScheduleError as error:
            raise ScheduleError(f"{path}: {error}") from error


def static_refresh(rule: Rule, step: int, num_steps: int | None, region: int, warm_up: int) -> bool:
    """What the rule's guard says, before any limit but warm-up."""
    return step < warm_up or rule.guard.refresh(step, num_steps, region, warm_up)


def _encode(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        body = {entry.name: _encode(getattr(value, entry.name)) for entry in dataclasses.fields(value)}
        kind = getattr(type(value), "kind", None)
        return {"kind": kind, **body} if kind else body
    if isinstance(value, (tuple, list)):
        return [_encode(entry) for entry in value]
    return value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(entry) for entry in value) if isinstance(value, list) else value


def _decode_into(cls: type, data: Any, what: str, special: dict[str, Any] | None = None) -> Any:
    if not isinstance(data, dict):
        raise ScheduleError(f"{what} must be an object with named fields, not {data!r}")
    known = [entry.name for entry in dataclasses.fields(cls)]
    for key in data:
        if key not in known:
            raise ScheduleError(f"unknown field {key!r} in {what}{nearest(key, known)}")
    special = special or {}
    return cls(**{key: special[key](value) if key in special else _tuples(value) for key, value in data.items()})


def _decode_kind(data: Any, kinds: tuple[type, ...], what: str) -> Any:
    if not isinstance(data, dict) or "kind" not in data:
        raise ScheduleError(f"{what} must be an object with a field 'kind', not {data!r}")
    names = {kind.kind: kind for kind in kinds}  # type: ignore[attr-defined]
    if data["kind"] not in names:
        raise ScheduleError(f"unknown {what} {data['kind']!r}{nearest(str(data['kind']), names)}")
    body = {key: value for key, value in data.items() if key != "kind"}
    nested = {"of": lambda value: _decode_kind(value, REFERENCES, "quantity")}
    return _decode_into(names[data["kind"]], body, f"{what} {data['kind']!r}", nested)


def _decode_rules(data: Any) -> tuple[Rule, ...]:
    if not isinstance(data, (list, tuple)):
        raise ScheduleError(f"rules must be a list of rules, not {data!r}")
    return tuple(_decode_rule(entry) for entry in data)


def _decode_branch(data: Any) -> Reconstruct | None:
    return None if data is None else _decode_kind(data, (Reconstruct,), "branch")


def _decode_made_for(data: Any) -> Provenance | None:
    return None if data is None else _decode_into(Provenance, data, "made_for")


def _decode_rule(data: Any) -> Rule:
    return _decode_into(
        Rule,
        data,
        "rule",
        {
            "regions": lambda value: _decode_kind(value, SELECTIONS, "regions"),
            "guard": lambda value: _decode_kind(value, GUARDS, "guard"),
            "forecast": lambda value: _decode_kind(value, FORECASTS, "forecast"),
            "correction": lambda value: None if value is None else _decode_kind(value, CORRECTIONS, "correction"),
        },
    )


__all__ = ["Always", "CacheSchedule", "Hold", "Interval", "Mask", "Rule", "Trunk", "static_refresh"]
