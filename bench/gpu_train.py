"""How long a training step takes: a loss and every gradient of so many tokens, TTT-E2E beside full attention."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench import train_child
from bench.flops import training_flops_per_token
from bench.gpu_context import Context, Wrong, random_model, random_tokens
from bench.gpu_prefill import reading_error
from bench.gpu_transformer import Transformer, fastest_attention
from bench.memory import PeakMemory, parameter_bytes, release_memory
from bench.timing import timed
from engine import TTTConfig, TTTModel
from engine.device import available_bytes

SHARE_OF_MEMORY = 0.7
MOST_SECONDS = 12.0
"""After so many no further micro-batch is begun; the batch's time is then counted from those that were measured."""

ENOUGH = 4
"""Sequences at a time that have products large enough: rather than fewer, more is computed again."""

LARGE = 2e9
"""Parameters of a model whose gradients are checked with one sequence."""

SAME_LOSS = 0.01
"""Two ways to compute a loss in 16 bits may differ by such a part of it."""

Loss = Callable[[Tensor], Tensor]
"""Of tokens (B, T + 1)."""
WarmUp = Callable[[Tensor], object]
"""Of the tokens of a micro-batch: brings in all code that a step needs."""


def ttt(
    context: Context, preset: str, length: int, tokens_per_batch: int, as_of: int | None = None
) -> dict[str, Any]:
    """A step of TTT-E2E by the engine's default method: of the blocks before the fast ones nothing computed again where
    ENOUGH sequences fit, else all.

    With `as_of`: one sequence at a time, and as much computed again as with sequences of that length.
    """
    config = TTTConfig.preset(preset, compute_dtype=context.dtype)
    check = checked(context, config, engine_loss, partial(engine_loss, recompute=False))
    model = context.model(config, _stored(config))
    enough = min(ENOUGH, max(1, tokens_per_batch // (as_of or length)))

    def measure(recompute: bool) -> dict[str, Any]:
        loss = engine_loss(model, recompute=recompute)

        def warm_up(part: Tensor) -> None:
            # As long as the engine needs to record its graphs: until a mini-batch sees a whole window.
            own, window = config.mini_batch_size, config.window or 0
            short = (-(-window // own) + 2) * own + 1
            _backward(loss, part[:, :short])

        needed = math.inf if as_of else ttt_bytes(config, length, recompute=recompute)
        least = 1 if recompute else enough
        found = step(context, model, loss, length, tokens_per_batch, needed, warm_up, least)
        return found | {
            "recompute": "all before fast weights" if recompute else "nothing before fast weights"
        }

    found = sparing(context, model, enough * ttt_bytes(config, as_of or length, recompute=False), measure)
    return found | {"check": check, "flops": training_flops_per_token(config, length) * found["tokens"]}


def full_attention(
    context: Context, preset: str, length: int, tokens_per_batch: int, style: str = "kernels"
) -> dict[str, Any]:
    """A step of a full-attention Transformer: nothing computed again where it fits, else all but attention."""
    config = TTTConfig.preset(preset, compute_dtype=context.dtype).as_full_attention(length)

    def loss(model: TTTModel, recompute: bool = True) -> Loss:
        attention = fastest_attention(model, 1, min(length, model.config.mini_batch_size), learns=True)
        return lambda tokens: Transformer(model, attention).loss(tokens, recompute=recompute)

    check = checked(context, config, loss, partial(loss, recompute=False))
    model = context.model(config, _stored(config))
    attention = fastest_attention(model, 1, length, learns=True)

    def measure(recompute: bool) -> dict[str, Any]:
        transformer = Transformer(model, attention, style)
        needed = full_attention_bytes(config, length, recompute=recompute)
        by = partial(transformer.loss, recompute=recompute)
        by_kernels = partial(Transformer(model, attention).loss, recompute=True)
        if style == "kernels":
            # One block and the head: what torch and Triton choose for so many tokens, they choose by those.
            warm_up: WarmUp = partial(_backward, partial(by, blocks=1))
        else:
            warm_up = partial(_same, by, by_kernels)
        found = step(context, model, by, length, tokens_per_batch, needed, warm_up)
        return found | {"recompute": "all but attention" if recompute else "nothing"}

    found = sparing(context, model, full_attention_bytes(config, length, recompute=False), measure)
    return found | {
        "check": check,
        "flops": training_flops_per_token(config, length) * found["tokens"],
        "attention": attention.name,
        "attention_seconds": attention.seconds,
        "style": style,
    }


def compile_models(context: Context, preset: str) -> dict[str, Any]:
    """Reads and learns by a model as wide as the preset's but of few blocks, for kernels that calls of single operators
    do not compile: each leaves out other arguments and results.
    """
    config = TTTConfig.preset(preset, compute_dtype=context.dtype)
    size = config.mini_batch_size
    # Keys of earlier tokens grow to a window's worth, one less than a multiple of a tile.
    config = replace(config, num_layers=3, suffix_layers=2, window=2 * size)
    reading_error(context, random_model(config, context.torch_dtype, context.device))
    ways = engine_loss, partial(engine_loss, recompute=False)
    gradient_error(context, config, *ways)
    model = random_model(config, _stored(config), context.device)
    for way in ways:
        _backward(way(model), random_tokens(config, 1, 4 * size + 1, context.device))
    return {}


def sparing(
    context: Context, model: TTTModel, needed: float, measure: Callable[[bool], dict[str, Any]]
) -> dict[str, Any]:
    """What is measured with nothing computed again where `needed` bytes are free and prove enough; else with."""
    release_memory(context.device)
    if needed <= SHARE_OF_MEMORY * _free(context, model):
        with suppress(torch.OutOfMemoryError):
            return measure(False)
    return measure(True)


def step(
    context: Context,
    model: TTTModel,
    loss: Loss,
    length: int,
    tokens_per_batch: int,
    sequence_bytes: float,
    warm_up: WarmUp,
    least: int = 1,
) -> dict[str, Any]:
    """Seconds of a batch by accumulation of micro-batches, as many sequences each as fit by `sequence_bytes`.

    Raises torch.OutOfMemoryError where not even `least` of them do.
    """
    device = context.device
    sequences = max(1, tokens_per_batch // length)
    tokens = random_tokens(model.config, sequences, length + 1, device)
    model.zero_grad()
    release_memory(device)
    room = SHARE_OF_MEMORY * _free(context, model)
    size = max(
        n for n in range(1, sequences + 1) if sequences % n == 0 and (n == 1 or n * sequence_bytes <= room)
    )
    while True:
        try:
            times, peak = _accumulate(model, loss, tokens, size, device, warm_up)
            break
        except torch.OutOfMemoryError:
            if size <= least:
                raise
        # Not before the error is gone, whose traceback holds what did not fit.
        size = next(n for n in range(size - 1, 0, -1) if sequences % n == 0)
        release_memory(device)
    count = sequences // size
    # The first one of several finds memory for those after it.
    counted = times[1:] or times
    seconds = sum(counted) / len(counted) * count
    model.zero_grad()
    return {
        "seconds": seconds,
        "tokens": sequences * length,
        "sequences": sequences,
        "micro_batch": size,
        "micro_batches_measured": len(counted),
        "micro_batches": count,
        "runs": times,
        "tokens_per_s": sequences * length / seconds,
        "extra_memory_bytes": peak,
    }


def _accumulate(
    model: TTTModel, loss: Loss, tokens: Tensor, size: int, device: torch.device, warm_up: WarmUp
) -> tuple[list[float], int]:
    """Seconds of micro-batches, one after the other, and the most memory beside parameters and gradients."""
    micro = tokens.split(size)

    def one(part: Tensor) -> Tensor:
        # As accumulation has it: the mean over the whole batch.
        return _backward(loss, part, len(part) / len(tokens))

    warm_up(micro[0])
    # Gradients are there from the start, as in accumulation.
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    release_memory(device)
    reserve_memory(device)
    memory = PeakMemory(device, 2 * parameter_bytes(model))
    memory.restart()
    times: list[float] = []
    # Twice where all is one micro-batch and takes little.
    turns = micro if len(micro) > 1 else micro * 2
    for part in turns:
        value, taken = timed(lambda part=part: one(part), device)
        if not math.isfinite(float(value)):
            raise Wrong("the loss is not finite")
        times.append(taken)
        if sum(times) + taken > MOST_SECONDS:
            break
    return times, memory.peak_bytes()


def _backward(loss: Loss, tokens: Tensor, scale: float = 1.0) -> Tensor:
    """The scaled loss, whose gradients are added to those that are there."""
    value = loss(tokens) * scale
    value.backward()
    return value.detach()


def _same(loss: Loss, other: Loss, tokens: Tensor) -> None:
    """A warm-up of a loss that is compiled, for one length; raises Wrong where another way finds another value."""
    found = float(_backward(loss, tokens))
    with torch.no_grad():
        expected = float(other(tokens))
    if not abs(found - expected) <= SAME_LOSS * abs(expected):
        raise Wrong(f"the compiled baseline's loss is {found}, by this library's kernels {expected}")


def reserve_memory(device: torch.device) -> None:
    """Has torch's allocator ask the GPU for what a step may need, so that a first step's time is the model's."""
    if device.type == "cuda":
        torch.empty(int(SHARE_OF_MEMORY * available_bytes(device)), dtype=torch.uint8, device=device)


def engine_loss(model: TTTModel, *, recompute: bool = True) -> Loss:
    """The engine's own by its default method; `recompute`: the blocks before the fast ones keep their inputs alone."""
    return lambda tokens: model.loss(tokens, checkpoint_blocks=recompute).loss


def ttt_bytes(config: TTTConfig, length: int, *, recompute: bool) -> float:
    """About what a sequence's step holds: vectors and factors of every token, and its own fast weights; and all results
    of the blocks before the fast ones, where these are not computed again.
    """
    d, i, fast = config.hidden_size, config.intermediate_size, config.suffix_layers
    vectors = 1.3 * ((config.num_layers + fast + 3) * d + fast * (2 * d + 3 * i))
    if not recompute:
        vectors += config.prefix_layers * (16 * d + 2 * i)
    return length * vectors * config.torch_dtype.itemsize + 20 * fast * 3 * d * i


def full_attention_bytes(config: TTTConfig, length: int, *, recompute: bool) -> float:
    """About what a sequence's step holds: all results of its blocks, or inputs and attention alone."""
    d, i = config.hidden_size, config.intermediate_size
    a_block = 3 * d if recompute else 14 * d + 4 * i
    one_block = 14 * d + 5 * i
    return length * (config.num_layers * a_block + one_block + 6 * d) * config.torch_dtype.itemsize


def checked(context: Context, config: TTTConfig, *losses: Callable[[TTTModel], Loss]) -> dict[str, float]:
    """How far a short problem's gradients, by any of some ways, are from those in float64; once for each model.

    Raises Wrong where that is too far.
    """
    key = ("gradient", replace(config, rope_theta=1.0))
    if key not in context.checked:
        found = gradient_error(context, config, *losses)
        if not found["green"]:
            raise Wrong(
                f"gradients are off by {found['error']} from those in float64, at most {found['tolerance']}"
            )
        context.checked[key] = {"error": found["error"], "tolerance": found["tolerance"]}
        release_memory(context.device)
    return context.checked[key]


def gradient_error(
    context: Context, config: TTTConfig, *losses: Callable[[TTTModel], Loss]
) -> dict[str, Any]:
    """As `bench/train.py` checks gradients, on models made on the device: of two runs of each loss the worst.

    In a second run the engine replays what it has recorded in the first.
    """
    few = train_child.short(config)
    model = random_model(few, _stored(few), context.device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(few.torch_dtype))
    exact = random_model(replace(few, compute_dtype="float64"), torch.float64, context.device)
    exact.load_state_dict(model.state_dict())
    # In float64, with a graph of all inner steps, two sequences of 3b would leave a GPU no room.
    batch = 1 if model.num_parameters > LARGE else train_child.CHECK_BATCH
    shape = (batch, train_child.CHECK_STEPS * few.mini_batch_size + 1)
    tokens = random_tokens(few, *shape, context.device)
    exact.loss(tokens, backend="reference", method="graph", checkpoint_blocks=False).loss.backward()
    found = []
    for loss in [by(model) for by in losses for _ in range(2)]:
        model.zero_grad()
        loss(tokens).backward()
        found.append(train_child.compared(model, exact, few.compute_dtype))
    # An error of None is no number.
    return max(found, key=lambda run: math.inf if run["error"] is None else run["error"])


def _stored(config: TTTConfig) -> torch.dtype:
    """Weights are kept in float32 at least, as an optimizer needs them."""
    return torch.promote_types(config.torch_dtype, torch.float32)


def _free(context: Context, model: TTTModel) -> float:
    """Bytes for a step beside gradients of all parameters and copies of them in the compute dtype."""
    each = model.final_norm.dtype.itemsize + model.config.torch_dtype.itemsize
    return available_bytes(context.device) - each * model.num_parameters
