"""What the device can do at best: matrix products and copies, the ceilings of everything else."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from bench import machine
from bench.gpu_context import Context
from bench.timing import repeated_seconds

PRODUCT = 8192
COPY_BYTES = 4 * 2**30
REPEAT = 15


def measure(context: Context) -> dict[str, Any]:
    """Operations per second of products, and bytes per second, read and written together, of a copy.

    On CUDA the medians of products of random matrices of 8192 and of copies of 2 GiB, both larger than the caches.
    """
    device = context.device
    if device.type != "cuda":
        return {
            "product_flops_per_s": machine.product_rate(context.torch_dtype, device),
            "copy_bytes_per_s": machine.copy_bandwidth(device),
        }
    x, weight = (
        torch.randn(PRODUCT, PRODUCT, device=device, dtype=torch.float32).to(context.torch_dtype)
        for _ in range(2)
    )
    out = torch.empty_like(x)
    forward = _median(lambda: torch.mm(x, weight.T, out=out), device)
    backward = _median(lambda: torch.mm(x, weight, out=out), device)
    source = torch.randint(256, (COPY_BYTES // 2,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    copy = _median(lambda: target.copy_(source), device)
    return {
        "product_flops_per_s": 2.0 * PRODUCT**3 / min(forward, backward),
        "product_flops_per_s_by_layout": {
            "x W^T": 2.0 * PRODUCT**3 / forward,
            "x W": 2.0 * PRODUCT**3 / backward,
        },
        "copy_bytes_per_s": COPY_BYTES / copy,
    }


def _median(work: object, device: torch.device) -> float:
    assert callable(work)
    for _ in range(3):
        work()
    return statistics.median(repeated_seconds(work, device, REPEAT))
