"""One training step on random tokens in a process of its own: what it takes of time and memory."""

from __future__ import annotations

import multiprocessing
import re
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from statistics import fmean
from typing import cast

import torch

from engine.config import DTYPES, TTTConfig
from engine.device import peak_allocated, resident_bytes
from engine.loss import Method
from engine.model import INIT_STD, TTTModel
from engine.training.optimizer import clip_, make_optimizer
from engine.training.run import Run

_NO_MEMORY = re.compile(r"out of memory|can't allocate memory|ALLOC_FAILED", re.IGNORECASE)


@dataclass(frozen=True)
class Choice:
    """How a batch is worked on: sequences at a time, and what is kept of them for the way back."""

    rows: int
    method: str
    checkpoint_blocks: bool


@dataclass(frozen=True)
class Cost:
    """peak: bytes of the whole process (on CUDA what torch and its graphs have). seconds: of a loss and its gradient,
    of which `forward` is the loss. update: seconds of clipping and of the optimizer's step.
    """

    peak: int
    seconds: float
    forward: float
    update: float


def try_out(run: Run, choice: Choice, length: int, passes: int = 1) -> Cost | None:
    """The cost of `choice.rows` sequences of `length` tokens; None where there is not enough memory for them.

    Of several passes it is the mean time, and the peak of all: in the memory that one has freed the next one does not
    find room for everything.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(_step, run, choice, length, passes, torch.get_num_threads()).result()
        except (BrokenProcessPool, MemoryError):
            return None
        except RuntimeError as error:
            # Not only torch's allocator finds none: libraries and graphs have memory of their own.
            if not _NO_MEMORY.search(str(error)):
                raise
            return None


def enough(config: TTTConfig, device: torch.device) -> int:
    """Tokens of a sequence that need all the code and all the graphs which a longer one needs."""
    unit = config.mini_batch_size if config.suffix_layers else 1
    if device.type == "cpu":
        return 2 * unit
    if not config.suffix_layers or config.window is None:
        # Kernels are tried out for about as much work as they are given.
        return sys.maxsize
    # There is a graph for every number of earlier tokens that a mini-batch sees, and one of a step that nobody follows.
    return (-(-config.window // unit) + 2) * unit


def _step(run: Run, choice: Choice, length: int, passes: int, threads: int) -> Cost:
    torch.set_num_threads(threads)
    device = torch.device(run.device)
    model = _random_model(run, device)
    optimizer = make_optimizer(model, run.optimizer)
    tokens = torch.randint(run.model.vocab_size, (choice.rows, length + 1), device=device)
    accumulates = run.global_batch_size > choice.rows

    def once(part: torch.Tensor) -> tuple[float, float, float]:
        start = _now(device)
        if not accumulates:
            optimizer.zero_grad(set_to_none=True)
        loss = model.loss(
            part,
            0,
            backend=run.backend,
            method=cast(Method, choice.method),
            truncate_steps=run.truncate_steps,
            checkpoint_blocks=choice.checkpoint_blocks,
        ).loss
        read = _now(device)
        loss.backward()
        back = _now(device)
        clip_(model.parameters(), run.optimizer.clip)
        optimizer.step()
        return back - start, read - start, _now(device) - back

    # Loads kernels, and makes the optimizer's state; with accumulation also the gradients of the sequences before.
    once(tokens[:, : min(length, enough(run.model, device)) + 1])
    times = [once(tokens) for _ in range(passes)]
    return Cost(_peak(device), *(fmean(part) for part in zip(*times, strict=True)))


def _random_model(run: Run, device: torch.device) -> TTTModel:
    """A model with the initial distribution, drawn on the device: elsewhere a large one takes longer than a trial."""
    model = TTTModel(run.model, dtype=DTYPES[run.param_dtype], device="meta").to_empty(device=device)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0) if parameter.ndim == 1 else parameter.normal_(0.0, INIT_STD)
    return model


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return peak_allocated(device)
    return resident_bytes("VmHWM")
