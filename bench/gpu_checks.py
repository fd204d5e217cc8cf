"""Correctness on the device, before anything is timed: every order of every operator, and the golden cases."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from bench.gpu_cases import Sizes, case
from bench.gpu_context import Context
from bench.gpu_orders import Truth, work
from engine.config import DTYPES
from engine.golden import carried_cases, load_golden
from engine.verify import verify
from ttt_kernels import tuning

CPU = torch.device("cpu")
# Heads of 64 and of 80, the published widths; enough tokens that loops over tiles come to their middle, where loads run
# ahead and nothing is masked; sizes that fill tiles, and sizes that do not.
SIZES = {
    "64": Sizes(2, 300, 900, 384, 528, 6, 64, 1024, 2),
    "80": Sizes(1, 333, 700, 160, 272, 2, 80, 307, 1),
}
REPEAT = 3
"""Runs of each configuration, whose results are the same to the bit: what differs is a race."""
CHECKED_DTYPES = ("float32", "bfloat16")


def operator(context: Context, name: str, backend: str, dtype: str) -> dict[str, Any]:
    """Every order of a case on a backend against float64 on the CPU, with other values in every run.

    Kernels that have several configurations run with each. Where one writes, there is NaN before: what it leaves out
    cannot pass for a result.
    """
    seed = int.from_bytes(os.urandom(4), "little")
    worst: list[dict[str, Any]] = []
    for label, sizes in SIZES.items():
        # Drawn on the CPU, so that both devices have the same values.
        made = case(name, sizes, DTYPES[dtype], CPU, seed)
        there = made.example.each(lambda t: t if _stays(t) else t.to(context.device))
        for order in made.example.operator.orders(backend):
            given = made.example.arguments(order)
            truth, run = Truth(made, order, CPU, given), work(there, order, backend, given)
            for index in itertools.count():
                with poisoned_memory(), configuration(index) as known:
                    found = run()
                    again = [run() for _ in range(REPEAT - 1)]
                error, tolerance = truth.error(found)
                same = all(map(same_bits, itertools.chain(*again), found * len(again)))
                worst.append(
                    {
                        "heads of": label, "order": order, "configuration": index, "error": error,
                        "tolerance": tolerance, "repeats": same,
                    }
                )  # fmt: skip
                if index + 1 >= known[0]:
                    break
    green = all(w["error"] <= w["tolerance"] and w["repeats"] for w in worst)
    return {"seed": seed, "green": green, "orders": worst}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors hold the same; NaN is NaN's equal."""
    return bool(((a == b) | ((a != a) & (b != b))).all())


@contextmanager
def configuration(index: int) -> Iterator[list[int]]:
    """Within the context every kernel runs in its configuration `index`, or its last; gives how many one has."""
    most = [1]

    def chosen(name: str, key: Sequence[object], options: Sequence[Any], trial: Callable[[Any], Any]) -> Any:
        most[0] = max(most[0], len(options))
        return options[min(index, len(options) - 1)]

    usual, tuning.best = tuning.best, chosen
    try:
        yield most
    finally:
        tuning.best = usual


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
