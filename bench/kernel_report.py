"""What bench/kernels.py measured, as a person reads it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.kernel_ceiling import Ceiling
from bench.table import format_table, rate, tokens


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


def print_report(rows: Sequence[dict[str, Any]], title: str, ceiling: Ceiling, column: str) -> None:
    """Prints a block for every order, then ratios, then what was not measured and why."""
    machine = rows[0]["machine"]
    processor = machine.get("gpu", machine["cpu"])
    print(f"\n{processor}, {machine['threads']} threads, {machine['isa']}, torch {machine['torch']}")
    print(f"{title}; {ceiling.words} at best: {rate(rows[0][ceiling.key])} {ceiling.rate}")
    # Only where an operator's bar is memory beyond its results.
    beyond = any("extra_beyond_outputs_bytes" in row for row in rows)
    header = ("contender", column, "ms", "median", ceiling.rate, ceiling.heading, "extra MiB")
    header += (("beyond outputs",) if beyond else ()) + ("error",)
    for order in dict.fromkeys(row["order"] for row in rows):
        block = [
            _cells(row, ceiling, beyond)
            for row in rows
            if row["order"] == order and row["status"] != "skipped"
        ]
        if block:
            print(f"\n{order}\n\n{format_table(header, block)}")
    ratios = [_ratio(row) for row in rows if "times_faster" in row]
    if ratios:
        header = ("order", "contender", column, "baseline", "times faster", "times less memory")
        print(f"\nagainst the fastest baseline\n\n{format_table(header, ratios)}")
    skipped = [row for row in rows if row["status"] == "skipped"]
    if skipped:
        print("\nnot measured:")
    for row in skipped:
        print(f"  {row['contender']}, {row['order']}, {tokens(row['length'])}: {row['reason']}")


def _place(row: dict[str, Any]) -> tuple[str, int]:
    return row["order"], row["length"]


def _cells(row: dict[str, Any], ceiling: Ceiling, beyond: bool) -> tuple[str, ...]:
    names = (row["contender"], tokens(row["length"]))
    error = "not finite" if row["error"] is None else f"{row['error']:.1e}"
    memory = ("extra_peak_memory_bytes", "extra_beyond_outputs_bytes")[: 1 + beyond]
    if row["status"] == "wrong":
        return (*names, "WRONG", "-", "-", "-", *("-" for _ in memory), f"{error} > {row['tolerance']:.1e}")
    return (
        *names,
        f"{row['seconds_best'] * 1e3:.2f}",
        f"{row['seconds_median'] * 1e3:.2f}",
        rate(row[f"{ceiling.unit}_per_s"]),
        f"{row[ceiling.share]:.0%}",
        *(f"{row[key] / 2**20:,.1f}" for key in memory),
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
