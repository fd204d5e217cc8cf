"""What a benchmark tells while it runs, and the file that it leaves."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from engine.files import atomic_write


def progress(text: str) -> None:
    """Shown at once, beside the results."""
    sys.stderr.write(text)
    sys.stderr.flush()


def write_json(path: str, runs: Sequence[Mapping[str, Any]]) -> None:
    """A list with an object for every measured run, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(runs, indent=2) + "\n", encoding="utf-8")
