"""What a schedule rule applies to: selections of regions, resolved against a captured graph by `passes.regions`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from .errors import ScheduleError

Count = int | float


def check_count(value: Count, what: str) -> None:
    """A count of blocks or steps: a whole number from 0, or a fraction strictly between 0 and 1."""
    valid = (isinstance(value, int) and not isinstance(value, bool) and value >= 0) or (
        isinstance(value, float) and 0.0 < value < 1.0
    )
    if not valid:
        raise ScheduleError(f"{what} must be a whole number from 0 or a fraction between 0 and 1, not {value!r}")


def absolute(value: Count, total: int) -> int:
    """A count or fraction as a count out of `total`; halves go up, so that two fractions of 1 leave nothing twice."""
    return value if isinstance(value, int) else math.floor(value * total + 0.5)


@dataclass(frozen=True)
class Trunk:
    """The bulk of the model as one region: a transformer's blocks but the first and last few, or a U-Net's outermost
    scale.

    first, last: blocks left out at either end (transformers). branch: which scale (U-Nets), 0 the outermost.
    """

    kind: ClassVar[str] = "trunk"
    first: Count = 1
    last: Count = 0
    branch: int = 0

    def __post_init__(self) -> None:
        check_count(self.first, "first")
        check_count(self.last, "last")
        _check_branch(self.branch)


@dataclass(frozen=True)
class Blocks:
    """A transformer's blocks but the first and last few; with `each`, every block is a region of its own.

    Fractions count from the whole: `Blocks(first=0.5)` is the rear half. tail: so many blocks at the end form a region
    of their own.
    """

    kind: ClassVar[str] = "blocks"
    first: Count = 1
    last: Count = 0
    each: bool = False
    tail: int = 0

    def __post_init__(self) -> None:
        check_count(self.first, "first")
        check_count(self.last, "last")
        check_count(self.tail, "tail")
        if self.each and self.tail:
            raise ScheduleError("with each=True every block is a region of its own: leave tail out")


@dataclass(frozen=True)
class Whole:
    """The whole model as one region: a reuse step computes nothing but the forecast of its outputs."""

    kind: ClassVar[str] = "whole"


@dataclass(frozen=True)
class Scale:
    """All of a U-Net that lies deeper than skip connection number `branch`, 0 the outermost (DeepCache's branch id)."""

    kind: ClassVar[str] = "scale"
    branch: int = 0

    def __post_init__(self) -> None:
        _check_branch(self.branch)


@dataclass(frozen=True)
class Sublayers:
    """Every attention and feed-forward layer as a region of its own, found from what the blocks compute.

    kinds: any of "attention" (self and joint), "cross_attention" (keys do not depend on the latents), "mlp".
    first, last: blocks left out at either end of the trunk.
    """

    kind: ClassVar[str] = "sublayers"
    kinds: tuple[str, ...] = ("attention", "cross_attention", "mlp")
    first: Count = 0
    last: Count = 0

    def __post_init__(self) -> None:
        if isinstance(self.kinds, str):
            object.__setattr__(self, "kinds", (self.kinds,))
        known = ("attention", "cross_attention", "mlp")
        unknown = [kind for kind in self.kinds if kind not in known]
        if unknown or not self.kinds:
            raise ScheduleError(f"kinds must be some of {', '.join(known)}, not {list(self.kinds)!r}")
        check_count(self.first, "first")
        check_count(self.last, "last")


@dataclass(frozen=True)
class Modules:
    """Every submodule whose path matches one of the glob patterns (or the one given), each a region of its own.

    `*` matches any characters, dots included: `*.attn1` is every attn1 of the model. Of nested matches the outermost
    counts.
    """

    kind: ClassVar[str] = "modules"
    patterns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.patterns, str):  # one pattern: a string is no list of letters
            object.__setattr__(self, "patterns", (self.patterns,))
        if not self.patterns or not all(isinstance(p, str) and p for p in self.patterns):
            raise ScheduleError(f"patterns must be module path globs such as '*.attn1', not {self.patterns!r}")


@dataclass(frozen=True)
class Listed:
    """An explicit list of regions, each given as the module paths (globs allowed) it consists of.

    fill: also take in what lies between the listed modules, so that each region is one piece.
    """

    kind: ClassVar[str] = "listed"
    groups: tuple[tuple[str, ...], ...] = ()
    fill: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.groups, str):
            groups = tuple((group,) if isinstance(group, str) else tuple(group) for group in self.groups)
            object.__setattr__(self, "groups", groups)
        if isinstance(self.groups, str) or not self.groups or not all(self.groups):
            raise ScheduleError("groups must list at least one region of at least one module path")


def _check_branch(branch: int) -> None:
    if not isinstance(branch, int) or isinstance(branch, bool) or branch < 0:
        raise ScheduleError(f"branch must be a whole number from 0, not {branch!r}")


Selection = Trunk | Blocks | Whole | Scale | Sublayers | Modules | Listed
SELECTIONS: tuple[type, ...] = (Trunk, Blocks, Whole, Scale, Sublayers, Modules, Listed)
