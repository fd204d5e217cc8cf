"""How fast a model reads one sequence: TTT-E2E beside full attention, and the time per token along a long text."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from bench.flops import prefill_flops_per_token
from bench.gpu_context import Context, Wrong, random_tokens, with_config
from bench.gpu_orders import relative_error
from bench.gpu_transformer import Transformer, fastest_attention
from bench.measure import CHECK_TOKENS, WORST_TOKEN
from bench.memory import PeakMemory, parameter_bytes, release_memory
from bench.timing import timed
from engine import TTTConfig, TTTModel, graphs

MOST_RUNS = 5
LONG_RUN = 2.0
"""Seconds after which one run's time is as good as the median of several."""
PARTS = 64
EARLY, LATE = slice(1, 5), slice(60, 64)
"""Of a long text in 64 parts: those whose times per token are compared (of 1M tokens 16K to 80K, and the last 64K)."""
PASSES = 3
"""Times that the long text is read; of each part's times the median counts, so that no single interruption does."""
WARM_UP = 4
"""Parts that are read before: after so many the engine has recorded all its graphs, windows being full and moved."""


def ttt(context: Context, preset: str, length: int) -> dict[str, Any]:
    """Seconds of reading `length` tokens from nothing."""
    config = TTTConfig.preset(preset, compute_dtype=context.dtype)
    model = context.model(config, context.torch_dtype)
    check = checked(context, model)
    tokens = random_tokens(config, 1, length, context.device)
    state = model.init_state()

    def read() -> Tensor:
        state.reset()
        return model.prefill(tokens, state).nll

    # All of it: the engine records graphs up to the last mini-batch, which is none like those before.
    read()
    release_memory(context.device)
    memory = PeakMemory(context.device, parameter_bytes(model))
    memory.restart()
    nll, seconds = timed_runs(read, context.device)
    return common(config, length, seconds) | {
        "check": check,
        "mean_nll": finite_mean(nll[:, 1:]),
        "peak_memory_bytes": memory.peak_bytes(),
        "state_bytes": state.num_bytes(),
    }


