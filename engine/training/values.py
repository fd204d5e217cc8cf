"""Values of a composed configuration, each checked; what is not accepted is named with its key."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf


def refused(key: str, value: object, accepted: str) -> ValueError:
    """The error of a key whose value is not accepted."""
    return ValueError(f"{key}={value!r} is not accepted: it must be {accepted}")


class Values:
    """A configuration of the groups in `engine.training.schema`, read by dotted key.

    OmegaConf has checked the types already, so what is left are ranges and choices. Every method raises
    `ValueError` with the key, the value and what is accepted.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg = cfg

    def get(self, key: str) -> Any:
        """The value as it stands; None where there is none."""
        return OmegaConf.select(self.cfg, key)

    def integer(self, key: str, low: int) -> int:
        """An integer of at least `low`."""
        value = self.get(key)
        if value is None or value < low:
            raise refused(key, value, f"an integer of at least {low}")
        return value

    def optional_integer(self, key: str, low: int) -> int | None:
        """None, or an integer of at least `low`."""
        return None if self.get(key) is None else self.integer(key, low)

    def number(self, key: str, *, positive: bool = False, below: float = math.inf) -> float:
        """A finite number from 0, or if `positive` above it, up to `below`, exclusively."""
        value = self.get(key)
        if value is None or not 0 <= value < below or (positive and value == 0):
            bounds = f"{'above' if positive else 'of at least'} 0"
            limit = "" if below == math.inf else f" and below {below:g}"
            raise refused(key, value, f"a finite number {bounds}{limit}")
        return value

    def choice(self, key: str, accepted: Collection[str]) -> str:
        """One of `accepted`."""
        value = self.get(key)
        if value not in accepted:
            raise refused(key, value, "one of " + ", ".join(accepted))
        return value

    def folder(self, key: str) -> Path:
        """A path of this machine's file systems."""
        value = self.get(key)
        if not value or "://" in value:
            raise refused(key, value, "a path on this machine, not empty and not a URL")
        return Path(value)
