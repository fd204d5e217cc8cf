"""The device that a command is to run on, and the memory that is free there."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch


def checked_device(name: str) -> torch.device:
    """The torch device of that name, with its number; a ValueError where there is no such device here."""
    try:
        # `torch.cuda.set_device` and comparisons with tensors' devices want the number.
        return torch.empty(0, device=torch.device(name)).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device={name!r} cannot be used here: {str(error).splitlines()[0]}") from error


def available_bytes(device: torch.device) -> int:
    """Memory that could be allocated now, in bytes."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    line = next(line for line in lines if line.startswith("MemAvailable"))
    return int(line.split()[1]) * 1024


def peak_allocated(device: torch.device) -> int:
    """The most that torch has allocated on a CUDA device at once, and what its graphs keep for themselves, in bytes.

    To the allocator a graph's intermediates are free once they are recorded, and no replay changes its counters; but
    nothing else can have their memory.
    """
    kept = 0
    for segment in torch.cuda.memory_snapshot():
        if segment["device"] == device.index and tuple(segment["segment_pool_id"]) != (0, 0):
            kept += segment["total_size"] - segment["allocated_size"]
    return torch.cuda.max_memory_allocated(device) + kept


def resident_bytes(field: str) -> int:
    """Resident bytes of this process: now (VmRSS), or the most there ever were (VmHWM); off Linux always the most."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return _highest_resident_bytes()
    line = next(line for line in lines if line.startswith(field))
    return int(line.split()[1]) * 1024


def _highest_resident_bytes() -> int:
    # On Linux it would count what the process was before it became another program: a copy of its parent.
    import resource

    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024