def long_text(context: Context, preset: str, length: int) -> dict[str, Any]:
    """Seconds and memory of each of 64 parts of a long text, read in one go, several times."""
    config = TTTConfig.preset(preset, compute_dtype=context.dtype)
    model = context.model(config, context.torch_dtype)
    check = checked(context, model)
    tokens = random_tokens(config, 1, length, context.device)
    parts = tokens.split(length // PARTS, dim=1)
    state = model.init_state()
    for part in parts[:WARM_UP]:
        model.prefill(part, state)
    passes = [read_parts(model, parts, context.device) for _ in range(PASSES)]
    seconds = [statistics.median(times) for times in zip(*(each for each, _ in passes), strict=True)]
    memories = [max(found) for found in zip(*(each for _, each in passes), strict=True)]
    return {
        "check": check,
        "tokens": length,
        "seconds_by_part": seconds,
        "memory_by_part": memories,
        "tokens_per_s": length / sum(seconds),
        "late_over_early": sum(seconds[LATE]) / sum(seconds[EARLY]),
        "memory_late_over_early": max(memories[LATE]) / max(memories[EARLY]),
        "flops": prefill_flops_per_token(config, length) * length,
        "seconds": sum(seconds),
    }


def read_parts(
    model: TTTModel, parts: Sequence[Tensor], device: torch.device
) -> tuple[list[float], list[int]]:
    """Seconds and the most memory of each part of a text that is read from its beginning; raises Wrong for NaN."""
    state = model.init_state()
    seconds, memories, losses = [], [], []
    for part in parts:
        memory = PeakMemory(device)
        memory.baseline = 0
        memory.restart()
        out, taken = timed(lambda part=part: model.prefill(part, state), device)
        seconds.append(taken)
        memories.append(memory.peak_bytes())
        losses.append(out.nll)
    finite_mean(torch.cat(losses, 1)[:, 1:])
    return seconds, memories


def full_attention(context: Context, preset: str, length: int, style: str = "kernels") -> dict[str, Any]:
    """Seconds until a full-attention Transformer of the same size has the next token's logits."""
    config = TTTConfig.preset(preset, compute_dtype=context.dtype).as_full_attention(length)
    model = context.model(config, context.torch_dtype)
    attention = fastest_attention(model, 1, length, learns=False)
    transformer = Transformer(model, attention, style)
    check = same_logits(context, model, Transformer(model, attention))
    tokens = random_tokens(config, 1, length, context.device)
    weights = transformer.weights()
    release_memory(context.device)
    memory = PeakMemory(context.device, parameter_bytes(model))
    memory.restart()
    warm = transformer.logits(tokens, weights)
    if style != "kernels":
        by_kernels = Transformer(model, attention).logits(tokens, weights)
        error = relative_error(warm.double(), by_kernels.double())
        # Both are off from what is exact.
        if not error <= 2 * check["tolerance"]:
            raise Wrong(
                f"the {style} baseline's logits are off by {error:.1e} from those by this library's kernels"
            )
    peak = memory.peak_bytes()
    logits, seconds = timed_runs(
        replayed(lambda: transformer.logits(tokens, weights), context.device), context.device
    )
    finite_mean(logits)
    # What TTT-E2E's reading gives besides, every token's loss, is not computed here.
    spared = 2 * config.hidden_size * config.vocab_size * (length - 1)
    found = common(config, length, seconds)
    return found | {
        "flops": found["flops"] - spared,
        "check": check,
        "attention": attention.name,
        "attention_seconds": attention.seconds,
        "style": style,
        "peak_memory_bytes": peak,
    }


def replayed(work: Callable[[], Tensor], device: torch.device) -> Callable[[], Tensor]:
    """Warm work as a CUDA graph, without the launches' own time, as the engine has it; as it is where none can be."""
    if not graphs.available(device):
        return work
    found: list[Tensor] = []
    try:
        replay = graphs.lanes(device).main.record(lambda: found.append(work()))
    except RuntimeError:
        # Something that cannot be recorded, or too little memory for both.
        return work

    def run() -> Tensor:
        replay()
        return found[0]

    return run


def common(config: TTTConfig, length: int, seconds: list[float]) -> dict[str, Any]:
    """What results of both models have."""
    median = statistics.median(seconds)
    return {
        "tokens": length,
        "seconds": median,
        "runs": seconds,
        "tokens_per_s": length / median,
        "flops": prefill_flops_per_token(config, length) * length,
    }


def timed_runs(work: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, list[float]]:
    """The result and the seconds of each of several runs of work that is warm; of one where that takes long."""
    times: list[float] = []
    while len(times) < MOST_RUNS and sum(times) < LONG_RUN:
        result, taken = timed(work, device)
        times.append(taken)
    return result, times


def checked(context: Context, model: TTTModel) -> dict[str, float]:
    """How far the losses of the first tokens are from those of the formulas; once for each model.

    Raises Wrong where that is too far.
    """
    if model.config not in context.checked:
        error, tolerance = reading_error(context, model)
        if not error <= tolerance:
            raise Wrong(
                f"a token's loss is off by {error:.1e} from the reference formulas, at most {tolerance:.1e}"
            )
        context.checked[model.config] = {"error": error, "tolerance": tolerance}
    return context.checked[model.config]


def reading_error(context: Context, model: TTTModel) -> tuple[float, float]:
    """Error and tolerance of the losses of two mini-batches and a piece, with a window that moves within them.

    They are read as one and in two calls, as a text and its continuation are, and both a second time: where the engine
    replays what it has recorded. The tolerance is a small multiple of the error of the formulas at the same dtype.
    """
    config = model.config
    size = config.mini_batch_size
    window = None if config.window is None else min(config.window, max(1, size // 2))
    tokens = random_tokens(config, 1, max(CHECK_TOKENS, 2 * size + size // 4), context.device)

    def losses(dtype: str, backend: str | None, *ways: list[Tensor]) -> list[Tensor]:
        other = with_config(model, replace(config, window=window, compute_dtype=dtype))
        found = []
        for parts in ways:
            state = other.init_state()
            nll = torch.cat([other.prefill(part, state, backend=backend).nll for part in parts], 1)
            found.append(nll[:, 1:].double())
        return found

    own, wide = config.compute_dtype, "float64" if config.compute_dtype in WORST_TOKEN else "float32"
    once, twice = [tokens], [tokens[:, : 2 * size], tokens[:, 2 * size :]]
    (exact,) = losses(wide, "reference", once)
    release_memory(context.device)
    (plain,) = losses(own, "reference", once)
    release_memory(context.device)
    found = losses(own, None, once, twice, once, twice)
    release_memory(context.device)

    def off(nll: Tensor) -> float:
        # Of the worst token, or of the mean over tokens where products are rounder.
        differences = (nll - exact).abs()
        return float(differences.max() if own in WORST_TOKEN else differences.mean())

    # What rounding a loss to float32, its dtype, may be.
    rounding = torch.finfo(torch.float32).eps * float(exact.abs().max())
    # torch's maximum is NaN where one is.
    worst = torch.tensor([off(nll) for nll in found], dtype=torch.float64).max()
    return float(worst), SLACK * off(plain) + rounding


SLACK = 3.0


def same_logits(context: Context, model: TTTModel, transformer: Transformer) -> dict[str, float]:
    """How far the baseline's logits are from the engine's by the reference formulas; once for each model.

    Raises Wrong where that is too far.
    """
    config = model.config
    key = ("logits", replace(config, rope_theta=1.0), transformer.attention.name)
    if key in context.checked:
        return context.checked[key]
    tokens = random_tokens(config, 1, CHECK_TOKENS, context.device)
    found = transformer.logits(tokens, transformer.weights()).double()
    exact, plain = (_by_formulas(model, dtype, tokens) for dtype in ("float64", config.compute_dtype))
    error = relative_error(found, exact)
    tolerance = SLACK * relative_error(plain, exact) + torch.finfo(config.torch_dtype).eps
    if not error <= tolerance:
        raise Wrong(f"the baseline's logits are off by {error:.1e}, at most {tolerance:.1e}")
    context.checked[key] = {"error": error, "tolerance": tolerance}
    return context.checked[key]


def _by_formulas(model: TTTModel, dtype: str, tokens: Tensor) -> Tensor:
    other = with_config(model, replace(model.config, compute_dtype=dtype))
    return other.prefill(tokens, other.init_state(), backend="reference").logits.double()


def finite_mean(values: Tensor) -> float:
    """The mean; raises Wrong where it is not finite."""
    mean = float(values.double().mean())
    if not math.isfinite(mean):
        raise Wrong("results are not finite")
    return mean
