"""Pictures of what was measured, drawn with matplotlib (the extra `plot`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.table import tokens
from engine.files import atomic_write

COLORS = {"ttt-e2e": "#0b6e4f", "full-attention": "#c8553d", "sliding-window": "#3d5a98"}

CONTENDER_COLORS = ("#0b6e4f", "#c8553d", "#3d5a98", "#d9a21b", "#7a4b94", "#6b7280")
ORDER_STYLES = ("-", "--", ":", "-.")


def plot_positions(runs: Sequence[Mapping[str, Any]], path: str, title: str) -> None:
    """Writes a picture of microseconds per token over the position in the text, a line for every run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for run in runs:
        ends, times = run["position"], run["seconds_per_token_by_position"]
        axes.plot(
            [0, *ends],
            [times[0] * 1e6, *(t * 1e6 for t in times)],
            drawstyle="steps-pre",
            color=COLORS[str(run["model"])],
            linestyle="--" if run["backend"] == "reference" else "-",
            linewidth=2,
            label=f"{run['model']}, backend {run['backend']}",
        )
    axes.set(xlabel="position in the text (tokens)", ylabel="time per token (µs)", title=title)
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    save(figure, path)


def plot_lengths(rows: Sequence[Mapping[str, Any]], path: str, title: str, column: str) -> None:
    """Writes a picture of time and of memory over length: a color per contender, a line style per order."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    measured = [row for row in rows if row["status"] == "measured"]
    contenders = list(dict.fromkeys(row["contender"] for row in measured))
    orders = list(dict.fromkeys(row["order"] for row in measured))
    colors = dict(zip(contenders, CONTENDER_COLORS * len(contenders), strict=False))
    styles = dict(zip(orders, ORDER_STYLES * len(orders), strict=False))
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 5.2), layout="constrained")
    for contender in contenders:
        for order in orders:
            line = [r for r in measured if r["contender"] == contender and r["order"] == order]
            lengths = [row["length"] for row in line]
            look = {"color": colors[contender], "linestyle": styles[order], "marker": "o", "markersize": 4}
            panels[0].plot(lengths, [row["seconds_best"] * 1e3 for row in line], **look)
            # Less than a page is not resolved, and a logarithm has no zero.
            memory = [max(row["extra_peak_memory_bytes"], 4096) / 2**20 for row in line]
            panels[1].plot(lengths, memory, **look)
    ticks = sorted({row["length"] for row in measured})
    for axes, label in zip(panels, ("time (ms)", "extra peak memory (MiB)"), strict=True):
        axes.set(
            xlabel=f"length {column}" if column == "T" else column, ylabel=label, xscale="log", yscale="log"
        )
        axes.set_xticks(ticks, [tokens(tick) for tick in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    handles = [Line2D([], [], color=colors[name], label=name, linewidth=2) for name in contenders]
    handles += [Line2D([], [], color="black", linestyle=styles[name], label=name) for name in orders]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(title, fontsize="medium")
    save(figure, path)


def save(figure: Any, path: str) -> None:
    """Writes a figure, whole or not at all, and lets it go."""
    from matplotlib import pyplot

    with atomic_write(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix[1:], dpi=150)
    pyplot.close(figure)
