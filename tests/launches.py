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

from ttt_kernels import matmul, tuning
from ttt_kernels.clipped_sgd import triton as clipped_sgd
from ttt_kernels.linear_ce import triton as of_cross_entropy
from ttt_kernels.linear_ce.blockwise import Block
from ttt_kernels.rms_norm import triton as rms_norm
from ttt_kernels.rope import heads as of_heads
from ttt_kernels.rope import triton as rope
from ttt_kernels.swa import triton as kernels
from ttt_kernels.swa import triton_jvp as with_tangents
from ttt_kernels.swiglu import triton as of_swiglu
from ttt_kernels.swiglu import triton_configs

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
    """All orders for (B, Tq, Tk, Hq, Hk, D), and with tangents: some results wanted, some second cotangents given."""
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
    settings = (window, -0.5, key_start)
    along = with_tangents.forward(*call, *seconds, *settings)
    of_dots = tuple(need and t is not None for need, t in zip(needs[1:], seconds, strict=True))
    with_tangents.backward(d_o, q, *call, *seconds, *along, *settings, (*needs[1:], *of_dots))


def swiglu(dtype: torch.dtype, sequences: int | None, rows: int, d: int, columns: int, needs: Needs) -> None:
    """All orders of SwiGLU, for weights of every sequence or shared ones, with some results wanted."""
    own = () if sequences is None else (sequences,)
    x, w_down = torch.zeros(*own, rows, d, dtype=dtype), torch.zeros(*own, d, columns, dtype=dtype)
    inputs = (x, w_down.mT.contiguous(), w_down.mT, w_down)
    passes = of_swiglu._Passes()
    for config in triton_configs.of_products(dtype, d, columns, 90)[1:]:
        passes._fused(config, x, *inputs[1:3], dtype)
    passes._separate(x, *inputs[1:3], dtype)
    passes._separate(x, *inputs[1:3], torch.float16)
    saved = torch.zeros(*own, rows, columns, dtype=dtype)
    of_swiglu.backward(x, *inputs, saved, saved, needs[:4])
    of_swiglu.backward(None, *inputs, saved, saved, needs[:4], saved, saved)
    seconds = [t if need else None for t, need in zip(inputs, needs, strict=False)]
    of_swiglu.double_backward(*seconds, x, *inputs, saved, saved, needs)
    of_swiglu.double_backward(*seconds, x, *inputs, saved, saved, (*needs, True, True))


def linear_ce(factor: torch.dtype, rows: int, cols: int, first_class: int) -> None:
    """All passes of cross-entropy over a block with float32 logits, and factors of their own unless float32 too."""
    logits = torch.zeros(rows, cols)
    factors = logits if factor == torch.float32 else torch.zeros(rows, cols, dtype=factor)
    block = Block(slice(first_class, first_class + cols), logits, logits, factors)
    own, row, passes = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows), of_cross_entropy._Passes()
    for acc in (None, torch.zeros(rows, 24)):
        passes.online(block, own, row, row, row, row, acc)
    passes.d_logits(block, own, row, row)
    passes.second(block, block, own, row, row, row)


def swiglu_and_linear_ce() -> None:
    swiglu(torch.bfloat16, 2, 3, 32, 48, (True,) * 5)
    swiglu(torch.float16, None, 1, 1, 1, (False, True, False, True, True))
    swiglu(torch.float32, 1, 20, 24, 16, (True, False, True, False, False))
    linear_ce(torch.bfloat16, 2, 4096 + 64, 0)
    linear_ce(torch.float16, 1, 1, 1)
    linear_ce(torch.float32, 3, 37, 2**31)


def attention() -> None:
    launch(torch.bfloat16, (2, 20, 30, 4, 2, 64), key_lengths=torch.tensor([3, 30]))
    launch(
        torch.bfloat16, (1, 20, 20, 1, 1, 1), window=1, cu_seqlens=torch.tensor([0, 9, 20]).int(), key_start=1
    )
    launch(torch.float16, (1, 20, 30, 1, 1, 80), key_start=17)
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
            rms_norm.jvp_backward(y, *given[:4], *cotangents, rstd, 1e-6, (*needs, *needs))


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


def branches() -> None:
    """Queries, keys and values of heads of several sizes, to memory of their own and into a cache, and back."""
    for sizes, dtype in (((2, 20, 3, 6, 64), torch.bfloat16), ((1, 1, 3, 1, 80), torch.float16)):
        q, k, v = torch.zeros(sizes, dtype=dtype).unbind(2)
        positions, weight = torch.arange(sizes[1]), torch.ones(sizes[-1])
        rows = torch.zeros(sizes[0], 3 + sizes[1], *sizes[3:], dtype=dtype)[:, 3:]
        for into in (None, (rows, rows)):
            *found, q_rstd, k_rstd = of_heads.forward(q, k, v, positions, weight, weight, 1e-6, 1e4, into)
            of_heads.backward(*found, q, k, positions, weight, weight, q_rstd, k_rstd, 1e4)


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
    warm_up = lambda kernel, grid: lambda *given, **named: kernel.warmup(*given, grid=grid, **named)  # noqa: E731
    with (
        patch.object(JITFunction, "__getitem__", warm_up),
        patch.object(tuning, "run", first),
        patch.object(tuning, "capability", lambda _: 90),
        # On a GPU products have the type of their factors.
        patch.object(matmul, "has_native", lambda _: True),
    ):
        for launches in (attention, norms, rotations, branches, steps, swiglu_and_linear_ce):
            launches()
    print("launched")
