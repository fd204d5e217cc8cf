"""Who computes attention: this library's backends, and what a user of torch would otherwise call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from bench.attention_problem import Inputs, Problem
from bench.kernel_contenders import OWN, Contender, Work, by_autograd
from bench.kernel_problem import Draw
from bench.timing import best_seconds
from engine.config import DTYPES
from ttt_kernels import sliding_window_attention
from ttt_kernels.swa import operator

Function = Callable[[Tensor, Tensor, Tensor], Tensor]


class Attention(Contender):
    """A way to compute attention, as a function that autograd differentiates."""

    heads_first = True
    """Whether it takes (B, H, T, D), and is given that contiguous, instead of (B, T, H, D)."""

    def arrange(self, x: Inputs) -> Inputs:
        """The inputs, (B, T, H, D), as it takes them."""
        return Inputs(*(t.transpose(1, 2).contiguous() for t in x)) if self.heads_first else x

    def rearrange(self, results: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Its results as (B, T, H, D)."""
        return tuple(t.transpose(1, 2) for t in results) if self.heads_first else results

    def attention(self, problem: Problem, x: Inputs) -> Function:
        """Attention of q, k and v, with all that a user makes once beforehand, such as a mask."""
        raise NotImplementedError

    def prepare(self, problem: Problem, x: Inputs, order: str) -> Work:
        function = self.attention(problem, x)
        draw = Draw((x.q, x.k, x.v), (), (x.d_o,), (x.a, x.b, x.c), (True,) * 3)
        return by_autograd(lambda q, k, v: (function(q, k, v),), draw, order)


class Own(Attention):
    """This library on one backend; single orders by the kernels themselves, all of them through autograd."""

    heads_first = False

    def __init__(self, backend: str) -> None:
        self.backend = backend

    def attention(self, problem: Problem, x: Inputs) -> Function:
        return lambda q, k, v: sliding_window_attention(q, k, v, window=problem.window, backend=self.backend)

    def prepare(self, problem: Problem, x: Inputs, order: str) -> Work:
        if order == "all":
            return super().prepare(problem, x, order)
        given: tuple[Any, ...] = (x.q, x.k, x.v, None, None)
        settings = (problem.window, problem.scale, 0, order != "forward")
        if order == "forward":
            return lambda: operator.forward(*given, *settings, backend=self.backend)[:1]
        kept = operator.forward(*given, *settings, backend=self.backend)
        if order == "backward":
            return lambda: operator.backward(
                x.d_o, *given, *kept, *settings, needs=(True,) * 3, backend=self.backend
            )
        kernels = operator.kernels["reference"] | operator.kernels[self.backend]
        return lambda: kernels["double_backward"](x.a, x.b, x.c, x.d_o, *given, *kept, *settings, (True,) * 4)


class Sdpa(Attention):
    """scaled_dot_product_attention by torch's fused kernels, with a mask tensor for the window."""

    orders: tuple[str, ...] = ("forward", "backward")

    def __init__(self, *kernels: SDPBackend) -> None:
        self.kernels = list(kernels)

    def attention(self, problem: Problem, x: Inputs) -> Function:
        mask = band(problem.length, problem.length, x.q.device, problem.window) if problem.windowed else None
        return lambda q, k, v: self.attend(q, k, v, mask)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        grouped = q.shape[1] != k.shape[1]
        if grouped and q.is_cuda and SDPBackend.EFFICIENT_ATTENTION in self.kernels:
            # That kernel wants every head to have keys of its own.
            k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
            grouped = False
        with sdpa_kernel(self.kernels):
            return scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped
            )

    def estimated_bytes(self, problem: Problem, order: str) -> int:
        # The mask while it is made, and what torch makes of it in the inputs' dtype.
        return problem.length**2 * (3 + DTYPES[problem.dtype].itemsize) if problem.windowed else 0


class SdpaMath(Sdpa):
    """scaled_dot_product_attention by plain formulas: the only one of torch's that differentiates twice."""

    orders = ("double-backward", "all")
    # Measured on a CPU in float32, rounded up: matrices of scores that are alive at once.
    MATRICES = 16

    def __init__(self) -> None:
        super().__init__(SDPBackend.MATH)

    def estimated_bytes(self, problem: Problem, order: str) -> int:
        return super().estimated_bytes(problem, order) + self.MATRICES * problem.score_bytes()


class SdpaTiles(Sdpa):
    """The fused kernel on one block of queries and its keys after the other; the best of some block sizes."""

    orders = ("forward",)
    SIZES = (128, 256, 512)

    def refusal(self, problem: Problem) -> str | None:
        return None if problem.windowed else "without a window one causal call does the same"

    def attention(self, problem: Problem, x: Inputs) -> Function:
        candidates = [self.tiled(problem, size, x.q.device) for size in self.SIZES]

        def seconds(candidate: Function) -> float:
            return best_seconds(lambda: candidate(x.q, x.k, x.v), x.q.device, at_least=0)

        return min(candidates, key=seconds)

    def tiled(self, problem: Problem, size: int, device: torch.device) -> Function:
        assert problem.window is not None
        before = problem.window - 1
        mask = band(size, size + before, device, problem.window)

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out = torch.empty_like(q)
            for begin in range(0, problem.length, size):
                end = min(begin + size, problem.length)
                rows, keys = slice(begin, end), slice(max(0, begin - before), end)
                part = mask[: end - begin, keys.start - begin + before : end - begin + before]
                out[:, :, rows] = self.attend(q[:, :, rows], k[:, :, keys], v[:, :, keys], part)
            return out

        return attend

    def estimated_bytes(self, problem: Problem, order: str) -> int:
        return 0


class Flex(Attention):
    """flex_attention with a block mask, compiled."""

    orders = ("forward", "backward")
    compiled = True

    def attention(self, problem: Problem, x: Inputs) -> Function:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        window = problem.window or problem.length

        def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key <= query) & (key > query - window)

        mask = create_block_mask(sees, None, None, problem.length, problem.length, device=x.q.device.type)
        compiled = torch.compile(flex_attention, dynamic=False)
        grouped = problem.heads != problem.kv_heads
        return lambda q, k, v: compiled(q, k, v, block_mask=mask, enable_gqa=grouped)

    def estimated_bytes(self, problem: Problem, order: str) -> int:
        # Its block mask is made from masks of all pairs (measured: 10 bytes a pair).
        return 10 * problem.length**2


def band(queries: int, keys: int, device: torch.device, window: int | None) -> Tensor:
    """(queries, keys) bool: who sees whom, where the last query stands at the last key."""
    position = torch.arange(keys - queries, keys, device=device)[:, None]
    key = torch.arange(keys, device=device)
    causal = key <= position
    return causal if window is None else causal & (key > position - window)


FUSED = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-cudnn": SDPBackend.CUDNN_ATTENTION,
}


def contender(name: str) -> Attention:
    """The contender of that name."""
    if name.startswith(OWN):
        return Own(name.removeprefix(OWN))
    if name in FUSED:
        return Sdpa(FUSED[name])
    if name == "sdpa-tiles":
        return SdpaTiles(*FUSED.values())
    return {"sdpa-math": SdpaMath, "flex": Flex}[name]()
