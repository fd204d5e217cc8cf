"""Reading one token per sequence, as generation does: one call of the decode operator for the whole stack."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from engine import checks, graphs
from engine.decode_graph import DecodeGraph, Reads
from engine.ops import Ops
from engine.prefill import Reader, check_state
from engine.profiling import stage
from engine.state import State
from engine.weights import BlockWeights, Weights, for_inference
from engine.window import Window
from ttt_kernels.decode import Decoded, LayerWeights, Stack, choose, step
from ttt_kernels.rope.tables import angles

if TYPE_CHECKING:
    from engine.model import TTTModel


@torch.compiler.disable(reason="it changes a state, and calls its kernels itself")
@torch.no_grad()
def decode(model: TTTModel, token: Tensor, state: State, *, backend: str | None = None) -> Tensor:
    """Reads token (B,) into `state`; returns logits (B, V) fp32 for the next; see `TTTModel.decode`.

    On a GPU nothing waits for it, so that a token outside the vocabulary is what torch's embedding makes of it: an
    error of the device. With the backend `cuda` the reading is replayed from a CUDA graph (engine/decode_graph.py).

    Raises:
        ValueError: an unsuitable token, a state of another model or batch size, or a backend that cannot serve.
    """
    config = model.config
    checks.tokens("decode", token, config, model.final_norm.device, dims=1, waits=False)
    check_state("decode", model, state, len(token))
    token = token.long()
    if config.suffix_layers and state.pending == config.mini_batch_size:
        # An inner step's operators have no CUDA C++ to ask for: whatever serves them best.
        Reader(model, state, Ops(model, None if backend == "cuda" else backend)).settle(token)
    weights = for_inference(model)
    windows = [*state.prefix, *state.suffix]
    with stage("decode"):
        rows = [w.add_rows(1) for w in windows]
        seen = [row + 1 if config.window is None else min(row + 1, config.window) for row in rows]
        visible = [number for pair in zip(rows, seen, strict=True) for number in pair]
        try:
            reads = _decoding(model, state, weights, windows, backend).read
            out = reads(token, state.position.tolist(), visible)
        except BaseException:
            for window in windows:
                window.drop_last(1)
            raise
    if config.suffix_layers:
        state.add_pending(token[:, None], out.prefix_output[:, None])
    # What a graph gives it writes again for the next token.
    state.last_hidden = out.hidden.clone()
    state.advance(1)
    return out.logits.to(torch.float32, copy=True)


class Decoding(NamedTuple):
    """How the tokens of a state are read by a backend, and the tensors that this was made for."""

    parts: tuple[object, ...]
    stack: Stack
    backend: str
    read: Callable[[Tensor, Sequence[int], Sequence[int]], Decoded]


def _decoding(
    model: TTTModel, state: State, weights: Weights, windows: list[Window], backend: str | None
) -> Decoding:
    """What was kept with the state, or what is made anew because it does not fit any more."""
    parts = (weights, state.fast, *(w.k for w in windows))
    kept = state.decoding
    fits = kept is not None and all(a is b for a, b in zip(kept.parts, parts, strict=True))
    stack = kept.stack if kept is not None and fits else _stack(model, state, weights, windows)
    chosen = choose(stack, backend)
    if kept is None or kept.stack is not stack or kept.backend != chosen:
        device = weights.embed.device
        reads = partial(read_token, stack, weights.embed, theta=model.config.rope_theta, backend=chosen)
        graph = chosen == "cuda" and graphs.available(device)
        kept = Decoding(parts, stack, chosen, DecodeGraph(stack, reads) if graph else _plainly(reads, device))
        state.decoding = kept
    return kept


def _plainly(reads: Reads, device: torch.device) -> Callable[[Tensor, Sequence[int], Sequence[int]], Decoded]:
    """As `DecodeGraph`, without a graph."""

    def read(token: Tensor, position: Sequence[int], visible: Sequence[int]) -> Decoded:
        # On the processor, where they are checked.
        numbers = torch.tensor(visible).view(-1, 2)
        return reads(token, torch.tensor(position).to(device, non_blocking=True), numbers)

    return read


def read_token(
    stack: Stack, embed: Tensor, token: Tensor, position: Tensor, visible: Tensor, theta: float, *,
    backend: str | None,
) -> Decoded:  # fmt: skip
    """What a step computes, of tensors on one device alone: on a GPU no number comes from the host or goes there,
    so that a CUDA graph may hold it (with the backend `cuda`; `reference` reads `visible`).

    Args:
        stack: weights and caches.
        embed: (V, d)
        token: (B,) int64
        position: (B,) int64, of the token in its sequence.
        visible: (n_layers, 2) int64; see `ttt_kernels.decode.step`.
        theta: base of the rotations' frequencies.
        backend: of the operator.
    """
    wide = torch.promote_types(embed.dtype, torch.float32)
    cos, sin = angles(position, stack.head_dim, theta, wide)
    return step(stack, torch.nn.functional.embedding(token, embed), cos, sin, visible, backend=backend)


def _stack(model: TTTModel, state: State, weights: Weights, windows: list[Window]) -> Stack:
    """What the operator reads."""
    config = model.config
    fast = [None] * len(state.prefix) + list(state.fast.copies)
    blocks = (*weights.prefix, *weights.suffix)
    layers = [_layer(b, w, f) for b, w, f in zip(blocks, windows, fast, strict=True)]
    return Stack(tuple(layers), weights.final_norm, weights.head, config.num_heads, config.norm_eps)


def _layer(w: BlockWeights, window: Window, fast: tuple[Tensor, Tensor, Tensor] | None) -> LayerWeights:
    gate, up, down = w.mlp.matrices
    fast_gate, fast_up, fast_down = fast or (None, None, None)
    return LayerWeights(
        seq_norm=w.seq_norm,
        w_qkv=w.w_qkv,
        q_norm=w.q_norm,
        k_norm=w.k_norm,
        w_o=w.w_o,
        seq_post_norm=w.seq_post_norm,
        mlp_norm=w.mlp.norm,
        w_gate=gate,
        w_up=up,
        w_down=down,
        mlp_post_norm=w.mlp.post_norm,
        k_cache=window.k,
        v_cache=window.v,
        fast_norm=w.fast.norm if w.fast else None,
        fast_gate=fast_gate,
        fast_up=fast_up,
        fast_down=fast_down,
        fast_post_norm=w.fast.post_norm if w.fast else None,
    )
