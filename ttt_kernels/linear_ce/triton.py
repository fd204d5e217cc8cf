"""Cross-entropy of a linear layer with the Triton passes of triton_kernels.py between its products.

A first call imports them.
"""

from functools import partial
from typing import Any

from torch import Tensor

from ttt_kernels.linear_ce import blockwise
from ttt_kernels.linear_ce.blockwise import Block
from ttt_kernels.linear_ce.triton_configs import config
from ttt_kernels.registry import Kernel
from ttt_kernels.triton_launch import launch


def _run(name: str, kernel: Any, block: Block, **arguments: Any) -> None:
    """Launches a kernel with a program per row of a block."""
    rows, cols = block.logits.shape
    if rows:
        shared = {
            "p_logits": block.logits,
            "first": block.part.start,
            "cols": cols,
            "ALIGNED": cols % 16 == 0,
        }
        launch(
            f"linear_ce.{name}", kernel, lambda _: rows, (config(cols),), (), block.logits.device,
            {**shared, **arguments},
        )  # fmt: skip


class _Passes:
    """As `blockwise.Passes`."""

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
        from ttt_kernels.linear_ce import triton_kernels

        _run("online", triton_kernels.online, block, p_factor=None if acc is None else block.factor, p_own=own,
            p_max=maximum, p_sum=sums, p_others=others, p_picked=picked, p_acc=acc,
            width=0 if acc is None else acc.shape[1],
        )  # fmt: skip

    def d_logits(self, block: Block, own: Tensor, lse: Tensor, d: Tensor) -> None:
        from ttt_kernels.linear_ce import triton_kernels

        _run("d_logits", triton_kernels.d_logits, block, p_factor=block.factor, p_own=own, p_lse=lse, p_d=d)

    def second(self, block: Block, along: Block, own: Tensor, lse: Tensor, mean: Tensor, d: Tensor) -> None:
        from ttt_kernels.linear_ce import triton_kernels

        _run("second", triton_kernels.second, block, p_along=along.logits, p_factor=block.factor,
            p_factor_along=along.factor, p_own=own, p_lse=lse, p_mean=mean, p_d=d,
        )  # fmt: skip


forward: Kernel = partial(blockwise.forward, _Passes())
backward: Kernel = partial(blockwise.backward, _Passes())
double_backward: Kernel = partial(blockwise.double_backward, _Passes())
slope_forward: Kernel = partial(blockwise.slope_forward, _Passes())
slope_backward: Kernel = partial(blockwise.slope_backward, _Passes())
