"""Choosing the next token from its logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Nearly always the tokens that top_p keeps are among these many, and sorting a whole vocabulary costs as much
# as a good part of the model.
FEW = 1024


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """A ValueError where one of them is not accepted."""
    if not (math.isfinite(temperature) and temperature >= 0):
        raise ValueError(
            f"temperature={temperature} is not accepted; it is a finite number of at least 0 (0: greedy)"
        )
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k} is not accepted; it is at least 1, or None for all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(
            f"top_p={top_p} is not accepted; it is above 0 and at most 1, or None for all tokens"
        )


def sample(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """
    One token for every row of `logits` (B, V), any floating dtype; int64 of shape (B,).

    Temperature 0 takes the likeliest token. Otherwise the logits are divided by it, the `top_k` likeliest
    tokens are kept, and of these the likeliest ones that together first hold at least `top_p` of the
    probability (nucleus sampling, arXiv 1904.09751); one is drawn in proportion. Probabilities are fp32,
    or fp64 for fp64 logits. A ValueError names an argument that is not accepted.
    """
    check_sampling(temperature, top_k, top_p)
    if logits.dim() != 2 or logits.shape[1] == 0:
        raise ValueError(f"logits of shape {tuple(logits.shape)} are not accepted; they are (B, V)")
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    # The largest becomes 0, so that no temperature, however small, makes infinities of the kept ones.
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    tokens = None
    if top_k is not None and top_k < scaled.shape[1]:
        scaled, tokens = scaled.topk(top_k, dim=-1)
    probabilities = scaled.softmax(dim=-1)
    if top_p is not None and top_p < 1:
        probabilities, order = nucleus(probabilities, top_p)
        tokens = order if tokens is None else tokens.gather(1, order)
    drawn = torch.multinomial(probabilities, 1, generator=generator)
    return (drawn if tokens is None else tokens.gather(1, drawn)).squeeze(1)


def nucleus(probabilities: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """
    The likeliest of `probabilities` (B, V), descending, with those beyond the nucleus set to 0, and which
    columns they were: both (B, K), K large enough for every row's nucleus.
    """
    vocab_size = probabilities.shape[1]
    kept, order = probabilities.topk(min(FEW, vocab_size), dim=-1)
    if kept.shape[1] < vocab_size and not bool((kept.sum(dim=-1) >= top_p).all()):
        kept, order = probabilities.sort(dim=-1, descending=True)
    before = kept.cumsum(dim=-1) - kept
    return kept.masked_fill(before >= top_p, 0), order
