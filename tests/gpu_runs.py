"""What the tests of bench/gpu.py share."""

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench.gpu_checks import CPU
from bench.gpu_context import random_model
from bench.gpu_plan import Measurement
from bench.gpu_transformer import Attention, Transformer
from engine import TTTConfig, graphs
from engine.ops import Ops
from engine.recordings import Recordings

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_layers": 2,
    "num_heads": 2,
    "suffix_layers": 1,
    "mini_batch_size": 16,
    "window": 24,
    "bos_token_id": None,
}


def group_of(*keys: str) -> list[Measurement]:
    return [Measurement(key, "prefill", "", {}, "group", 0.0) for key in keys]


def small(**changes: Any) -> TTTConfig:
    return TTTConfig.from_dict({"name": "small"} | SMALL | changes)


def baseline(config: TTTConfig, style: str = "kernels") -> Transformer:
    return Transformer(random_model(config, torch.float32, CPU), Attention("sdpa-flash", {}), style)


def recorded_by(monkeypatch: pytest.MonkeyPatch, run: Callable[..., None]) -> None:
    """Has the engine read as on a GPU, with something else than graphs."""
    lane = SimpleNamespace(active=nullcontext, mark=lambda: None, wait=lambda mark: None)
    monkeypatch.setattr(graphs, "available", lambda device: True)
    monkeypatch.setattr(graphs, "lanes", lambda device: graphs.Lanes(lane, lane, lane))
    monkeypatch.setattr(Ops, "recordable", property(lambda ops: "reference" not in ops.backends))
    monkeypatch.setattr(Recordings, "run", run)
