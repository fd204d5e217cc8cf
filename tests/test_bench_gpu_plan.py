"""bench/gpu.py's plan, and its bars."""

from typing import Any

import pytest

from bench.gpu_bars import BARS
from bench.gpu_cases import names
from bench.gpu_plan import Settings, in_order, plan
from ttt_kernels.registry import OPERATORS


def measured(**fields: Any) -> dict[str, Any]:
    return {"status": "measured"} | fields


def synthetic() -> dict[str, dict[str, Any]]:
    """Every figure just on the better side of its bar."""
    fast = {"attention": "sdpa-cudnn", "style": "kernels"}
    return {
        "ceilings": measured(product_flops_per_s=800e12, copy_bytes_per_s=4e12),
        "prefill 3b 131072 ttt-e2e": measured(flops=2.0 * 440e12, seconds=2.0),
        "prefill 3b 131072 full-attention": measured(seconds=5.0, **fast),
        "prefill 3b 131072 full-attention compiled": measured(seconds=3.8, attention="sdpa-flash", style="compiled"),
        "train 1b 8192 ttt-e2e": measured(seconds=2.2, tokens_per_s=1.0),
        "train 1b 8192 full-attention": measured(seconds=1.0, **fast),
        "train 1b 32768 ttt-e2e 131072": measured(seconds=3.0, tokens_per_s=1.05),
        "train 1b 131072 ttt-e2e": measured(seconds=3.0, tokens_per_s=1.0),
        "train 1b 131072 full-attention": measured(seconds=3.9, **fast),
        "prefill 125m 1048576 long text": measured(late_over_early=1.03, memory_late_over_early=1.01),
        "prefill 125m 32768 ttt-e2e": measured(seconds=1.0),
        "official 125m 32768": measured(seconds=3.0),
        "decode 3b": measured(bytes_per_s=2.8e12),
    }  # fmt: skip


def test_bars_are_met_at_the_bar() -> None:
    verdicts = [bar.verdict(synthetic()) for bar in BARS]
    assert [figure for figure, _ in verdicts] == [
        "55%",
        "1.90x (sdpa-flash, compiled)",
        "2.20x (sdpa-cudnn, kernels)",
        "1.30x (sdpa-cudnn, kernels)",
        "1.050 (1b 1.050)",
        "1.030",
        "1.010",
        "3.00x",
        "70%",
    ]
    assert [words for _, words in verdicts] == ["met", "met", "met, and the stretch", *["met"] * 6]


def test_bars_are_not_met_behind_the_bar() -> None:
    found = synthetic()
    found["ceilings"] = measured(product_flops_per_s=801e12, copy_bytes_per_s=4.01e12)
    found["prefill 3b 131072 full-attention"]["seconds"] = 3.79
    found["train 1b 8192 ttt-e2e"]["seconds"] = 2.61
    found["train 1b 131072 ttt-e2e"] = measured(seconds=3.01, tokens_per_s=0.99)
    # The worst of the models counts.
    found |= {
        f"train 125m {n}": measured(tokens_per_s=1.0) for n in ("32768 ttt-e2e 131072", "131072 ttt-e2e")
    }
    found["prefill 125m 1048576 long text"] = measured(late_over_early=1.031, memory_late_over_early=1.02)
    found["official 125m 32768"]["seconds"] = 2.99
    assert [bar.verdict(found)[1] for bar in BARS] == ["**not met**"] * len(BARS)


def test_a_bar_without_its_figure_says_why() -> None:
    share, over, *_ = (bar.verdict({}) for bar in BARS)
    assert share == over == ("not measured", "prefill 3b 131072 ttt-e2e: not asked for yet")
    found = synthetic()
    found["prefill 3b 131072 ttt-e2e"] = {"status": "failed", "reason": "out of memory"}
    assert BARS[0].verdict(found)[1] == "prefill 3b 131072 ttt-e2e: out of memory"
    # Either of the baselines will do.
    for kind in ("", " compiled"):
        found = synthetic()
        found[f"prefill 3b 131072 full-attention{kind}"] = {"status": "skipped", "reason": "no time left"}
        assert BARS[1].verdict(found)[0].startswith("2.50x" if kind else "1.90x")
    found["prefill 3b 131072 full-attention"] = {"status": "skipped", "reason": "no time left"}
    assert "no time left" in BARS[1].verdict(found)[1]


def test_the_plan_has_everything_that_was_asked_for() -> None:
    keys = {m.key for m in plan(Settings(backends=("triton", "cpu")))}
    for preset in ("125m", "1b", "3b"):
        for length in (8192, 32768, 131072):
            for model in ("ttt-e2e", "full-attention"):
                assert {f"prefill {preset} {length} {model}", f"train {preset} {length} {model}"} <= keys
        assert f"decode {preset}" in keys
        for name in names():
            assert f"operators {preset} {name}" in keys
    for backend in ("triton", "cpu"):
        assert {f"checks golden e2e-base {backend}", "checks golden e2e-base default"} <= keys
        for name in names():
            assert {f"checks {name} {backend} {dtype}" for dtype in ("float32", "bfloat16")} <= keys
    for bar in BARS:
        bar.verdict({})
    assert {k for k in synthetic()} <= keys


def test_a_backend_is_checked_where_it_has_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPERATORS["rope"].kernels, "other", OPERATORS["rope"].kernels["reference"])
    settings = Settings(backends=("triton", "other"), stages=("checks",))
    keys = {m.key for m in plan(settings) if " other" in m.key}
    assert keys == {"checks rope other float32", "checks rope other bfloat16"}
    assert not any("golden" in m.key and "other" in m.key for m in plan(settings))
    alone = Settings(backends=("triton",), stages=("checks",))
    assert not any(m.key.endswith("default") for m in plan(alone))


def test_what_has_bars_comes_first() -> None:
    groups = [g[0].group for g in in_order(plan(Settings(backends=("triton",)))) if not g[0].parallel]
    assert groups[:3] == ["3b", "train 1b", "125m"]
