"""What bounds the speed of an operator: matrix products, or the memory that it reads and writes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from bench import machine
from bench.output import progress


@dataclass(frozen=True)
class Ceiling:
    """How a speed is counted, and what it is compared with.

    unit: what is counted, as the JSON names it. key, share: the JSON's names of the best rate of this machine and of
    the part of it that was reached. words, rate, heading: the same for people.
    """

    unit: str
    key: str
    share: str
    words: str
    rate: str
    heading: str
    measure: Callable[[torch.dtype, torch.device], float]

    def useful(self, problem: Any, order: str) -> int:
        """What an order has to do at least."""
        count: int = getattr(problem, self.unit)(order)
        return count


def _copy_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Bytes per second read and written by a copy, shown while it is measured."""
    progress("copy ")
    result = machine.copy_bandwidth(device)
    progress(f"{result / 1e9:.1f} GB/s\n")
    return result


CEILINGS = {
    "products": Ceiling(
        "flops",
        "peak_flops_per_s",
        "share_of_peak",
        "matrix products",
        "GFLOP/s",
        "of products",
        machine.peak_rate,
    ),
    # The copy's target was written before; results of an operator are often new pages, which cost more.
    "copy": Ceiling(
        "bytes",
        "copy_bytes_per_s",
        "share_of_copy",
        "a copy into memory in use",
        "GB/s",
        "of copy",
        _copy_rate,
    ),
}
