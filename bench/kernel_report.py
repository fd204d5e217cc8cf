"""What bench/kernels.py measured, as a person reads it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.table import format_table, rate, tokens

HEADER = ("contender", "T", "ms", "median", "GFLOP/s", "of products", "extra MiB", "error")


def add_ratios(rows: Sequence[dict[str, Any]]) -> None:
    """Adds to this library's rows how they compare with the fastest baseline at the same order and length."""
    for row in rows:
        rivals = [r for r in rows if not r["own"] and r["status"] == "measured" and _place(r) == _place(row)]
        if row["own"] and row["status"] == "measured" and rivals:
            best = min(rivals, key=lambda r: r["seconds_best"])
            row["best_baseline"] = best["contender"]
            row["times_faster"] = best["seconds_best"] / row["seconds_best"]
            # Less than a page is not resolved.
            row["times_less_memory"] = best["extra_peak_memory_bytes"] / max(
                row["extra_peak_memory_bytes"], 4096
            )


def print_report(rows: Sequence[dict[str, Any]], title: str) -> None:
    """Prints a block for every order, then ratios, then what was not measured and why."""
    machine = rows[0]["machine"]
    processor = machine.get("gpu", machine["cpu"])
    print(f"\n{processor}, {machine['threads']} threads, {machine['isa']}, torch {machine['torch']}")
    print(f"{title}; matrix products at best: {rate(rows[0]['peak_flops_per_s'])} GFLOP/s")
    for order in dict.fromkeys(row["order"] for row in rows):
        block = [_cells(row) for row in rows if row["order"] == order and row["status"] != "skipped"]
        if block:
            print(f"\n{order}\n\n{format_table(HEADER, block)}")
    ratios = [_ratio(row) for row in rows if "times_faster" in row]
    if ratios:
        header = ("order", "contender", "T", "baseline", "times faster", "times less memory")
        print(f"\nagainst the fastest baseline\n\n{format_table(header, ratios)}")
    skipped = [row for row in rows if row["status"] == "skipped"]
    if skipped:
        print("\nnot measured:")
    for row in skipped:
        print(f"  {row['contender']}, {row['order']}, {tokens(row['length'])}: {row['reason']}")


def _place(row: dict[str, Any]) -> tuple[str, int]:
    return row["order"], row["length"]


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    names = (row["contender"], tokens(row["length"]))
    error = "not finite" if row["error"] is None else f"{row['error']:.1e}"
    if row["status"] == "wrong":
        return (*names, "WRONG", "-", "-", "-", "-", f"{error} > {row['tolerance']:.1e}")
    return (
        *names,
        f"{row['seconds_best'] * 1e3:.2f}",
        f"{row['seconds_median'] * 1e3:.2f}",
        rate(row["flops_per_s"]),
        f"{row['share_of_peak']:.0%}",
        f"{row['extra_peak_memory_bytes'] / 2**20:,.1f}",
        error,
    )


def _ratio(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["order"],
        row["contender"],
        tokens(row["length"]),
        row["best_baseline"],
        f"{row['times_faster']:.2f}",
        f"{row['times_less_memory']:.1f}",
    )
