"""`metrics.jsonl`: one JSON object per line and training step, never two of the same step."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from engine.files import atomic_write


class MetricsFile:
    """Appends to `path`, after dropping what is there of steps after `resume_step`.

    A last line without an end, of a process that was killed while writing it, is dropped too. Every line is
    given to the operating system at once. Raises `ValueError` where another line is not one of this class.
    """

    def __init__(self, path: Path, resume_step: int) -> None:
        if path.exists():
            _keep_until(path, resume_step)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115

    def write(self, values: Mapping[str, int | float]) -> None:
        """Appends a line; numbers that JSON does not have, infinities and NaN, become null."""
        line = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _keep_until(path: Path, last: int) -> None:
    data = path.read_bytes()
    lines = data.splitlines(keepends=True)
    kept = [
        line
        for number, line in enumerate(lines, 1)
        if line.endswith(b"\n") and _step(path, number, line) <= last
    ]
    if len(kept) < len(lines):
        with atomic_write(path) as temporary:
            temporary.write_bytes(b"".join(kept))


def _step(path: Path, number: int, line: bytes) -> int:
    try:
        step = json.loads(line)["step"]
        if not isinstance(step, int):
            raise TypeError(f"step is {step!r}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: line {number} is not that of a step ({error})") from error
    return step
