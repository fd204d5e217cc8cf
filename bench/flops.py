"""
Useful operations and bytes: what has to be done, each product once and nothing recomputed.

d hidden, i intermediate, L blocks of which S have fast MLPs, V vocabulary, w the mean number of visible keys.
"""

from __future__ import annotations

import torch

from engine import TTTConfig


def visible_pairs(queries: int, keys: int, window: int | None) -> int:
    """(query, key) pairs of causal attention: query i stands at key `keys - queries + i` and sees it and back."""
    limit = keys if window is None else min(window, keys)
    before = keys - queries
    # The first `short` queries see before + 1, before + 2, ... keys, and the rest `limit` each.
    short = min(max(limit - before, 0), queries)
    return short * before + short * (short + 1) // 2 + (queries - short) * limit


def mean_visible_keys(context: int, window: int | None) -> float:
    """w: how many keys a query sees, itself included, on average over the first `context` positions."""
    return visible_pairs(context, context, window) / context


def prefill_flops_per_token(config: TTTConfig, context: int) -> float:
    """Operations (two per multiply-add) of reading one token, on average over `context` of them."""
    d, i = config.hidden_size, config.intermediate_size
    w = mean_visible_keys(context, config.window)
    prefix = config.prefix_layers * (2 * (4 * d * d + 3 * d * i) + 4 * d * w)
    if config.suffix_layers == 0:
        return prefix + 2 * d * config.vocab_size
    return prefix + inner_step_flops_per_token(config, w)


def inner_step_flops_per_token(config: TTTConfig, w: float) -> float:
    """Operations that a token costs from the prefix blocks' output to the new fast weights; there are some."""
    d, i, fast = config.hidden_size, config.intermediate_size, config.suffix_layers
    blocks = 2 * fast * (4 * d * d + 3 * d * i) + 2 * fast * 3 * d * i + 4 * fast * d * w
    head = 2 * d * config.vocab_size
    head_input_gradient = 2 * d * config.vocab_size
    input_gradients = 2 * (fast - 1) * (4 * d * d + 6 * d * i) + 8 * (fast - 1) * d * w
    first_input_gradient = 2 * (3 * d * i) + 2 * d * i
    weight_gradients = 2 * fast * 3 * d * i
    return blocks + head + head_input_gradient + input_gradients + first_input_gradient + weight_gradients


def decode_weight_bytes(config: TTTConfig, dtype: torch.dtype, batch: int = 1) -> int:
    """Bytes of the matrices that decoding one token of each sequence reads, in the products' `dtype`."""
    d, i = config.hidden_size, config.intermediate_size
    shared = config.num_layers * (4 * d * d + 3 * d * i) + d * config.vocab_size
    fast = config.suffix_layers * 3 * d * i
    return (shared + batch * fast) * dtype.itemsize
