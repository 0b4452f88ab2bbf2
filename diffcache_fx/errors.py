"""What this library raises: one clear sentence that says what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class CacheError(Exception):
    """Base of every error this library raises on purpose."""


class CaptureError(CacheError):
    """The model could not be traced to one graph; the message names its class and the line that defeated it."""


class RegionError(CacheError, ValueError):
    """A region cannot be found, cut or guarded as asked."""


class ScheduleError(CacheError, ValueError):
    """A schedule is malformed, impossible, or of another version."""


class CallError(CacheError, TypeError):
    """The denoiser was called in a way its program cannot serve."""


class StaleProgramError(CacheError, RuntimeError):
    """The model was changed after compilation in a way that cannot be carried into the compiled programs."""


class CalibrationError(CacheError, ValueError):
    """A sampling run cannot be measured, a target not met, or a calibrated schedule belongs to another run."""


class NotFiniteError(CalibrationError):
    """Samples of a generation are not finite."""


class ExportError(CacheError, RuntimeError):
    """An artefact cannot be written as asked; nothing is left behind."""


class BundleError(CacheError, RuntimeError):
    """A bundle cannot be loaded or run: incomplete, changed, of another version, or without its runtime."""


class VerificationError(CacheError, AssertionError):
    """A pass left a program that breaks the rules of the intermediate form."""


class CacheWarning(UserWarning):
    """Something unusual was met and answered by computing rather than by reusing."""


def nearest(name: str, known: Iterable[str], limit: int = 3) -> str:
    """Return `"; did you mean 'a', 'b'?"` for the known names closest to `name`, or all of them if they are few."""
    names = sorted(set(known))
    close = difflib.get_close_matches(name, names, n=limit, cutoff=0.4)
    if close:
        return "; did you mean " + ", ".join(repr(entry) for entry in close) + "?"
    if names and len(names) <= 12:
        return "; known: " + ", ".join(repr(entry) for entry in names)
    return ""
