"""Models small enough that a test can read many mini-batches or take many updates."""

from typing import Any

import torch
from torch import Tensor

from engine import TTTConfig, TTTModel

CONFIG = TTTConfig(
    name="test",
    vocab_size=61,
    hidden_size=32,
    intermediate_size=40,
    num_layers=3,
    num_heads=2,
    suffix_layers=2,
    mini_batch_size=8,
    window=13,
    bos_token_id=1,
)
TINIER = TTTConfig.preset(
    "tiny",
    hidden_size=32,
    intermediate_size=64,
    num_layers=2,
    num_heads=2,
    suffix_layers=1,
    mini_batch_size=8,
    window=16,
    vocab_size=64,
)


def model(seed: int = 0, **overrides: Any) -> TTTModel:
    """Weights ten times the usual initialization, so that attention and inner steps matter."""
    m = TTTModel(TTTConfig.from_dict(CONFIG.to_dict() | overrides), seed=seed)
    with torch.no_grad():
        for parameter in m.parameters():
            if parameter.ndim > 1:
                parameter.mul_(10)
    return m


def stream(length: int, *, batch: int = 1, seed: int = 0, vocab: int = 61) -> Tensor:
    """(batch, length) random tokens, some of them the BOS token 1."""
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(seed))
