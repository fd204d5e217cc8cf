"""Cross-entropy of a linear layer with the C++ passes of csrc/cpu/linear_ce.cpp between its products."""

from functools import partial

from torch import Tensor

from ttt_kernels.extension import dtype_code, kernels
from ttt_kernels.linear_ce import blockwise
from ttt_kernels.linear_ce.blockwise import Block
from ttt_kernels.registry import Kernel


def _located(block: Block) -> tuple[int, int, int, int, int]:
    """Type, address, rows and columns of a block's logits, and its first class."""
    logits = block.logits
    return dtype_code(logits.dtype), logits.data_ptr(), *logits.shape, block.part.start


class _Passes:
    """As `blockwise.Passes`; factors are written over the logits."""

    def online(
        self,
        block: Block,
        own: Tensor,
        maximum: Tensor,
        sums: Tensor,
        others: Tensor,
        picked: Tensor,
        acc: Tensor | None,
    ) -> None:
        width = 0 if acc is None else acc.shape[1]
        kernels().linear_ce_online(
            *_located(block), *(t.data_ptr() for t in (own, maximum, sums, others, picked)),
            0 if acc is None else acc.data_ptr(), width,
        )  # fmt: skip

    def d_logits(self, block: Block, own: Tensor, lse: Tensor, d: Tensor) -> None:
        kernels().linear_ce_d_logits(*_located(block), own.data_ptr(), lse.data_ptr(), d.data_ptr())

    def second(self, block: Block, along: Block, own: Tensor, lse: Tensor, mean: Tensor, d: Tensor) -> None:
        code, logits, rows, cols, first = _located(block)
        kernels().linear_ce_second(
            code, logits, along.logits.data_ptr(), rows, cols, first,
            *(t.data_ptr() for t in (own, lse, mean, d)),
        )  # fmt: skip


forward: Kernel = partial(blockwise.forward, _Passes())
backward: Kernel = partial(blockwise.backward, _Passes())
double_backward: Kernel = partial(blockwise.double_backward, _Passes())
slope_forward: Kernel = partial(blockwise.slope_forward, _Passes())
slope_backward: Kernel = partial(blockwise.slope_backward, _Passes())
