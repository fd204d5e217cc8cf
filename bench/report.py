"""What bench/prefill.py measured, as a person reads it, and the heading that it shares with bench/train.py."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bench.table import format_table, rate, size, tokens

POSITION_COLUMNS = 8


def print_report(runs: Sequence[dict[str, Any]]) -> None:
    """Prints the table of `runs` (the objects of the JSON), then time per token against position."""
    if not runs:
        return
    print_heading(runs)
    header = ("model", "backend", "window", "tokens/s", "GFLOP/s", "of products", "peak memory", "mean loss")
    print(format_table(header, [_summary(run) for run in runs]))
    print()
    print("microseconds per token, by position in the text (up to):")
    print()
    print(_positions(runs))


def print_heading(runs: Sequence[dict[str, Any]]) -> None:
    """Prints on what machine, of what model and of what text the runs are."""
    first = runs[0]
    machine = first["machine"]
    print()
    processor = machine.get("gpu", machine["cpu"])
    print(f"{processor}, {machine['threads']} threads, {machine['isa']}, torch {machine['torch']}")
    contexts = ", ".join(dict.fromkeys(tokens(run["context"]) for run in runs))
    print(
        f"{first['preset']}, {first['dtype']}, {first['batch']} x {contexts} tokens of "
        f"{first['text']} ({first['tokenizer']}), mini-batch {first['mini_batch']}, random weights"
    )
    print(f"matrix products at best: {rate(first['peak_flops_per_s'])} GFLOP/s")
    print()


def _summary(run: dict[str, Any]) -> tuple[str, ...]:
    return (
        run["model"],
        run["backend"],
        "full" if run["window"] is None else str(run["window"]),
        f"{run['tokens_per_s']:,.0f}",
        rate(run["flops_per_s"]),
        f"{run['share_of_peak']:.0%}",
        size(run["peak_memory_bytes"]),
        "not finite" if run["mean_nll"] is None else f"{run['mean_nll']:.4f}",
    )


def _positions(runs: Sequence[dict[str, Any]]) -> str:
    """A row for every run; neighbouring pieces together, so that the columns fit a screen."""
    ends = runs[0]["position"]
    step = -(-len(ends) // POSITION_COLUMNS)
    groups = [range(start, min(start + step, len(ends))) for start in range(0, len(ends), step)]
    lengths = [end - begin for begin, end in zip([0, *ends], ends, strict=False)]
    flatness = _eighth_and_half(ends)
    header = ["model", "backend", *(tokens(ends[group[-1]]) for group in groups)]
    if flatness:
        header.append("last half / second eighth")
    rows = []
    for run in runs:
        times = [t * n for t, n in zip(run["seconds_per_token_by_position"], lengths, strict=True)]

        def mean(group: range, times: list[float] = times) -> float:
            return sum(times[i] for i in group) / sum(lengths[i] for i in group)

        cells = [run["model"], run["backend"], *(f"{mean(group) * 1e6:.0f}" for group in groups)]
        if flatness:
            eighth, half = flatness
            cells.append(f"{mean(half) / mean(eighth):.2f}")
        rows.append(cells)
    return format_table(header, rows)


def _eighth_and_half(ends: Sequence[int]) -> tuple[range, range] | None:
    """Which pieces are the second eighth and the last half; None where no pieces end there."""
    context = ends[-1]
    marks = [context / 8, context / 4, context / 2]
    if any(mark not in ends for mark in marks):
        return None
    eighth, quarter, half = (list(ends).index(int(mark)) + 1 for mark in marks)
    return range(eighth, quarter), range(half, len(ends))
