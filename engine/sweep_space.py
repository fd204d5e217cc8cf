"""Static memory for the steps of training's inner loop, and the graphs recorded over it."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from engine.config import TTTConfig
from engine.inner import FastWeights, by_block
from engine.ops import Ops
from engine.recordings import Recordings, lasting
from engine.weights import Fast, SuffixWeights, mapped, tensors
from ttt_kernels.matmul import operand
from ttt_kernels.swiglu.reference import Factors

if TYPE_CHECKING:
    from engine.model import TTTModel


class SweepSpace(Recordings):
    """What one step reads and writes, forward and back; a sweep copies its numbers here and results from here.

    Keys and values end at the same row whatever is known of the past: with W - 1 rows for earlier tokens.

    Attributes:
        weights: the slow weights in the compute dtype. fast: fp32 masters and their copies, changed in place.
        x, positions, targets: (B, b, d), (b,) and (B, b).
        rows: (2 S, B, W - 1 + b, H, D), keys and values of every suffix block by turns.
        lr: 0-dim float64, which changes in the course of training.
        nll, slope, lse: (B, b), (B, b, d) and (B, b), the head's results. norm, rate: (B,).
        kept: (n,), all that a step keeps for the way back; `factors` are its parts, block by block.
        d_x, d_nll: cotangents of x and of nll. d_fast: of the fast matrices after the step, then before it.
        d_rows: as `rows`, fp32: the sums of the steps done so far. totals: as `weights`, in fp32 at least.
    """

    @lasting()
    def __init__(self, config: TTTConfig, stored: SuffixWeights, masters: Fast, like: Tensor) -> None:
        """`stored`: the slow weights; `masters` (B, ...) and `like` (B, T, d) are of the sweeps to come."""
        super().__init__(like.device)
        assert config.window is not None
        batch, size, d, i = len(like), config.mini_batch_size, config.hidden_size, config.intermediate_size
        dtype, device = like.dtype, like.device
        self.weights = mapped(
            stored, lambda t: torch.empty_like(t, dtype=t.dtype if t.dim() == 1 else dtype).contiguous()
        )
        self.totals = [
            t.new_zeros(t.shape, dtype=torch.promote_types(t.dtype, torch.float32)) for t in tensors(stored)
        ]
        own = [torch.empty(t.shape, dtype=t.dtype, device=device) for block in masters for t in block]
        self.fast = FastWeights.of(by_block(own), config)
        self.x, self.d_x = (like.new_zeros(batch, size, d) for _ in range(2))
        self.positions = torch.zeros(size, dtype=torch.int64, device=device)
        self.targets = torch.zeros(batch, size, dtype=torch.int64, device=device)
        wide = own[0].dtype
        self.nll, self.lse, self.d_nll = (like.new_zeros(batch, size, dtype=wide) for _ in range(3))
        self.slope = like.new_zeros(batch, size, d, dtype=wide)
        self.norm, self.rate = (like.new_zeros(batch, dtype=wide) for _ in range(2))
        shape = (2 * len(masters), batch, config.window - 1 + size, config.num_heads, config.head_dim)
        self.rows = like.new_zeros(shape)
        self.d_rows = like.new_zeros(shape, dtype=wide)
        self.d_fast = [torch.zeros_like(t) for t in own]
        widths = (d, d, i, i, i)
        dtype = operand(like[:0]).dtype
        self.kept = torch.zeros(len(masters) * batch * size * sum(widths), dtype=dtype, device=device)
        parts = iter(self.kept.split([batch * size * width for _ in masters for width in widths]))
        self.factors = [Factors(*(next(parts).view(batch, size, w) for w in widths)) for _ in masters]
        self.lr = torch.zeros((), dtype=torch.float64, device=device)
        self._owner: weakref.ref[object] | None = None

    def load(self, owner: object, stored: SuffixWeights, lr: float) -> None:
        """Brings in the slow weights of a sweep and its inner rate, unless they are those that are here."""
        if self._owner is None or self._owner() is not owner:
            for mine, theirs in zip(tensors(self.weights), tensors(stored), strict=True):
                mine.copy_(theirs)
            self.lr.fill_(lr)
            self._owner = weakref.ref(owner)

    def load_fast(self, masters: Sequence[Tensor]) -> None:
        """Brings in fast weights (B, ...)."""
        versions: list[Any] = [self.fast.masters]
        if self.fast.copies is not self.fast.masters:
            versions.append(self.fast.copies)
        for version in versions:
            for mine, theirs in zip((t for block in version for t in block), masters, strict=True):
                mine.copy_(theirs)


_spaces: weakref.WeakKeyDictionary[TTTModel, tuple[object, SweepSpace]] = weakref.WeakKeyDictionary()


def space_for(ops: Ops, config: TTTConfig, stored: SuffixWeights, masters: Fast, like: Tensor) -> SweepSpace:
    """The space of a model's sweeps, made anew where the last one was for others; arguments as for `SweepSpace`."""
    dtypes = tuple(t.dtype for t in tensors(stored))
    kind = (config, ops.backends, like.dtype, like.device, len(like), dtypes)
    found = _spaces.get(ops.model)
    if found is None or found[0] != kind:
        # Before the new one, so that both never take up memory at once.
        _spaces.pop(ops.model, None)
        found = None
        _spaces[ops.model] = found = (kind, SweepSpace(config, stored, masters, like))
    return found[1]
