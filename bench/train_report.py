"""What bench/train.py measured, as a person reads it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.report import print_heading
from bench.table import format_table, rate, size, tokens


def print_comparison(runs: Sequence[dict[str, Any]], *, own_was_measured: bool) -> None:
    """Prints the table of `runs` (the objects of the JSON), then the others beside the model's own, if it is there."""
    if not runs:
        return
    print_heading(runs)
    header = ("model", "backend", "window", "s per step", "tokens/s", "GFLOP/s", "of products",
              "extra memory", "whole process", "loss")  # fmt: skip
    print(format_table(header, [_summary(run) for run in runs]))
    first, *others = runs
    if not own_was_measured or not others:
        return
    print()
    print(f"as multiples of {name_of(first)}; by useful operations alone, time would be the last column:")
    print()
    header = ("model", "backend", "time", "extra memory", "useful operations")
    print(format_table(header, [_beside(run, first) for run in others]))


def print_lengths(runs: Sequence[dict[str, Any]]) -> None:
    """Prints time per token and memory of `runs` at several contexts, and both as multiples of the first one's."""
    if not runs:
        return
    print_heading(runs)
    first = runs[0]
    header = ("model", "backend", "context", "us per token", "of first", "extra memory", "of first", "whole process",
              "GFLOP/s", "of products")  # fmt: skip
    rows = [
        (
            name_of(run),
            run["backend"],
            tokens(run["context"]),
            f"{1e6 / run['tokens_per_s']:,.0f}",
            f"{first['tokens_per_s'] / run['tokens_per_s']:.3f}",
            size(run["extra_memory_bytes"]),
            _extra_memory_ratio(run, first, 3),
            size(run["peak_memory_bytes"]),
            rate(run["flops_per_s"]),
            f"{run['share_of_peak']:.0%}",
        )
        for run in runs
    ]
    print(format_table(header, rows))


def name_of(run: dict[str, Any]) -> str:
    """A run's model, and the method by which it gets its gradient if it has a choice."""
    return run["model"] if run["method"] is None else f"{run['model']}, {run['method']}"


def _summary(run: dict[str, Any]) -> tuple[str, ...]:
    return (
        name_of(run),
        run["backend"],
        "full" if run["window"] is None else str(run["window"]),
        f"{min(run['seconds']):.3f}",
        f"{run['tokens_per_s']:,.0f}",
        rate(run["flops_per_s"]),
        f"{run['share_of_peak']:.0%}",
        size(run["extra_memory_bytes"]),
        size(run["peak_memory_bytes"]),
        "not finite" if run["loss"] is None else f"{run['loss']:.4f}",
    )


def _beside(run: dict[str, Any], own: dict[str, Any]) -> tuple[str, ...]:
    return (
        name_of(run),
        run["backend"],
        f"{own['tokens_per_s'] / run['tokens_per_s']:.2f}",
        _extra_memory_ratio(run, own, 2),
        f"{run['flops_per_token'] / own['flops_per_token']:.2f}",
    )


def _extra_memory_ratio(run: dict[str, Any], other: dict[str, Any], digits: int) -> str:
    # A step so small that it fits into pages that the process has anyway needs nothing.
    if other["extra_memory_bytes"] == 0:
        return "-"
    return f"{run['extra_memory_bytes'] / other['extra_memory_bytes']:.{digits}f}"
