"""What bench/gpu.py is to find: bars that were set before, beside what was published and what was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bench.gpu_plan import key

Results = Mapping[str, Mapping[str, Any]]
MEMORY_GROWTH = 1.01
"""Memory that is within a hundredth of what it was is flat."""


class NotMeasured(Exception):
    """What a figure needs is not there, and why."""


@dataclass(frozen=True)
class Bar:
    """A figure, and what it is to be.

    most: whether the figure is to be at most `bar`, or else at least. unit: how it is written, as in `{:.2f}x`.
    figure: of results; raises NotMeasured. note: of results, what stands beside it.
    """

    what: str
    published: str
    bar: float
    stretch: float | None
    most: bool
    unit: str
    figure: Callable[[Results], float]
    note: Callable[[Results], str] | None = None

    def holds(self, value: float, bar: float) -> bool:
        """Whether a figure is where it is to be."""
        return value <= bar if self.most else value >= bar

    def words(self) -> str:
        """The bar as a person reads it."""
        text = f"at {'most' if self.most else 'least'} {self.unit.format(self.bar)}"
        return text if self.stretch is None else f"{text}, {self.unit.format(self.stretch)} as stretch"

    def verdict(self, results: Results) -> tuple[str, str]:
        """The figure and what it means: met, met with stretch, not met, or not measured and why."""
        try:
            value = self.figure(results)
        except NotMeasured as error:
            return "not measured", str(error)
        text = self.unit.format(value)
        if self.note is not None:
            text += f" ({self.note(results)})"
        if not self.holds(value, self.bar):
            return text, "**not met**"
        if self.stretch is not None and self.holds(value, self.stretch):
            return text, "met, and the stretch"
        return text, "met"


def found(results: Results, *parts: object) -> Mapping[str, Any]:
    """A measured result; raises NotMeasured."""
    name = key(*map(str, parts))
    result = results.get(name)
    if result is None:
        raise NotMeasured(f"{name}: not asked for yet")
    if result["status"] != "measured":
        raise NotMeasured(f"{name}: {result.get('reason', result['status'])}")
    return result


def baseline(results: Results, stage: str, preset: str, length: int) -> Mapping[str, Any]:
    """The faster of the full-attention baselines that were measured."""
    try:
        best = found(results, stage, preset, length, "full-attention")
    except NotMeasured:
        return found(results, stage, preset, length, "full-attention", "compiled")
    try:
        other = found(results, stage, preset, length, "full-attention", "compiled")
    except NotMeasured:
        return best
    return min(best, other, key=lambda result: result["seconds"])


def _share(results: Results) -> float:
    run = found(results, "prefill", "3b", 131072, "ttt-e2e")
    return float(run["flops"] / run["seconds"] / found(results, "ceilings")["product_flops_per_s"])


def _reading(results: Results) -> float:
    own = found(results, "prefill", "3b", 131072, "ttt-e2e")
    return float(baseline(results, "prefill", "3b", 131072)["seconds"] / own["seconds"])


def _fused(stage: str, preset: str, length: int) -> Callable[[Results], str]:
    def note(results: Results) -> str:
        other = baseline(results, stage, preset, length)
        return f"{other['attention']}, {other['style']}"

    return note


def _slower(results: Results) -> float:
    own = found(results, "train", "1b", 8192, "ttt-e2e")
    return float(own["seconds"] / baseline(results, "train", "1b", 8192)["seconds"])


def _faster(results: Results) -> float:
    own = found(results, "train", "1b", 131072, "ttt-e2e")
    return float(baseline(results, "train", "1b", 131072)["seconds"] / own["seconds"])


def _growth(results: Results) -> dict[str, float]:
    """Of a token's training time from 32K to 128K, a sequence at a time, for models of which both were measured."""
    ratios = {}
    missing = None
    for preset in ("125m", "1b", "3b"):
        try:
            short = found(results, "train", preset, 32768, "ttt-e2e", 131072)
            long = found(results, "train", preset, 131072, "ttt-e2e")
        except NotMeasured as error:
            missing = missing or error
            continue
        ratios[preset] = short["tokens_per_s"] / long["tokens_per_s"]
    if not ratios:
        raise missing or NotMeasured("no model")
    return ratios


def _long(results: Results) -> Mapping[str, Any]:
    return found(results, "prefill", "125m", 2**20, "long text")


def _official(results: Results) -> float:
    own = found(results, "prefill", "125m", 32768, "ttt-e2e")
    return float(found(results, "official", "125m", 32768)["seconds"] / own["seconds"])


def _writing(results: Results) -> float:
    return float(
        found(results, "decode", "3b")["bytes_per_s"] / found(results, "ceilings")["copy_bytes_per_s"]
    )


BARS = (
    Bar("prefill, 3b, 128K, share of the measured bf16 product rate", "", 0.55, None, False, "{:.0%}", _share),
    Bar(
        "prefill, 3b, 128K, over full attention with the best fused kernel", "2.7x (H100)", 1.9, 2.7, False,
        "{:.2f}x", _reading, _fused("prefill", "3b", 131072),
    ),
    Bar(
        "training step, 1b, 8K, times full attention's (128K tokens a batch)", "3.4x slower", 2.6, 2.2, True,
        "{:.2f}x", _slower, _fused("train", "1b", 8192),
    ),
    Bar(
        "training step, 1b, 128K, over full attention", "1.2x faster", 1.3, 1.6, False, "{:.2f}x", _faster,
        _fused("train", "1b", 131072),
    ),
    Bar(
        "training cost per token, 128K over 32K, one sequence at a time", "grows", 1.05, None, True, "{:.3f}",
        lambda results: max(_growth(results).values()),
        lambda results: ", ".join(f"{name} {ratio:.3f}" for name, ratio in _growth(results).items()),
    ),
    Bar(
        "prefill time per token, the last 64K of 1M over tokens 16K to 80K", "", 1.03, None, True, "{:.3f}",
        lambda results: float(_long(results)["late_over_early"]),
    ),
    Bar(
        "prefill memory, the last 64K of 1M over tokens 16K to 80K", "", MEMORY_GROWTH, None, True, "{:.3f}",
        lambda results: float(_long(results)["memory_late_over_early"]),
    ),
    Bar("prefill, 125m, 32K, over the official JAX code", "", 3.0, None, False, "{:.2f}x", _official),
    Bar("decode, 3b, batch 1, share of copy bandwidth", "", 0.7, None, False, "{:.0%}", _writing),
)  # fmt: skip
