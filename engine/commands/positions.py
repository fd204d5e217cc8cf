"""Losses by position in the text, as a table and as a picture."""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FORMATS = ("png", "svg", "pdf")
_COLUMNS = 7
_POINTS = 48
_COLORS = ("#0b6e4f", "#c8553d", "#3d5a98", "#d9a21b", "#7a4b94", "#6b7280")

Results = Sequence[Mapping[str, Any]]


def stretches(length: int, columns: int = _COLUMNS) -> list[tuple[int, int]]:
    """Positions in stretches that double, the last one ending at `length`: [(0, n), (n, 2 n), (2 n, 4 n), ...]."""
    ends = [length]
    while len(ends) < columns and ends[0] > 1:
        ends.insert(0, -(-ends[0] // 2))
    return list(zip([0, *ends], ends, strict=False))


def format_positions(results: Results) -> str:
    """A row for every model, the mean over its seeds; beneath it their standard deviation, if there are several."""
    parts = stretches(len(results[0]["nll_by_position"]))
    header = ["model", *(f"{start}-{end}" for start, end in parts), "all"]
    rows = [header]
    for name, group in _by_name(results):
        values = [[_mean(seed, *part) for seed in group] for part in [*parts, (0, None)]]
        rows.append([name, *(f"{statistics.mean(v):.4f}" for v in values)])
        if len(group) > 1:
            rows.append([f"  over {len(group)} seeds, ±", *(f"{statistics.stdev(v):.4f}" for v in values)])
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = [
        "  ".join(
            cell.rjust(width) if column else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(lines)


def check_plot(path: str) -> None:
    """A `ValueError` where a picture could not be written to `path`."""
    if Path(path).suffix[1:] not in FORMATS:
        raise ValueError(f"--plot={path!r}: the name must end in one of .{', .'.join(FORMATS)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs the package matplotlib: pip install '.[plot]'")


def plot_positions(results: Results, path: Path, kind: str) -> None:
    """Writes a picture of loss over position, a line for every model and a band as wide as its seeds differ."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    length = len(results[0]["nll_by_position"])
    step = max(1, length // _POINTS)
    parts = [(start, min(start + step, length)) for start in range(0, length, step)]
    middles = [(start + end) / 2 for start, end in parts]
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for color, (name, group) in zip(_COLORS, _by_name(results), strict=False):
        values = [[_mean(seed, *part) for seed in group] for part in parts]
        axes.plot(middles, [statistics.mean(v) for v in values], color=color, linewidth=2, label=name)
        if len(group) > 1:
            low, high = [min(v) for v in values], [max(v) for v in values]
            axes.fill_between(middles, low, high, color=color, alpha=0.2, linewidth=0)
    windows = sorted({r["window"] for r in results if r["window"] is not None and r["window"] < length})
    for window in windows:
        axes.axvline(window, color="#6b7280", linewidth=1, linestyle=":")
        axes.annotate(" window", (window, 0.97), xycoords=("data", "axes fraction"), color="#6b7280")
    # The first tokens cost far more than all others, which is what every model has in common.
    later = [_mean(seed, *part) for seed in results for part in parts[1:]]
    if later:
        margin = 0.15 * (max(later) - min(later)) + 1e-3
        axes.set_ylim(min(later) - margin, max(later) + margin)
    axes.set(xlabel="position in the text (tokens)", ylabel="loss (nats per token)")
    axes.set_xlim(0, length)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, format=kind, dpi=150)
    pyplot.close(figure)


def _by_name(results: Results) -> list[tuple[str, list[Mapping[str, Any]]]]:
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for result in results:
        groups.setdefault(str(result["model"]), []).append(result)
    return list(groups.items())


def _mean(result: Mapping[str, Any], start: int, end: int | None) -> float:
    return statistics.fmean(result["nll_by_position"][start:end])
