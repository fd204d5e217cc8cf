"""How much memory a piece of work needs at its peak, in a process that does nothing else."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Iterator
from pathlib import Path

import torch

from engine.device import peak_allocated, resident_bytes


class PeakMemory:
    """
    Counts from where it is made: memory that torch, Python and the caller hold at that moment is left out.

    On CUDA it is what torch allocated at most, and what CUDA graphs keep besides. On Linux it is the most that the
    process had resident since `restart`; elsewhere the most since the process began.
    """

    def __init__(self, device: torch.device, model_bytes: int | None = None) -> None:
        """`model_bytes`: on CUDA so many bytes are left out instead, since what a warm-up has made is needed too."""
        self.device = device
        if device.type != "cuda":
            self.baseline = resident_bytes("VmRSS")
        else:
            self.baseline = torch.cuda.memory_allocated(device) if model_bytes is None else model_bytes
        self._forgotten = 0

    def restart(self) -> None:
        """Forgets peaks reached so far."""
        self._forgotten = self.process_bytes()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        with contextlib.suppress(OSError):
            # 5: set the resident high-water mark back to what is resident now; see proc(5).
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def peak_bytes(self) -> int:
        """The most that was held at once since `restart`, in bytes."""
        return max(0, self._highest_bytes() - self.baseline)

    def process_bytes(self) -> int:
        """The most that the process has held at once since it began, nothing left out, in bytes."""
        return max(self._forgotten, self._highest_bytes())

    def _highest_bytes(self) -> int:
        if self.device.type == "cuda":
            return peak_allocated(self.device)
        return resident_bytes("VmHWM")


def parameter_bytes(model: torch.nn.Module) -> int:
    """Of all parameters of a model."""
    return sum(p.numel() * p.element_size() for p in model.parameters())


def release_memory(device: torch.device) -> None:
    """Gives back what is freed but still held, so that what is measured next cannot hide in it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return
    # glibc keeps what was freed for later; other systems' libraries have no such function.
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


# Parameters of glibc's mallopt and their defaults; see mallopt(3).
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_DEFAULT_TRIM_THRESHOLD, _DEFAULT_MMAP_MAX = 128 * 1024, 65536


@contextlib.contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Within the context, what is freed is kept for the next result instead of given back to the system.

    As a GPU's memory always is. Otherwise large results are of memory that the system has to find and clear first,
    page by page, which takes several times as long as writing them (measured: a norm of 50 MB in 3 and in 20 ms).
    """
    settings = ((_TRIM_THRESHOLD, 2**31 - 1, _DEFAULT_TRIM_THRESHOLD), (_MMAP_MAX, 0, _DEFAULT_MMAP_MAX))
    try:
        change = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        # A library of another system, with ways of its own.
        yield
        return
    for parameter, value, _ in settings:
        change(parameter, value)
    try:
        yield
    finally:
        for parameter, _, default in settings:
            change(parameter, default)
