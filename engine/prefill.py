"""Reading: any number of tokens into a state, with an inner step after every mini-batch."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from engine import checks
from engine.blocks import prefix_forward, suffix_forward
from engine.inner import Forward, inner_forward, inner_gradient, inner_update_, with_last_target
from engine.ops import IGNORED, Ops
from engine.profiling import stage
from engine.state import State
from engine.weights import Weights, for_inference

if TYPE_CHECKING:
    from engine.model import TTTModel


class PrefillOutput(NamedTuple):
    """nll: (B, T) fp32, of every token given all before it. logits: (B, V) fp32, for the next token."""

    nll: Tensor
    logits: Tensor


@torch.compiler.disable(reason="it changes a state, and calls its kernels itself")
@torch.no_grad()
def prefill(model: TTTModel, tokens: Tensor, state: State, *, backend: str | None = None) -> PrefillOutput:
    """Reads tokens (B, T) into `state`; see `TTTModel.prefill`.

    On a GPU mini-batches are replayed from CUDA graphs (engine/replay.py) unless the backend is the reference.

    Raises:
        ValueError: unsuitable tokens, a state of another model or batch size, or a backend that cannot serve.
    """
    from engine.replay import reader

    checks.tokens("prefill", tokens, model.config, model.final_norm.device)
    check_state("prefill", model, state, len(tokens))
    with reader(model, state, Ops(model, backend), tokens.shape[1]) as reads:
        nll = reads.read(tokens.long())
        return PrefillOutput(nll, reads.logits())


def check_state(call: str, model: TTTModel, state: State, batch: int) -> None:
    """The state is this model's, for `batch` sequences."""
    if not isinstance(state, State) or state.model is not model:
        raise ValueError(f"{call}: state must come from this model's init_state or load_state")
    if state.batch_size != batch:
        raise ValueError(f"{call}: {batch} sequences of tokens for a state of {state.batch_size}")


