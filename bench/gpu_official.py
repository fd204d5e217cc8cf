"""The official JAX implementation, where a checkout and its packages are there."""

from __future__ import annotations

from typing import Any

from bench.gpu_context import Context


class Unavailable(Exception):
    """There is nothing to measure, and why."""


def measure(context: Context, preset: str, length: int, path: str | None) -> dict[str, Any]:
    raise Unavailable("no checkout was given by --official")
