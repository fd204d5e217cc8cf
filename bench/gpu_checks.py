"""Correctness on the device, before anything is timed: every order of every operator, and the golden cases."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bench.gpu_cases import Sizes, case
from bench.gpu_context import Context
from bench.gpu_orders import errors, work
from engine.config import DTYPES
from engine.golden import carried_cases, load_golden
from engine.verify import verify

CPU = torch.device("cpu")
# Heads of 64 and of 80, the published widths; a window that moves within the tokens, and one longer than they are;
# sizes that fill tiles, and sizes that do not.
SIZES = {
    "64": Sizes(2, 80, 48, 128, 208, 2, 64, 512, 2),
    "80": Sizes(1, 33, 100, 160, 272, 2, 80, 307, 1),
}
CHECKED_DTYPES = ("float32", "bfloat16")


def operator(context: Context, name: str, backend: str, dtype: str) -> dict[str, Any]:
    """Every order of a case on a backend against float64 on the CPU, with other values in every run.

    Where a kernel writes, there is NaN before: what it leaves out cannot pass for a result.
    """
    seed = int.from_bytes(os.urandom(4), "little")
    worst: list[dict[str, Any]] = []
    for label, sizes in SIZES.items():
        # Drawn on the CPU, so that both devices have the same values.
        made = case(name, sizes, DTYPES[dtype], CPU, seed)
        there = made.example.each(lambda t: t if _stays(t) else t.to(context.device))
        for order in made.example.operator.orders(backend):
            given = made.example.arguments(order)
            with poisoned_memory():
                found = work(there, order, backend, given)()
            error, tolerance = max(
                errors(made, order, backend, CPU, given, found), key=lambda pair: pair[0] / pair[1]
            )
            worst.append({"heads of": label, "order": order, "error": error, "tolerance": tolerance})
    return {"seed": seed, "green": all(w["error"] <= w["tolerance"] for w in worst), "orders": worst}


def golden(context: Context, file: str, backend: str | None) -> dict[str, Any]:
    """A golden case on the device, as `python -m engine verify` does it."""
    found = verify(load_golden(file), backend, context.device, snapshot_every=1)
    groups = [{"group": c.group, "error": c.error, "tolerance": c.tolerance} for c in found]
    return {"green": all(check.ok for check in found), "groups": groups}


def golden_files() -> list[Path]:
    """The cases in the package, and those of a checkout's tests."""
    checkout = Path(__file__).resolve().parents[1] / "tests" / "golden"
    return [*carried_cases(), *sorted(checkout.glob("*.safetensors"))]


def _stays(t: torch.Tensor) -> bool:
    """A learning rate is on the processor wherever the weights are."""
    return t.dim() == 0


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Within the context torch.empty gives NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(False)
