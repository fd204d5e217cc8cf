"""What this machine can do at best, measured with torch itself: the ceilings of all results."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch

from bench.output import progress
from bench.timing import best_seconds
from ttt_kernels.matmul import has_native

CPU = torch.device("cpu")
# (rows, inner, columns): a cube, and products of a 125m's width over a mini-batch and over a larger slab.
PRODUCT_SHAPES = ((2048, 2048, 2048), (1024, 768, 4096), (4096, 768, 4096))
# On a GPU those are over before they are under way.
LARGE_PRODUCT_SHAPES = ((8192, 8192, 8192), (8192, 4096, 16384))
BANDWIDTH_BYTES = 512 * 2**20


def product_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Operations per second of the fastest of several large, well-shaped matrix products of `dtype`."""
    if device.type == "cpu" and not has_native(dtype):
        # Widened to float32, which loses nothing, they are a hundred times faster than torch's own.
        dtype = torch.float32
    shapes = PRODUCT_SHAPES if device.type == "cpu" else LARGE_PRODUCT_SHAPES
    return max(rate for shape in shapes for rate in _product_rates(*shape, dtype, device))


def peak_rate(dtype: torch.dtype, device: torch.device) -> float:
    """`product_rate`, shown while it is measured."""
    progress("matrix products ")
    result = product_rate(dtype, device)
    progress(f"{result / 1e9:.1f} GFLOP/s\n")
    return result


def _product_rates(
    rows: int, inner: int, columns: int, dtype: torch.dtype, device: torch.device
) -> tuple[float, float]:
    """Of x W^T, as in a linear layer's forward, and of y W, as in its backward, W being (columns, inner)."""
    x = torch.randn(rows, inner, device=device).to(dtype)
    weight = torch.randn(columns, inner, device=device).to(dtype)
    y = torch.empty(rows, columns, dtype=dtype, device=device)
    forward = best_seconds(lambda: torch.mm(x, weight.T, out=y), device)
    backward = best_seconds(lambda: torch.mm(y, weight, out=x), device)
    operations = 2.0 * rows * inner * columns
    return operations / forward, operations / backward


def read_bandwidth(device: torch.device = CPU) -> float:
    """Bytes per second of reading memory much larger than the caches, by the fastest of three ways."""
    # Written, not just allocated: pages that were never touched are all one page of zeros, read from a cache.
    data = torch.ones(BANDWIDTH_BYTES // 4, dtype=torch.float32, device=device)
    matrix = data.view(-1, 4096)
    vector = torch.ones(4096, device=device)
    ways = (lambda: data.sum(), lambda: data.amax(), lambda: torch.mv(matrix, vector))
    return BANDWIDTH_BYTES / min(best_seconds(way, device) for way in ways)


def copy_bandwidth(device: torch.device = CPU) -> float:
    """Bytes per second read and written, together, by a copy of memory much larger than the caches."""
    source = torch.ones(BANDWIDTH_BYTES // 8, dtype=torch.float32, device=device)
    target = torch.ones_like(source)
    return BANDWIDTH_BYTES / best_seconds(lambda: target.copy_(source), device)


def describe(device: torch.device = CPU) -> dict[str, str | int]:
    """What was measured on: processor, threads, vector instructions, torch, and the GPU if there is one."""
    facts: dict[str, str | int] = {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device.type == "cuda":
        facts["gpu"] = torch.cuda.get_device_name(device)
        facts["cuda"] = str(torch.version.cuda)
        if find_spec("triton") is not None:
            facts["triton"] = version("triton")
    return facts


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
