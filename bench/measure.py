"""One measured run of a model, in a process of its own."""

from __future__ import annotations

import math
import sys
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from bench.child import run_script, serve
from bench.memory import PeakMemory
from bench.output import progress
from bench.timing import timed
from engine import TTTConfig, TTTModel

# How far a backend's nll may be from that of the reference formulas computed in CHECK_DTYPE: the worst token
# where the arithmetic is the same, the mean over tokens where products are rounder (as in the golden cases).
WORST_TOKEN = {"float64": 1e-9, "float32": 2e-5}
MEAN_OF_TOKENS = {"bfloat16": 0.02, "float16": 0.02}
CHECK_DTYPE = {"float64": "float64", "float32": "float32", "bfloat16": "float32", "float16": "float32"}
CHECK_TOKENS = 513


@dataclass(frozen=True)
class Job:
    """What a child process is to do: `measure` or `check` one model with one backend."""

    task: str
    config: dict[str, Any]
    backend: str
    device: str
    tokens: str
    """A .npy file of int64 tokens, (B, context + 1)."""
    repeat: int = 1
    pieces: tuple[int, ...] = ()
    """Lengths of the pieces in which time is taken by position; they add up to the context."""


def measure(job: Job) -> dict[str, Any]:
    """Speed, memory, loss and time by position of one model; see contract.md's JSON for the names."""
    device = torch.device(job.device)
    memory = PeakMemory(device)
    config = TTTConfig.from_dict(job.config)
    model = TTTModel(config, dtype=config.torch_dtype, device=device)
    tokens = torch.from_numpy(np.load(job.tokens)).to(device)
    batch, context = tokens.shape[0], tokens.shape[1] - 1
    state = model.init_state(batch)
    memory.restart()

    def read(piece: torch.Tensor) -> torch.Tensor:
        return model.prefill(piece, state, backend=job.backend).nll

    def by_position() -> list[float]:
        state.reset()
        times = []
        for piece in tokens[:, :context].split(list(job.pieces), dim=1):
            times.append(timed(partial(read, piece), device)[1])
            progress(".")
        return times

    positions, times = [], []
    for _ in range(job.repeat):
        # In pieces first: that is also the warm-up of the whole.
        positions.append(by_position())
        state.reset()
        nll, taken = timed(partial(read, tokens), device)
        times.append(taken)
        progress(f" {batch * context / taken:,.0f} tokens/s ")
    progress("\n")
    mean_nll = float(nll[:, 1:].double().mean())
    return {
        "tokens_per_s": batch * context / min(times),
        "seconds": times,
        "peak_memory_bytes": memory.peak_bytes(),
        "mean_nll": mean_nll if math.isfinite(mean_nll) else None,
        "seconds_by_position": [min(passes) for passes in zip(*positions, strict=True)],
    }


def check(job: Job) -> dict[str, Any]:
    """How far the backend's nll of the first tokens is from the reference formulas', and whether too far."""
    config = TTTConfig.from_dict(job.config)
    dtype = config.compute_dtype
    length = max(CHECK_TOKENS, config.mini_batch_size + config.mini_batch_size // 4)
    if config.window is not None:
        # Short enough that it moves within so few tokens.
        config = replace(config, window=min(config.window, max(1, config.mini_batch_size // 2)))
    tokens = torch.from_numpy(np.load(job.tokens)[:1, :length]).to(job.device)
    nlls = []
    for compute_dtype, backend in ((dtype, job.backend), (CHECK_DTYPE[dtype], "reference")):
        model = TTTModel(
            replace(config, compute_dtype=compute_dtype), dtype=config.torch_dtype, device=job.device
        )
        nlls.append(model.prefill(tokens, model.init_state(), backend=backend).nll[:, 1:].double())
        progress(".")
    errors = (nlls[0] - nlls[1]).abs()
    worst = dtype in WORST_TOKEN
    error = float(errors.max() if worst else errors.mean())
    tolerance = WORST_TOKEN[dtype] if worst else MEAN_OF_TOKENS[dtype]
    progress(
        f" {tokens.shape[1]} tokens, {'worst' if worst else 'mean'} difference of a token's loss {error:.1e} "
        f"(at most {tolerance:.0e})\n"
    )
    # A NaN compares as false, and so is red.
    return {"green": error <= tolerance, "error": error, "tolerance": tolerance}


def in_child(job: Job) -> dict[str, Any]:
    """The result of `job`, done by a process of its own; raises as `child.run_script` does."""
    return run_script(__file__, asdict(job))


def main() -> None:
    tasks = {"measure": measure, "check": check}
    serve(lambda job: tasks[job["task"]](Job(**job)))


if __name__ == "__main__":
    main()
