"""Real text to read: a file of the user's, or the running interpreter's own standard library."""

from __future__ import annotations

import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

SKIPPED_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def read_text(path: str | Path) -> str:
    """The UTF-8 text of a file; a ValueError where it is missing, empty or not UTF-8."""
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"text: cannot read {str(path)!r} ({error.strerror})") from error
    if not data:
        raise ValueError(f"text: {str(path)!r} is empty")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"text: {str(path)!r} is not UTF-8 ({error.reason} at byte {error.start})"
        ) from error


def standard_library_text(min_bytes: int) -> str:
    """
    Sources of the interpreter's own standard library, without its tests: whole modules, folder by folder
    in the order of their names, until they hold `min_bytes` bytes of UTF-8, or all where they hold fewer.
    """
    library = Path(sysconfig.get_path("stdlib"))
    parts: list[str] = []
    size = 0
    for path in library_sources(library):
        if size >= min_bytes:
            break
        try:
            data = path.read_bytes()
            parts.append(data.decode("utf-8"))
        except (OSError, UnicodeDecodeError):
            continue
        size += len(data)
    if not parts:
        raise ValueError(f"text: no sources of the standard library in {str(library)!r}; give a text file")
    return "".join(parts)


def library_sources(library: Path) -> Iterator[Path]:
    """The library's modules, in an order that depends on their names only."""
    for folder, folders, files in os.walk(library):
        # os.walk descends into what is left of this list, in its order: site-packages alone can be large.
        folders[:] = sorted(set(folders) - SKIPPED_FOLDERS)
        yield from (Path(folder, name) for name in sorted(files) if name.endswith(".py"))
