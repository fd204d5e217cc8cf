"""Pictures of what bench/gpu.py measured, drawn with matplotlib (the extra `plot`)."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

from bench.gpu_bars import NotMeasured, baseline, found
from bench.plot import COLORS, save
from bench.table import tokens as in_words

Results = Mapping[str, Mapping[str, Any]]
STYLES = {"125m": ":", "1b": "--", "3b": "-"}
MODELS = ("ttt-e2e", "full-attention")


def plot_all(folder: Path, results: Results) -> list[Path]:
    """Writes the pictures of which there is anything to see; returns their files."""
    pictures = {"prefill.png": _prefill, "train.png": _train, "long-text.png": _long_text}
    return [folder / name for name, draw in pictures.items() if draw(results, str(folder / name))]


def _figure() -> tuple[Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3)
    return figure, axes


def _by_length(axes: Any, lengths: set[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(lengths), [in_words(n) for n in sorted(lengths)])
    axes.minorticks_off()
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))


def _places(results: Results, stage: str) -> list[tuple[str, int]]:
    """Presets and lengths of which anything of a stage was measured, in order."""
    words = (name.split(" ") for name, result in results.items() if result["status"] == "measured")
    places = {(w[1], int(w[2])) for w in words if w[0] == stage and w[3] in MODELS}
    return sorted(places, key=lambda place: (place[0], place[1]))


def _line(results: Results, stage: str, preset: str, model: str, value: str) -> dict[int, float]:
    """A value by length, of the fastest baseline where the model is one."""
    line = {}
    for name, length in _places(results, stage):
        if name != preset:
            continue
        try:
            line[length] = (
                found(results, stage, preset, length, model)
                if model == "ttt-e2e"
                else baseline(results, stage, preset, length)
            )[value]
        except NotMeasured:
            continue
    return line


def _presets(results: Results, stage: str) -> list[str]:
    return list(dict.fromkeys(preset for preset, _ in _places(results, stage)))


def _prefill(results: Results, path: str) -> bool:
    """Tokens per second against length."""
    figure, axes = _figure()
    lengths: set[int] = set()
    for preset in _presets(results, "prefill"):
        for model in MODELS:
            line = _line(results, "prefill", preset, model, "tokens_per_s")
            lengths |= set(line)
            style = STYLES.get(preset, "-")
            look = {"color": COLORS[model], "linestyle": style, "marker": "o", "markersize": 4}
            if line:
                axes.plot(list(line), list(line.values()), label=f"{preset}, {model}", **look)
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    # Of models of very different sizes.
    axes.set(xlabel="tokens read", ylabel="tokens per second", title="Reading", yscale="log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    return _saved(figure, axes, lengths, path)


def _train(results: Results, path: str) -> bool:
    """A TTT-E2E step's time as a share of full attention's, against length."""
    figure, axes = _figure()
    lengths: set[int] = set()
    for preset in _presets(results, "train"):
        own, other = (_line(results, "train", preset, model, "seconds") for model in MODELS)
        ratios = {n: own[n] / other[n] for n in own if n in other}
        lengths |= set(ratios)
        look = {
            "color": COLORS["ttt-e2e"],
            "linestyle": STYLES.get(preset, "-"),
            "marker": "o",
            "markersize": 4,
        }
        if ratios:
            axes.plot(list(ratios), list(ratios.values()), label=f"{preset}, ttt-e2e", **look)
    axes.axhline(1.0, color=COLORS["full-attention"], label="full-attention")
    axes.set(
        xlabel="tokens of a sequence", ylabel="time of a step, full attention's = 1", title="Training step"
    )
    axes.set_ylim(bottom=0)
    return _saved(figure, axes, lengths, path)


def _long_text(results: Results, path: str) -> bool:
    """Time per token against position in one long text."""
    runs = [r for name, r in results.items() if name.endswith("long text") and r["status"] == "measured"]
    if not runs:
        return False
    figure, axes = _figure()
    times = runs[0]["seconds_by_part"]
    part = runs[0]["tokens"] // len(times)
    ends = list(accumulate([part] * len(times)))
    each = [t / part * 1e6 for t in times]
    axes.plot([0, *ends], [each[0], *each], drawstyle="steps-pre", color=COLORS["ttt-e2e"], linewidth=2)
    axes.set(
        xlabel="position in the text (tokens)", ylabel="time per token (µs)", title="Reading one long text"
    )
    quarters = [runs[0]["tokens"] // 4 * i for i in range(5)]
    axes.set_xticks(quarters, [in_words(n) for n in quarters])
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    save(figure, path)
    return True


def _saved(figure: Any, axes: Any, lengths: set[int], path: str) -> bool:
    from matplotlib import pyplot

    if not lengths:
        pyplot.close(figure)
        return False
    _by_length(axes, lengths)
    save(figure, path)
    return True
