"""One contender of bench/kernels.py at one length, in a process of its own: checked, then measured."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch

from bench.child import run_script, serve
from bench.kernel_contenders import flat
from bench.memory import PeakMemory, freed_memory_kept, release_memory
from bench.output import progress
from bench.timing import repeated_seconds, synchronize


@dataclass(frozen=True)
class Job:
    """What a child process is to do."""

    operator: str
    """The module that describes the operator; see bench/kernels.py."""
    contender: str
    problem: dict[str, Any]
    device: str
    orders: tuple[str, ...]
    repeat: int
    truths: str
    """A file of torch.save: for the `short` and the `whole` problem, each order's results and tolerances."""


def in_child(job: Job) -> dict[str, Any]:
    """The result of `job`, done by a process of its own; raises as `child.run_script` does."""
    return run_script(__file__, asdict(job))


def run(job: Job) -> dict[str, Any]:
    """For each order its `error` and `tolerance`, and if right also `seconds` and `extra_peak_memory_bytes`.

    An order that could not be computed has its `reason` instead.
    """
    device = torch.device(job.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    results: dict[str, Any] = {}
    for order in job.orders:
        try:
            results[order] = _measured(job, order, device)
        except RuntimeError as error:
            # Out of memory, say, or an order that torch does not have.
            results[order] = {"reason": " ".join(str(error).split())[:160] or type(error).__name__}
        progress(".")
    return results


def _measured(job: Job, order: str, device: torch.device) -> dict[str, Any]:
    operator = importlib.import_module(job.operator)
    contender = operator.contender(job.contender)
    problem = operator.Problem(**job.problem)
    truths = torch.load(job.truths, weights_only=True)

    # A short problem is checked whole; that also brings in code and threads, which are not this order's memory.
    x = contender.arrange(problem.short().inputs(device))
    results = contender.prepare(problem.short(), x, order)()
    verdicts = operator.verdicts(contender.rearrange(results), *truths["short"][order])

    x, results = contender.arrange(problem.inputs(device)), ()
    if contender.compiled:
        contender.prepare(problem, x, order)()
    release_memory(device)
    memory = PeakMemory(device)
    work = contender.prepare(problem, x, order)
    # What earlier orders keep for this one counts; what they needed meanwhile does not.
    memory.restart()
    results = work()
    synchronize(device)
    extra = memory.peak_bytes()
    beyond = {}
    verdicts += operator.verdicts(contender.rearrange(results), *truths["whole"][order])
    if operator.BEYOND_OUTPUTS:
        beyond = {"extra_beyond_outputs_bytes": max(0, extra - new_bytes(results, flat(x)))}
    results = ()

    # The result that comes nearest to its tolerance speaks for all.
    error, tolerance = max(verdicts, key=lambda verdict: verdict[0] / verdict[1])
    tolerance *= contender.leniency
    found = {"error": error if math.isfinite(error) else None, "tolerance": tolerance}
    if not error <= tolerance:
        return found
    with freed_memory_kept():
        work()
        seconds = repeated_seconds(work, device, job.repeat)
    return found | {"extra_peak_memory_bytes": extra, **beyond, "seconds": seconds}


def new_bytes(results: Iterable[torch.Tensor], given: Iterable[Any]) -> int:
    """Bytes of the results themselves, without those that lie in tensors that were given."""
    known = {t.untyped_storage().data_ptr() for t in given if isinstance(t, torch.Tensor)}
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in results}
    return sum(size for address, size in held.items() if address not in known)


if __name__ == "__main__":
    serve(lambda job: run(Job(**job)))
