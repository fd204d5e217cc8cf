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


def training_flops_per_token(config: TTTConfig, context: int) -> float:
    """
    Operations (two per multiply-add) of a loss and all its gradients, per token, on average over `context` of them.

    A linear layer of n weights is one product of n multiply-adds a token; attention's products are d w each. A
    product z = A B asks for two when it is taken backwards, one for A and one for B, and these add up to other
    products' results without products of their own. So, in products:

    - Blocks without fast MLPs: linear layers 1 forward and 2 back; attention 2 and 4.
    - Suffix blocks, in a mini-batch that is learnt from. Slow linear layers: 1 forward and 1 for the inner step's
      input gradient, then 2 back for each, 6. Fast MLP, of three matrices: 3 forward and 6 in the inner step, 18 back.
      Attention: 2 forward and 4 in the inner step; 12 of the backward of a backward, among them the scores and their
      gradient, which no kernel keeps; and 4 for the cotangent of the forward's own output.
    - Below the first fast MLP the inner step does not go: its MLP has 3 and 4 products, 14 back; the attention under
      it is that of a block without fast MLPs.
    - The last mini-batch's step is in nobody's loss: all is 1 forward and 2 back, attention 2 and 4, as in blocks
      without fast MLPs.
    - Head: 1 forward and 2 back, or with the inner step's input gradient 2 and 4. An embedding has no products.
    """
    d, i, fast = config.hidden_size, config.intermediate_size, config.suffix_layers
    attention, mlp, head = 4 * d * d, 3 * d * i, d * config.vocab_size
    pairs = visible_pairs(context, context, config.window)
    plain = 3 * (config.num_layers * (attention + mlp) + fast * mlp + head) * context
    plain += 6 * config.num_layers * d * pairs
    if fast == 0:
        return 2 * plain / context
    learnt = context - config.mini_batch_size
    learnt_pairs = visible_pairs(learnt, learnt, config.window)
    # What a mini-batch that is learnt from has beyond forward and backward.
    more = 3 * ((fast - 1) * attention + fast * mlp + head)
    more += (fast - 1) * (27 - 9) * d * i + (7 + 14 - 9) * d * i
    return 2 * (plain + more * learnt + 16 * (fast - 1) * d * learnt_pairs) / context


def decode_weight_bytes(config: TTTConfig, dtype: torch.dtype, batch: int = 1) -> int:
    """Bytes of the matrices that decoding one token of each sequence reads, in the products' `dtype`."""
    d, i = config.hidden_size, config.intermediate_size
    shared = config.num_layers * (4 * d * d + 3 * d * i) + d * config.vocab_size
    fast = config.suffix_layers * 3 * d * i
    return (shared + batch * fast) * dtype.itemsize
