"""The inner loop as one node of autograd: a sweep forward without a graph, and a sweep back that needs little memory.

The sweep back goes from the last mini-batch to the first. Of each it recovers the fast weights and the inner gradient
(engine/rollback.py), builds the graph of reading it, and takes that backwards: the cotangents of its losses, of the new
fast weights and of its keys and values, which later mini-batches have seen, give those of the old fast weights, of
earlier keys and values, of the prefix blocks' output and of all slow weights. The computation of the inner gradient is
not in that graph: it is taken back through tangents (engine/tangents.py). Time is linear in the length, and nothing but
what a rollback keeps, a few vectors a token, and one mini-batch's graph is ever held.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from engine import once
from engine.caches import FixedRows, by_cache, first_seen, limit
from engine.config import TTTConfig
from engine.cotangents import RowCotangents, Totals, leaf
from engine.inner import (
    FastWeights,
    InnerStep,
    by_block,
    flat,
    inner_step,
)
from engine.ops import Ops
from engine.profiling import stage
from engine.replay_sweep import ReplaySweep, replays
from engine.rollback import Rollback
from engine.step_back import Step, step_back
from engine.weights import Fast, SuffixWeights, converted, mapped, tensors
from ttt_kernels.swiglu.reference import Factors
from ttt_kernels.tangents import total


@dataclass
class Loop:
    """What one run of the inner loop is given beside its weights, and what it reports beside its results.

    Attributes:
        weights: the slow weights, as stored.
        positions: (T,) int64. targets: (B, T) int64. lr: inner learning rate.
        first_step: inner steps that were taken before.
        truncate_steps: cotangents of fast weights are dropped at every so many steps; None: never.
        keep_inner_grads: of how many first steps `inner_grads` is wanted.
        norms: a (B,) norm for each step, filled in.
        inner_grads: filled in.
    """

    ops: Ops
    config: TTTConfig
    weights: SuffixWeights
    positions: Tensor
    targets: Tensor
    lr: float
    first_step: int = 0
    truncate_steps: int | None = None
    keep_inner_grads: int = 0
    norms: list[Tensor] = field(default_factory=list)
    inner_grads: list[Fast] = field(default_factory=list)

    @property
    def parts(self) -> list[slice]:
        """The tokens of every mini-batch."""
        size = self.config.mini_batch_size
        return [slice(start, start + size) for start in range(0, self.targets.shape[1], size)]

    def is_cut(self, index: int) -> bool:
        """Whether the gradient stops at the fast weights that step `index` starts from."""
        index += self.first_step
        return self.truncate_steps is not None and index > 0 and index % self.truncate_steps == 0

    def note(self, step: InnerStep) -> None:
        """Takes what is to be reported of a step."""
        self.norms.append(step.norm.detach())
        if len(self.inner_grads) < self.keep_inner_grads:
            self.inner_grads.append(by_block([g.detach() for g in step.grads]))


def run(loop: Loop, x: Tensor, masters: Fast, past: Sequence[Tensor]) -> tuple[Tensor, Fast, list[Tensor]]:
    """Reads x (B, T, d), the prefix blocks' outputs, mini-batch by mini-batch from the fast weights `masters`.

    Args:
        past: keys and values (B, n, H, D) of the tokens before, of every suffix block.

    Returns:
        nll (B, T) of all targets, the fast weights after the last step, and those keys and values (B, n', H, D) of x
        that later tokens may see; differentiable once with respect to x, `masters`, `past` and the slow weights; a
        second time raises.
    """
    slow, count = tensors(loop.weights), len(flat(masters))
    goes_back = torch.is_grad_enabled()
    if replays(loop, x):
        sweep: once.Sweep = ReplaySweep(loop, x, past, masters, goes_back=goes_back)
    else:
        sweep = Sweep(loop, x, past, goes_back=goes_back)
    nll, *results = once.swept(sweep, x, *past, *slow, *flat(masters))
    return nll, by_block(results[:count]), results[count:]


class Sweep:
    """One run of the inner loop: forward once, then back once."""

    def __init__(self, loop: Loop, x: Tensor, past: Sequence[Tensor], *, goes_back: bool) -> None:
        config = loop.config
        self._loop = loop
        self._x = x.detach()
        self._weights = converted(mapped(loop.weights, Tensor.detach), config.torch_dtype)
        self._parts = loop.parts
        self._rollback = Rollback(loop.ops, loop.lr, config.inner_clip) if goes_back else None
        # Fast matrices.
        self._count = 3 * len(loop.weights.suffix)
        self._past = [t.detach() for t in past]
        # Of all tokens, those before x first.
        self._rows = [
            torch.cat((t, t.new_empty(t.shape[0], x.shape[1], *t.shape[2:])), 1) for t in self._past
        ]
        # nll (B, T), slope (B, T, d) and log-sum-exp (B, T) of all tokens, once they are known.
        self._head: list[Tensor] = []

    @property
    def _known_rows(self) -> int:
        return self._past[0].shape[1]

    @torch.no_grad()
    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        """nll (B, T), the last fast weights, and what later tokens may see of every block's keys and values."""
        loop = self._loop
        fast = FastWeights.of(by_block(given[-self._count :]), loop.config)
        results: list[tuple[Tensor, ...]] = []
        for index in range(len(self._parts)):
            fast = self._read(index, fast, results)
        self._head = [torch.cat(parts, 1) for parts in zip(*results, strict=True)]
        seen = limit(loop.config.window, self._x.shape[1])
        return self._head[0].clone(), *flat(fast.masters), *(t[:, t.shape[1] - seen :] for t in self._rows)

    def backward(self, *cotangents: Tensor | None) -> list[Tensor | None]:
        """Cotangents of x, of earlier keys and values, of every slow weight and of the first fast weights."""
        d_nll, *rest = cotangents
        weights = mapped(self._weights, leaf)
        totals = Totals(tensors(weights), [t.dtype for t in tensors(self._loop.weights)])
        d_x = torch.empty_like(self._x)
        if d_nll is None:
            d_nll = torch.zeros_like(self._head[0])
        d_rows = RowCotangents(self._loop.config.mini_batch_size)
        d_rows.add_last(self._x.shape[1], rest[self._count :])
        d_fast = list(rest[: self._count])
        for index in reversed(range(len(self._parts))):
            part = self._parts[index]
            with stage("inner step back"):
                d_x[:, part], d_fast = self._back(index, weights, d_nll[:, part], d_fast, d_rows, totals)
            if self._loop.is_cut(index):
                d_fast = [None] * len(d_fast)
        return [d_x, *d_rows.before(self._past), *totals.found, *d_fast]

    def _read(self, index: int, fast: FastWeights, results: list[tuple[Tensor, ...]]) -> FastWeights:
        """Takes step `index` for the first time; `results` gets the head's."""
        factors: list[Factors] | None = None if self._rollback is None else []
        with stage("inner step"):
            step = self._step(index, fast, factors)
        if self._rollback is not None:
            assert factors is not None
            self._rollback.keep(step, factors)
        self._loop.note(step)
        results.append(step.read[:3])
        return step.fast

    def _back(
        self,
        index: int,
        weights: SuffixWeights,
        d_nll: Tensor,
        d_fast: list[Tensor | None],
        d_rows: RowCotangents,
        totals: Totals,
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Takes step `index` back: cotangents of its x and of the fast weights before it; the others are summed up."""
        assert self._rollback is not None
        loop, part = self._loop, self._parts[index]
        seen = self._seen(part)
        past = [t[:, self._in_rows(slice(seen.start, part.start))] for t in self._rows]
        own = [t[:, self._in_rows(part)] for t in self._rows]
        step = Step(
            self._x[:, part], loop.positions[part], loop.targets[:, part], past, self._rollback.before(),
            self._known(part),
        )  # fmt: skip
        found = step_back(
            loop.ops, loop.config, weights, loop.lr, step, d_nll, d_fast, d_rows.pop(index, own)
        )
        d_rows.add(seen.start, found.past)
        totals.add(found.slow)
        masters = flat(step.before.masters)
        fast = [total(d, f.to(w.dtype)) for d, f, w in zip(d_fast, found.fast, masters, strict=True)]
        return found.x, fast

    def _step(self, index: int, fast: FastWeights, factors: list[Factors] | None) -> InnerStep:
        loop, part = self._loop, self._parts[index]
        own, seen = self._in_rows(part), self._in_rows(self._seen(part))
        caches = [FixedRows(*pair, own.start, seen.start) for pair in by_cache(self._rows)]
        return inner_step(
            loop.ops, loop.config, self._weights, fast, self._x[:, part], loop.positions[part],
            loop.targets[:, part], caches, loop.lr, kept=factors,
        )  # fmt: skip

    def _known(self, part: slice) -> list[Tensor]:
        """The head's results for a mini-batch that was read before, where the backend can use them."""
        return [t[:, part] for t in self._head] if self._loop.ops.takes_known else []

    def _seen(self, part: slice) -> slice:
        """The tokens that a mini-batch's queries may see; those before x count from -1 down."""
        return slice(first_seen(part.start, self._loop.config.window, self._known_rows), part.stop)

    def _in_rows(self, part: slice) -> slice:
        """Where in the rows of keys and values tokens are."""
        return slice(part.start + self._known_rows, part.stop + self._known_rows)
