"""Which data a run reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class DatasetOptions:
    """Which tokens a run reads."""

    name: str
    path: Path | None
    """None: the sources of the standard library (`name` is stdlib), or `dummy`."""
    split: str
    eval_split: str
    tokenizer: str | None
    """Of text: bytes, llama3 or the path of a tokenizer.model; None: by the vocabulary."""
    dummy: bool
    """Random tokens instead."""
