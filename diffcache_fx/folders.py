"""Whether what is to be written can be: asked before the work, not after it."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import CacheError


def check_folder(folder: Path, name: str) -> None:
    """Raises CacheError where a folder, which `name` stands for in words, cannot be written to or made. Leaves nothing
    behind."""
    missing = [part for part in (folder, *folder.parents) if not part.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise CacheError(f"{name} {folder} is a file: give a folder") from error
    except OSError as error:
        raise CacheError(f"{name} {folder} cannot be made ({error.strerror}): give another folder") from error
    finally:
        for part in missing:
            if part.is_dir():
                part.rmdir()
    if not missing and not os.access(folder, os.W_OK):
        raise CacheError(f"{name} {folder} cannot be written to: give another folder")
