"""Writing text: read the prompt, then sample, read what was sampled, and so on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from engine.sampling import check_sampling, sample

if TYPE_CHECKING:
    from engine.model import TTTModel
    from engine.state import State


def generate(
    model: TTTModel,
    prompt: Tensor | Sequence[int],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop_token: int | None = None,
    state: State | None = None,
    backend: str | None = None,
) -> Tensor:
    """
    Tokens that follow `prompt`: int64, (B, n) for a prompt (B, T), (n,) for a prompt (T,) or a list.

    n is `max_new_tokens`, or fewer once every sequence has met `stop_token`; what comes after it in a
    sequence that stopped before the others is `stop_token` again. The model learns from what it writes as
    from what it reads: an inner step is taken whenever a mini-batch is full. Sampling is described in
    `engine.sampling.sample`; the same `seed` on the same device gives the same tokens, None draws one.

    `state` continues what it has read and, afterwards, has read the prompt and all that is returned.

    Raises `ValueError` for an empty prompt, a token outside the vocabulary and any setting out of its range.
    """
    tokens = checked_prompt(model, prompt)
    steps = list(
        stream(
            model,
            tokens,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            seed=seed,
            stop_token=stop_token,
            state=state,
            backend=backend,
        )
    )
    ids = torch.stack(steps, dim=1) if steps else tokens.new_empty(len(tokens), 0)
    return ids[0] if torch.as_tensor(prompt).dim() == 1 else ids


def stream(
    model: TTTModel,
    prompt: Tensor | Sequence[int],
    *,
    max_new_tokens: int = 64,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    stop_token: int | None = None,
    state: State | None = None,
    backend: str | None = None,
) -> Iterator[Tensor]:
    """As `generate`, but every sequence's next token, int64 (B,), as soon as it is there."""
    tokens = checked_prompt(model, prompt)
    check_sampling(temperature, top_k, top_p)
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens} is not accepted; it is at least 0")
    if stop_token is not None and not 0 <= stop_token < model.config.vocab_size:
        raise ValueError(
            f"stop_token={stop_token} is outside the vocabulary; "
            f"tokens go from 0 to {model.config.vocab_size - 1}"
        )
    generator = torch.Generator(device=tokens.device)
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    # A state that nobody sees afterwards need not read the last token.
    reads_last = state is not None
    if state is None:
        state = model.init_state(len(tokens))
    logits = model.prefill(tokens, state, backend=backend).logits
    stopped = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    for left in range(max_new_tokens - 1, -1, -1):
        token = sample(logits, temperature, top_k, top_p, generator)
        if stop_token is not None:
            token = token.masked_fill(stopped, stop_token)
            stopped = token == stop_token
        last = left == 0 or (stop_token is not None and bool(stopped.all()))
        # Before the yield, so that the state of a listener who leaves has read all that it was given.
        if reads_last or not last:
            logits = model.decode(token, state, backend=backend)
        yield token
        if last:
            return


def checked_prompt(model: TTTModel, prompt: Tensor | Sequence[int]) -> Tensor:
    """`prompt` as int64 (B, T) on the model's device; a ValueError where it is empty or not tokens."""
    tokens = torch.as_tensor(prompt)
    if tokens.numel() == 0:
        raise ValueError(f"prompt of shape {tuple(tokens.shape)} is empty; it must hold at least one token")
    if tokens.dtype != torch.int64 or tokens.dim() not in (1, 2):
        raise ValueError(
            f"prompt: {tokens.dtype} of shape {tuple(tokens.shape)} is not accepted; "
            "it is int64, (T,) or (B, T)"
        )
    low, high = int(tokens.min()), int(tokens.max())
    vocab_size = model.config.vocab_size
    if low < 0 or high >= vocab_size:
        raise ValueError(
            f"prompt: token {low if low < 0 else high} is outside the vocabulary; "
            f"tokens go from 0 to {vocab_size - 1}"
        )
    return tokens.view(-1, tokens.shape[-1]).to(model.final_norm.device)
