"""Time per token against position, drawn with matplotlib (the extra `plot`)."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.files import atomic_write

FORMATS = ("png", "svg", "pdf")
COLORS = {"ttt-e2e": "#0b6e4f", "full-attention": "#c8553d", "sliding-window": "#3d5a98"}


def check_plot(path: str) -> None:
    """A ValueError where a plot could not be written to `path`, known before anything is measured."""
    if Path(path).suffix[1:] not in FORMATS:
        raise ValueError(f"--plot={path!r}: the name must end in one of .{', .'.join(FORMATS)}")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs the package matplotlib: pip install '.[plot]'")


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
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format=Path(path).suffix[1:], dpi=150)
    pyplot.close(figure)
