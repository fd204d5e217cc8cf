"""What a training step holds grows with the length by what it keeps of a token, and by nothing else."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from engine import TTTConfig, TTTModel
from engine.rollback import factor_bytes
from engine.snapshots import snapshot_bytes

CPU = torch.device("cpu")
CONFIG = TTTConfig.preset("tiny")
SHORT, LONG = 3072, 6144
EVERY = 8


def of_rollback(config: TTTConfig) -> float:
    """Bytes of a token at the peak of a step in float32.

    The factors of its inner gradients; the inputs of the first blocks, P d; of the suffix its keys and values, 2 S d,
    its input and that one's gradient, 2 d, and the head's gradient, d.
    """
    vectors = config.prefix_layers + 2 * config.suffix_layers + 3
    return factor_bytes(config, CPU) / config.mini_batch_size + 4 * vectors * config.hidden_size


def of_snapshots(config: TTTConfig) -> float:
    """Bytes of a token: the snapshot of its stretch, and its loss."""
    return snapshot_bytes(config, EVERY) / (EVERY * config.mini_batch_size) + 4


def allocated(length: int, options: dict[str, Any]) -> tuple[int, int]:
    """Bytes that one loss and its gradient hold at most, and what is left of them afterwards."""
    model = TTTModel(CONFIG)
    tokens = torch.randint(CONFIG.vocab_size, (1, length + 1))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model.loss(tokens, **options).loss.backward()
    kineto = profiler.profiler
    assert kineto is not None
    changes = [(e.start_ns(), e.nbytes()) for e in kineto.kineto_results.events() if e.name() == "[memory]"]
    now = highest = 0
    for _, change in sorted(changes):
        now += change
        highest = max(highest, now)
    return highest, now


@pytest.mark.slow
@pytest.mark.parametrize(("method", "account"), [("rollback", of_rollback), ("snapshots", of_snapshots)])
def test_grows_by_what_is_kept(method: str, account: Callable[[TTTConfig], float]) -> None:
    options = {"method": method, "snapshot_every": EVERY}
    (short, left), (long, left_of_long) = allocated(SHORT, options), allocated(LONG, options)
    growth = (long - short) / (LONG - SHORT)
    stated = account(CONFIG)
    # An account of more than there is would state nothing.
    assert 0.98 * stated < growth < 1.02 * stated
    # The gradients stay, and tables of positions for the next call, but no tensor of width d.
    assert left_of_long - left < 600 * (LONG - SHORT) < 4 * CONFIG.hidden_size * (LONG - SHORT)
