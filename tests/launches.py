"""Launches Triton kernels as for a GPU of sm_90, up to machine code: `python tests/launches.py`.

What a real launch does with its arguments (numbers that are 1, tensors that are missing, strides) happens neither in
the interpreter nor in compilation from given types. No GPU is needed: Triton is told of one that is not there.
"""

import os
from contextlib import nullcontext
from typing import Any
from unittest.mock import Mock, patch

os.environ["TRITON_INTERPRET"] = "0"

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from ttt_kernels import tuning
from ttt_kernels.clipped_sgd import triton as clipped_sgd
from ttt_kernels.rms_norm import triton as rms_norm
from ttt_kernels.rope import triton as rope
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


def attention() -> None:
    launch(torch.bfloat16, (2, 20, 30, 4, 2, 64), key_lengths=torch.tensor([3, 30]))
    launch(
        torch.bfloat16, (1, 20, 20, 1, 1, 1), window=1, cu_seqlens=torch.tensor([0, 9, 20]).int(), key_start=1
    )
    launch(torch.float32, (1, 1, 1, 1, 1, 16), window=None)
    for i in range(3):
        some = tuple(j == i for j in range(3))
        launch(torch.float16, (1, 20, 20, 2, 1, 16), needs=(False, *some), given=some, keep_rest=i > 0)


def norms() -> None:
    """All orders of RMSNorm, with some results wanted and cotangents given, of rows of one and more strides."""
    wide = torch.zeros(2, 3, 6, 64, dtype=torch.bfloat16)
    long = torch.zeros(2, 5000)
    for x, weight, residual, missing in (
        (wide[:, :, :4], torch.ones(64), None, None),
        (wide.transpose(1, 2), torch.ones(64).bfloat16(), wide.transpose(1, 2), 0),
        (torch.zeros(1, 1), torch.ones(1), torch.zeros(1, 1), 1),
        (torch.zeros(40, 768).half(), torch.ones(768).half(), None, 2),
        (long, long[0], None, None),
    ):
        y, rstd = rms_norm.forward(x, weight, residual, 1e-6)
        given = (y, x, weight, residual, rstd, 1e-6)
        for needs in ((True, True, True), (False, True, False), (True, False, False)):
            rms_norm.backward(*given, needs)
            cotangents = [None if i == missing else t for i, t in enumerate((x, weight, y))]
            rms_norm.double_backward(*cotangents, *given, (*needs, True))


def rotations() -> None:
    """Both pairings, heads of several sizes and layouts, and both kinds of positions."""
    for x, interleaved in (
        (torch.zeros(2, 3, 6, 64).bfloat16()[:, :, 1:4], True),
        (torch.zeros(1, 3, 1, 2), True),
        (torch.zeros(2, 5, 4, 80).half().transpose(1, 2), False),
    ):
        positions = torch.arange(x.shape[1])
        for given in (positions, positions.expand(x.shape[:2]), positions[:, None].expand(-1, len(x)).T):
            rope.forward(x, given, 1e4, interleaved)
            rope.backward(x, x, given, 1e4, interleaved, (True,))


def steps() -> None:
    """All orders of clipped SGD and the step in place: tuples of one and more, rates as numbers and in memory."""
    on_gpu = patch.object(clipped_sgd, "number", lambda value: value)
    for shapes, copy_dtype, max_norm in (
        (((64, 64),), torch.bfloat16, 1.0),
        (((5,), (0,), (1,), (40, 3)), None, None),
        (((1,),), torch.float64, 0.1),
    ):
        weights, grads, cotangents = ([torch.zeros(2, *shape) for shape in shapes] for _ in range(3))
        rate, active = torch.tensor(0.5), torch.ones(2, dtype=torch.bool)
        given = (weights, grads, rate, max_norm, copy_dtype)
        for in_memory in (False, True):
            with on_gpu if in_memory else nullcontext():
                _, norm, copies = clipped_sgd.forward(*given)
                clipped_sgd.update_(weights, grads, rate, max_norm, copies or None, active)
                for needs in ((True, True, True), (True, False, False), (False, True, False)):
                    clipped_sgd.backward(cotangents, norm, copies, *given, needs)
                for g_grads, g_rate, needs in (
                    (grads, rate, (True,) * 6),
                    (None, rate, (True, False, False, False, True, False)),
                    (grads, None, (False, True, True, True, False, True)),
                ):
                    seconds = (weights if in_memory else None, g_grads, g_rate)
                    clipped_sgd.double_backward(*seconds, cotangents, norm, copies, *given, needs)


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
        for launches in (attention, norms, rotations, steps):
            launches()
    print("launched")
