"""Loss by position in the sequence, on sequences that were not trained on."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from engine.config import TTTConfig
from engine.data import Sequences
from engine.files import atomic_write
from engine.inner import counted


@dataclass(frozen=True)
class Evaluation:
    """What a model makes of held-out sequences.

    loss: mean over the tokens that count, in nats. nll: (T,) float64, the mean of every position's, BOS included.
    sequences: how many there were.
    """

    loss: float
    nll: Tensor
    sequences: int

    def write(self, path: str | Path, **facts: Any) -> None:
        """Writes it as JSON, with `facts` beside it."""
        values = facts | {
            "loss": self.loss,
            "sequences": self.sequences,
            "nll_by_position": [round(value, 6) for value in self.nll.tolist()],
        }
        with atomic_write(path) as temporary:
            temporary.write_text(json.dumps(values) + "\n", encoding="utf-8")


@torch.no_grad()
def evaluate(
    nll: Callable[[Tensor], Tensor],
    config: TTTConfig,
    sequences: Sequences,
    batch_size: int,
    device: torch.device,
    *,
    rank: int = 0,
    world_size: int = 1,
    limit: int | None = None,
    show: bool = False,
) -> Evaluation:
    """A model's loss on every sequence (on the first `limit`).

    With several processes each reads its share, and all of them read equally many batches, as a sharded model
    needs; the result is the same in all.

    Args:
        nll: gives that of the last T of tokens (B, T + 1) on `device`.
        config: says which tokens count.
        batch_size: sequences that one process reads at a time.
        show: whether to show progress on stderr, where that is a terminal.
    """
    count = len(sequences) if limit is None else min(limit, len(sequences))
    sums = torch.zeros(sequences.seq_length, dtype=torch.float64)
    # Of what counts: its nll, and how much it is.
    totals = torch.zeros(2, dtype=torch.float64)
    for start in tqdm(
        range(0, count, batch_size * world_size), "evaluating", disable=None if show else True, unit="batch"
    ):
        own = range(start + rank * batch_size, start + (rank + 1) * batch_size)
        # Beyond the end the last one again, which counts nothing.
        tokens = sequences.read([min(index, count - 1) for index in own]).to(device)
        real = torch.tensor([index < count for index in own], device=device)[:, None]
        values = nll(tokens).double()
        counts = counted(tokens[:, 1:], config).double() * real
        sums += (values * real).sum(0).cpu()
        totals += torch.stack([(values * counts).sum(), counts.sum()]).cpu()
    sums, totals = _over_processes([sums, totals], world_size, device)
    return Evaluation(float(totals[0] / totals[1]), sums / count, count)


def _over_processes(tensors: Sequence[Tensor], world_size: int, device: torch.device) -> list[Tensor]:
    if world_size > 1:
        for tensor in tensors:
            shared = tensor.to(device)
            torch.distributed.all_reduce(shared)
            tensor.copy_(shared)
    return list(tensors)