class Reader:
    """One call's work on a state."""

    ahead = 0
    """Slabs that the prefix blocks read before the suffix blocks have read the first of them."""

    def __init__(self, model: TTTModel, state: State, ops: Ops) -> None:
        self._config = model.config
        self._state = state
        self._ops = ops
        self._weights: Weights = for_inference(model)

    def read(self, tokens: Tensor) -> Tensor:
        """Reads tokens (B, T); returns their nll."""
        nll = torch.full(tokens.shape, torch.nan, dtype=torch.float32, device=tokens.device)
        if self._state.last_hidden is not None:
            nll[:, :1] = self._ops.nll(self._state.last_hidden[:, None], self._weights.head, tokens[:, :1])
        self._read_slabs(tokens, nll)
        return nll

    def _read_slabs(self, tokens: Tensor, nll: Tensor) -> None:
        """Reads tokens (B, T), slab by slab; `nll` (B, T) takes those of all but the first."""
        first = self._state.tokens_read
        waiting: deque[tuple[slice, Tensor]] = deque()
        for slab in self._slabs(tokens.shape[1]):
            waiting.append((slab, self._read_prefix(tokens[:, slab], first + slab.start)))
            if len(waiting) > self.ahead:
                self._read_suffix(tokens, *waiting.popleft(), nll)
        while waiting:
            self._read_suffix(tokens, *waiting.popleft(), nll)

    def logits(self) -> Tensor:
        """Logits (B, V) fp32 for the token after the newest."""
        hidden = self._state.last_hidden
        assert hidden is not None
        return self._ops.linear(hidden, self._weights.head).float()

    def settle(self, token: Tensor) -> None:
        """Takes the step of a full mini-batch whose last target, `token` (B,), has just arrived."""
        state = self._state
        if not self._config.suffix_layers or state.pending < self._config.mini_batch_size:
            return
        targets = torch.cat((state.pending_tokens[:, 1:], token[:, None]), 1)
        with stage("inner step"):
            if state.read is not None:
                self._update(with_last_target(self._ops, self._weights, state.read, token), targets)
            else:
                for window in state.suffix:
                    window.drop_last(state.pending)
                self._read_again(state.pending_hidden, state.tokens_read - state.pending, targets)
        state.clear_pending()

    def _slabs(self, length: int) -> list[slice]:
        """Tokens that the prefix blocks read at once, to the end of a mini-batch: the suffix finds whole ones then."""
        state = self._state
        full = state.pending == self._config.mini_batch_size
        first = min(length, state.slab - (0 if full else state.pending))
        return [slice(0, first)] + [
            slice(start, min(start + state.slab, length)) for start in range(first, length, state.slab)
        ]

    def _read_prefix(self, tokens: Tensor, first: int) -> Tensor:
        """Hidden states (B, n, d) of a slab's tokens (B, n), from position `first` on, after the prefix blocks."""
        positions = torch.arange(first, first + tokens.shape[1], device=tokens.device)
        x = torch.nn.functional.embedding(tokens, self._weights.embed)
        with stage("prefix"):
            return prefix_forward(
                self._ops, self._weights.prefix, x, positions, self._state.prefix, self._config.window
            )

    def _read_suffix(self, tokens: Tensor, slab: slice, x: Tensor, nll: Tensor) -> None:
        """Reads a slab's x (B, n, d) through the suffix blocks, mini-batch by mini-batch."""
        state, size = self._state, self._config.mini_batch_size
        done = slab.start
        while done < slab.stop:
            self.settle(tokens[:, done])
            length = (
                min(size - state.pending, slab.stop - done)
                if self._config.suffix_layers
                else slab.stop - done
            )
            part = x[:, done - slab.start : done - slab.start + length]
            known = tokens[:, done + 1 : done + length + 1]
            ahead = nll[:, done + 1 : done + length + 1]
            if self._config.suffix_layers and length == size:
                self._read_mini_batch(tokens[:, done : done + size], part, known, ahead)
            else:
                self._look(tokens[:, done : done + length], part, known, ahead)
            state.advance(length)
            done += length

    def _look(self, tokens: Tensor, x: Tensor, known: Tensor, nll: Tensor) -> None:
        """Reads a part of a mini-batch without a step; `nll` takes those of its `known` next tokens."""
        state = self._state
        positions = torch.arange(state.tokens_read, state.tokens_read + x.shape[1], device=x.device)
        if self._config.suffix_layers:
            with stage("suffix"):
                out, _ = suffix_forward(
                    self._ops, self._weights.suffix, state.fast.copies, x, positions, state.suffix,
                    self._config.window,
                )  # fmt: skip
            state.add_pending(tokens, x)
        else:
            out = x
        hidden, _ = self._ops.norm(out, self._weights.final_norm)
        state.last_hidden = hidden[:, -1].clone()
        if known.shape[1]:
            with stage("head"):
                nll[:] = self._ops.nll(hidden[:, : known.shape[1]], self._weights.head, known)

    def _read_mini_batch(self, tokens: Tensor, x: Tensor, known: Tensor, nll: Tensor) -> None:
        """Reads a whole mini-batch, and learns from it if its last target is among the `known` next tokens."""
        state = self._state
        with stage("inner step"):
            complete = known.shape[1] == x.shape[1]
            targets = known if complete else torch.nn.functional.pad(known, (0, 1), value=IGNORED)
            read = self._forward(x, state.tokens_read, targets)
            nll[:] = read.nll[:, : known.shape[1]]
            state.last_hidden = read.hidden[:, -1].clone()
            if complete:
                self._update(read, targets)
            else:
                state.add_pending(tokens, x)
                state.read = read

    def _read_again(self, x: Tensor, first: int, targets: Tensor) -> None:
        """Learns from x (B, b, d) from position `first` on, which was read in parts before."""
        self._update(self._forward(x, first, targets), targets)

    def _forward(self, x: Tensor, first: int, targets: Tensor) -> Forward:
        positions = torch.arange(first, first + x.shape[1], device=x.device)
        arguments = (self._ops, self._config, self._weights, self._state.fast)
        return inner_forward(*arguments, x, positions, targets, self._state.suffix)

    def _update(self, read: Forward, targets: Tensor) -> None:
        fast = self._state.fast
        grads = inner_gradient(self._ops, self._config, self._weights, fast, read, targets)
        inner_update_(self._ops, self._config, fast, grads, self._config.inner_lr)
