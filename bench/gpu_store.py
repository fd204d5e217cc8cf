"""What was measured, in one file that is whole at any moment, and what it was measured on."""

from __future__ import annotations

import hashlib
import json
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench import machine
from engine.files import atomic_write

CHECKOUT = Path(__file__).resolve().parents[1]
SOURCES = ("bench", "csrc", "engine", "ttt_kernels")
SUFFIXES = (".py", ".cpp", ".cu", ".cuh", ".h")
FILE = "results.json"


def identity(device: torch.device) -> dict[str, Any]:
    """Hardware, driver, versions and sources: results of another identity are others' results.

    The commit and whether files differ from it are None where git does not know; `sources` tells then.
    """
    facts: dict[str, Any] = dict(machine.describe(device))
    if device.type == "cuda":
        facts |= {
            "driver": _driver(),
            "gpu_memory_bytes": torch.cuda.get_device_properties(device).total_memory,
        }
    return facts | {"commit": _git("rev-parse", "HEAD"), "changed": _changed(), "sources": sources_hash()}


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether results of one may stand beside those of the other: the same sources, however they came here."""
    apart = ("commit", "changed")
    return {k: v for k, v in a.items() if k not in apart} == {k: v for k, v in b.items() if k not in apart}


def sources_hash() -> str:
    """Of all that is run."""
    digest = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((CHECKOUT / folder).rglob("*")):
            if path.suffix in SUFFIXES:
                digest.update(f"{path.relative_to(CHECKOUT)}\0".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def folder_name(facts: dict[str, Any]) -> str:
    """Of the results of a device, as the folders under bench/results are called."""
    name = str(facts.get("gpu") or f"{facts['cpu']} {facts['threads']} threads")
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


class Store:
    """Results by key, written as soon as they come; for several threads."""

    def __init__(self, folder: Path, facts: dict[str, Any], settings: dict[str, Any]) -> None:
        self._path = folder / FILE
        self._lock = threading.Lock()
        self.facts = facts
        self.settings = settings
        self.results: dict[str, dict[str, Any]] = {}
        self.moved: Path | None = None
        """Where results of another identity or of other settings went."""
        self._read()

    def put(self, key: str, result: dict[str, Any]) -> None:
        """Keeps a result."""
        with self._lock:
            self.results[key] = result
            self._write()

    def measured(self, key: str) -> bool:
        """Whether there is a result that need not be measured again."""
        return self.results.get(key, {}).get("status") == "measured"

    def forget(self, key: str) -> None:
        """Before it is measured again."""
        with self._lock:
            if self.results.pop(key, None) is not None:
                self._write()

    def of_stage(self, stage: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Keys and results whose key begins with the stage."""
        for key, result in self.results.items():
            if key.split(" ")[0] == stage:
                yield key, result

    def _read(self) -> None:
        if not self._path.exists():
            return
        try:
            kept = json.loads(self._path.read_text(encoding="utf-8"))
            usable = same(kept["identity"], self.facts) and kept["settings"] == self.settings
        except (ValueError, KeyError, TypeError):
            kept, usable = {}, False
        if usable:
            self.results = kept["results"]
            return
        self.moved = next(p for p in _other_names(self._path) if not p.exists())
        self._path.rename(self.moved)

    def _write(self) -> None:
        whole = {"identity": self.facts, "settings": self.settings, "results": self.results}
        with atomic_write(self._path) as temporary:
            temporary.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def _other_names(path: Path) -> Iterator[Path]:
    number = 1
    while True:
        yield path.with_name(f"{path.stem}-{number}{path.suffix}")
        number += 1


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=CHECKOUT, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _changed() -> bool | None:
    found = _git("status", "--porcelain", "--", *SOURCES)
    return None if found is None else bool(found)


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.split("\n")[0].strip() if done.returncode == 0 else None
