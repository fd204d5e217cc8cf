"""Launches attention's Triton kernels as for a GPU of sm_90, up to machine code: `python tests/launches.py`.

What a real launch does with its arguments (numbers that are 1, tensors that are missing, strides) happens neither in
the interpreter nor in compilation from given types. No GPU is needed: Triton is told of one that is not there.
"""

import os
from typing import Any
from unittest.mock import Mock, patch

os.environ["TRITON_INTERPRET"] = "0"

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from ttt_kernels import tuning
from ttt_kernels.swa import triton as kernels

Needs = tuple[bool, ...]


def launch(
    dtype: torch.dtype,
    sizes: tuple[int, ...],
    needs: Needs = (True, True, True, True),
    given: Needs = (True, True, True),
    key_lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    window: int | None = 7,
    key_start: int = 0,
    keep_rest: bool = True,
) -> None:
    """All orders for (B, Tq, Tk, Hq, Hk, D), with some results wanted and some second cotangents given."""
    b, tq, tk, heads, kv_heads, d = sizes
    q, k, v = (torch.zeros(b, t, h, d, dtype=dtype) for t, h in ((tq, heads), (tk, kv_heads), (tk, kv_heads)))
    call = (q, k, v, key_lengths, cu_seqlens)
    kept = kernels.forward(*call, window, 0.5, keep_rest=keep_rest)
    saved = (*kept, window, 0.5, key_start, keep_rest)
    d_o = torch.zeros((), dtype=dtype).expand(q.shape)
    kernels.backward(d_o, *call, *saved, needs[1:])
    cotangents = (q, k[:, key_start:], v[:, key_start:])
    seconds = [t if some else None for t, some in zip(cotangents, given, strict=True)]
    kernels.double_backward(*seconds, d_o, *call, *saved, needs)


def main() -> None:
    launch(torch.bfloat16, (2, 20, 30, 4, 2, 64), key_lengths=torch.tensor([3, 30]))
    launch(
        torch.bfloat16, (1, 20, 20, 1, 1, 1), window=1, cu_seqlens=torch.tensor([0, 9, 20]).int(), key_start=1
    )
    launch(torch.float32, (1, 1, 1, 1, 1, 16), window=None)
    for i in range(3):
        some = tuple(j == i for j in range(3))
        launch(torch.float16, (1, 20, 20, 2, 1, 16), needs=(False, *some), given=some, keep_rest=i > 0)


def first(kernel: str, key: object, configs: Any, launch: tuning.Launch) -> None:
    """`tuning.run` where nothing can be timed."""
    launch(configs[0])


if __name__ == "__main__":
    device = Mock()
    device.get_current_target.return_value = GPUTarget("cuda", 90, 32)
    device.get_current_device.return_value = 0
    driver.set_active(device)
    warm_up = lambda kernel, grid: lambda **given: kernel.warmup(grid=grid, **given)  # noqa: E731
    with (
        patch.object(JITFunction, "__getitem__", warm_up),
        patch.object(tuning, "run", first),
        patch.object(tuning, "capability", lambda _: 90),
    ):
        main()
    print("launched")
