"""One checked or measured training step of a model, in a process of its own."""

from __future__ import annotations

import math
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch import Tensor

from bench.child import run_script, serve
from bench.memory import PeakMemory, freed_memory_kept, parameter_bytes, release_memory
from bench.output import progress
from bench.timing import timed
from engine import TTTConfig, TTTModel
from engine.loss import Method

# How far a gradient may be from that in float64, as a share of its norm: the worst parameter where the arithmetic is
# nearly the same, all parameters as one vector where products are rounder.
WORST_PARAMETER = {"float64": 1e-9, "float32": 1e-4}
WHOLE_GRADIENT = {"bfloat16": 0.05, "float16": 0.05}

CHECK_STEPS = 3
CHECK_MINI_BATCH = 128
CHECK_VOCAB = 2048
CHECK_BATCH = 2


@dataclass(frozen=True)
class Job:
    """What a child process is to do: `measure` or `check` the training step of one model."""

    task: str
    config: dict[str, Any]
    backend: str
    method: Method
    snapshot_every: int
    checkpoint_blocks: bool
    device: str
    tokens: str
    """A .npy file of int64 tokens, (B, context + 1)."""


def measure(job: Job) -> dict[str, Any]:
    """Seconds of a step, its memory, and the loss.

    The first step is for memory, which it gets from the system and gives back as any program does. The second one finds
    memory that is kept for the third, whose time counts: training is a long run of equal steps, and finding large
    results' memory again in each would be the allocator's time, not the model's. The same for all models.
    """
    device = torch.device(job.device)
    config = TTTConfig.from_dict(job.config)
    model = _model(config, device)
    tokens = torch.from_numpy(np.load(job.tokens)).to(device)
    # Brings in code and threads, which are not the step's memory.
    _step(model, tokens[:, : min(tokens.shape[1], 2 * config.mini_batch_size + 1)], job)
    model.zero_grad()
    release_memory(device)
    memory = PeakMemory(device, parameter_bytes(model))
    memory.restart()
    _step(model, tokens, job)
    extra = memory.peak_bytes()
    progress(".")
    with freed_memory_kept():
        _step(model, tokens, job)
        progress(".")
        loss, taken = timed(lambda: _step(model, tokens, job), device)
    progress(f" {taken:.2f} s\n")
    value = float(loss)
    return {
        "seconds": taken,
        "extra_memory_bytes": extra,
        "peak_memory_bytes": memory.process_bytes(),
        "loss": value if math.isfinite(value) else None,
    }


def check(job: Job) -> dict[str, Any]:
    """How far a short problem's gradients are from those of the reference formulas in float64, and whether too far.

    Short: a few small mini-batches, a window that moves within them, and few classes. The reference is a graph of all
    inner steps, of a model that has the same weights, rounded to the dtype of the products.
    """
    config = TTTConfig.from_dict(job.config)
    dtype = config.compute_dtype
    config = short(config)
    given = np.load(job.tokens)
    # Repeated where they are few.
    shape = (min(len(given), CHECK_BATCH), CHECK_STEPS * config.mini_batch_size + 1)
    tokens = (torch.from_numpy(np.resize(given, shape)) % config.vocab_size).to(job.device)
    model = _model(config, torch.device(job.device))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(config.torch_dtype))
    exact = TTTModel(replace(config, compute_dtype="float64"), dtype=torch.float64, device=job.device)
    exact.load_state_dict(model.state_dict())
    # A snapshot at every mini-batch, since there are few.
    _step(model, tokens, replace(job, snapshot_every=1))
    progress(".")
    _step(exact, tokens, replace(job, backend="reference", method="graph", checkpoint_blocks=False))
    progress(".")
    found = compared(model, exact, dtype)
    worst = "worst" if dtype in WORST_PARAMETER else "mean"
    progress(
        f" {shape[0]} x {shape[1] - 1} tokens, {worst} relative error of the gradients "
        f"{found['error'] or math.nan:.1e} (at most {found['tolerance']:.0e})\n"
    )
    return found


def compared(model: TTTModel, exact: TTTModel, dtype: str) -> dict[str, Any]:
    """How far a model's gradients in `dtype` are from the exact ones, and whether too far."""
    differences, norms = zip(*map(_difference, model.parameters(), exact.parameters()), strict=True)
    worst = dtype in WORST_PARAMETER
    difference, norm = torch.cat(differences), torch.cat(norms)
    error = float((difference / norm).max() if worst else difference.norm() / norm.norm())
    tolerance = WORST_PARAMETER[dtype] if worst else WHOLE_GRADIENT[dtype]
    # A NaN compares as false, and so is red.
    return {
        "green": error <= tolerance,
        "error": error if math.isfinite(error) else None,
        "tolerance": tolerance,
    }


def short(config: TTTConfig) -> TTTConfig:
    """The same model for `check`: mini-batches, window and vocabulary of a size that float64 has time for."""
    mini_batch = min(config.mini_batch_size, CHECK_MINI_BATCH)
    vocab = min(config.vocab_size, CHECK_VOCAB)
    bos = config.bos_token_id
    return replace(
        config,
        mini_batch_size=mini_batch,
        window=None if config.window is None else min(config.window, mini_batch + mini_batch // 2),
        vocab_size=vocab,
        bos_token_id=None if bos is None else min(bos, vocab - 1),
    )


def _model(config: TTTConfig, device: torch.device) -> TTTModel:
    """Weights are kept in float32 at least, as an optimizer needs them, whatever products are computed in."""
    return TTTModel(config, dtype=torch.promote_types(config.torch_dtype, torch.float32), device=device)


def _step(model: TTTModel, tokens: Tensor, job: Job) -> Tensor:
    """The loss, and every parameter's gradient in its `grad`."""
    model.zero_grad()
    loss = model.loss(
        tokens,
        backend=job.backend,
        method=job.method,
        snapshot_every=job.snapshot_every,
        checkpoint_blocks=job.checkpoint_blocks,
    ).loss
    loss.backward()
    return loss.detach()


def _difference(got: Tensor, exact: Tensor) -> tuple[Tensor, Tensor]:
    """Norms of the difference of two parameters' gradients and of the exact one, for each of thirds where q, k and v
    are in one: values have far larger gradients than queries and keys, whose errors would not show in the whole.
    """
    if exact.grad is None:
        raise RuntimeError(f"a parameter of shape {tuple(exact.shape)} has no gradient")
    want = exact.grad
    have = torch.full_like(want, math.nan) if got.grad is None else got.grad.double()
    thirds = 3 if want.dim() == 2 and want.shape[0] == 3 * want.shape[1] else 1
    pairs = zip(have.chunk(thirds), want.chunk(thirds), strict=True)
    norms = [((h - w).norm(), w.norm()) for h, w in pairs]
    return torch.stack([n for n, _ in norms]), torch.stack([n for _, n in norms])


def in_child(job: Job) -> dict[str, Any]:
    """The result of `job`, done by a process of its own; raises as `child.run_script` does."""
    return run_script(__file__, asdict(job))


def main() -> None:
    tasks = {"measure": measure, "check": check}
    serve(lambda job: tasks[job["task"]](Job(**job)))


if __name__ == "__main__":
    main()
