"""Folders that are either whole or not there."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a path beside `path` at which the body makes a folder, which becomes `path` at the end, at once.

    If the body raises, nothing is left behind. Raises `ValueError` where `path` is there already, or its
    parent folder is not.
    """
    target = Path(path)
    if os.path.lexists(target):
        raise ValueError(f"{target} is there already: a new folder is written, none is replaced")
    if not target.absolute().parent.is_dir():
        raise ValueError(f"{target}: there is no folder {target.absolute().parent}")
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")
    try:
        yield temporary
        for file in temporary.rglob("*"):
            # Without this a crash of the machine could leave the new name on empty files.
            if file.is_file():
                with open(file, "rb") as written:
                    os.fsync(written.fileno())
        os.rename(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
