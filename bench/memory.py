"""How much memory a piece of work needs at its peak, in a process that does nothing else."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import torch


class PeakMemory:
    """
    Counts from where it is made: memory that torch and Python themselves hold at that moment is left out.

    On CUDA it is what torch allocated at most. On Linux it is the most that the process had resident since
    `restart`; elsewhere the most since the process began.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.baseline = _resident_bytes("VmRSS")

    def restart(self) -> None:
        """Forgets peaks reached so far."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return
        with contextlib.suppress(OSError):
            # 5: set the resident high-water mark back to what is resident now; see proc(5).
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def peak_bytes(self) -> int:
        """The most that was held at once since `restart`, in bytes."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        return max(0, _resident_bytes("VmHWM") - self.baseline)


def _resident_bytes(field: str) -> int:
    """Resident bytes of this process: now (VmRSS), or the most there ever were (VmHWM)."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return _highest_resident_bytes()
    line = next(line for line in lines if line.startswith(field))
    return int(line.split()[1]) * 1024


def _highest_resident_bytes() -> int:
    import resource

    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024
