"""Decoding on a GPU: a token's way through the whole stack, replayed from a CUDA graph over the state's own memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from engine.recordings import Recordings, lasting
from ttt_kernels.decode import Decoded, Stack

Reads = Callable[[Tensor, Tensor, Tensor], Decoded]
"""Of token (B,), position (B,) and visible (n_layers, 2), int64 on one device; see `ttt_kernels.decode.step`."""


class DecodeGraph(Recordings):
    """Reads one token of every sequence through a stack: the first as it comes, those after it by replaying that."""

    @lasting()
    def __init__(self, stack: Stack, reads: Reads) -> None:
        """`reads`: what a token's reading computes, of tensors alone."""
        super().__init__(stack.head.device)
        self._reads = reads
        batch = stack.batch_size
        self._token = torch.zeros(batch, dtype=torch.int64, device=stack.head.device)
        # Together, so that one copy brings them to the device.
        self._numbers = self._token.new_zeros(batch + 2 * len(stack.layers))
        self._position, self._visible = self._numbers[:batch], self._numbers[batch:].view(-1, 2)
        self._out: Decoded | None = None

    def __call__(self, token: Tensor, position: Sequence[int], visible: Sequence[int]) -> Decoded:
        """Reads token (B,); `visible` are row and count of each layer in turn. Results are overwritten by the next."""
        with self.in_turn():
            self._token.copy_(token)
            # Nobody waits: what is not pinned has been read when the call returns.
            self._numbers.copy_(torch.tensor([*position, *visible]), non_blocking=True)
            self.run(self.lanes.main, (), self._read)
        assert self._out is not None
        return self._out

    def _read(self) -> None:
        out = self._reads(self._token, self._position, self._visible)
        if self._out is None:
            with lasting():
                self._out = Decoded(*(torch.empty_like(t) for t in out))
        for mine, theirs in zip(self._out, out, strict=True):
            mine.copy_(theirs)
