"""Stacks that decoding steps are tested on, and what every backend's step must be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace

import torch
from harness import draw, relative_error
from torch import Tensor

from ttt_kernels.decode import LayerWeights, Stack, step

Step = Callable[[Stack, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]
"""(stack, x, cos, sin, visible) to prefix output, hidden and logits."""


def make_layer(
    seed: int, batch: int, d: int, heads: int, intermediate: int, capacity: int, fast: bool, spread: bool
) -> LayerWeights:
    def matrix(index: int, *shape: int) -> Tensor:
        return draw(*shape, seed=1000 * seed + index, scale=2 * shape[-1] ** -0.5)

    def norm(index: int, n: int = d) -> Tensor:
        return 1 + 0.2 * draw(n, seed=1000 * seed + index)

    def cache(index: int) -> Tensor:
        if spread:
            return draw(batch, capacity, 2, heads, d // heads, seed=1000 * seed + index)[:, :, 1]
        return draw(batch, capacity, heads, d // heads, seed=1000 * seed + index)

    i = intermediate
    weights = LayerWeights(
        seq_norm=norm(0), w_qkv=matrix(1, 3 * d, d), q_norm=norm(2, d // heads), k_norm=norm(3, d // heads),
        w_o=matrix(4, d, d), seq_post_norm=norm(5), mlp_norm=norm(6), w_gate=matrix(7, i, d),
        w_up=matrix(8, i, d), w_down=matrix(9, d, i), mlp_post_norm=norm(10), k_cache=cache(11),
        v_cache=cache(12),
    )  # fmt: skip
    if not fast:
        return weights
    return replace(
        weights, fast_norm=norm(13), fast_gate=matrix(14, batch, i, d), fast_up=matrix(15, batch, i, d),
        fast_down=matrix(16, batch, d, i), fast_post_norm=norm(17),
    )  # fmt: skip


def make_stack(
    batch: int = 1, heads: int = 2, head_dim: int = 8, intermediate: int = 24, vocab: int = 30,
    capacities: Sequence[int] = (6, 9), fast_layers: int = 1, spread: bool = False,
) -> Stack:  # fmt: skip
    d = heads * head_dim
    layers = tuple(
        make_layer(n, batch, d, heads, intermediate, capacity, n >= len(capacities) - fast_layers, spread)
        for n, capacity in enumerate(capacities)
    )
    return Stack(layers, 1 + 0.2 * draw(d, seed=1), draw(vocab, d, seed=2, scale=d**-0.5), heads, 1e-6)


def map_stack(stack: Stack, change: Callable[[str, Tensor], Tensor]) -> Stack:
    def changed(layer: LayerWeights) -> LayerWeights:
        tensors = {f.name: getattr(layer, f.name) for f in fields(layer)}
        return replace(layer, **{name: change(name, t) for name, t in tensors.items() if t is not None})

    layers = tuple(changed(layer) for layer in stack.layers)
    final_norm, head = change("final_norm", stack.final_norm), change("head", stack.head)
    return replace(stack, layers=layers, final_norm=final_norm, head=head)


def cast(stack: Stack, dtype: torch.dtype) -> Stack:
    """A copy in `dtype`, caches with the strides they have, norms in float32 beside a smaller dtype."""

    def change(name: str, t: Tensor) -> Tensor:
        if not name.endswith("_cache"):
            wanted = torch.promote_types(dtype, torch.float32) if name.endswith("norm") else dtype
            return t.to(wanted, copy=True)
        copy = torch.full((*t.shape[:2], t.stride(1)), torch.nan, dtype=dtype)[:, :, -t[0, 0].numel() :]
        return copy.view(t.shape).copy_(t)

    return map_stack(stack, change)


def poison(stack: Stack, rows: Sequence[int], counts: Sequence[int]) -> None:
    """NaN in every row that the token must not see, its own included until it is written."""
    for layer, row, count in zip(stack.layers, rows, counts, strict=True):
        for cache in (layer.k_cache, layer.v_cache):
            cache[:, : row + 1 - count] = torch.nan
            cache[:, row:] = torch.nan


def seen(rows: Sequence[int], counts: Sequence[int]) -> Tensor:
    """`visible` of each layer's row and count."""
    return torch.tensor([rows, counts]).T


Token = tuple[Tensor, Tensor, Tensor]


def make_token(stack: Stack, dtype: torch.dtype) -> Token:
    """x, cos and sin; each sequence stands somewhere else."""
    n, half = stack.batch_size, stack.head_dim // 2
    angles = draw(n, half, seed=3, scale=3.0)
    wide = torch.promote_types(dtype, torch.float32)
    return draw(n, stack.hidden_size, seed=4).to(dtype), angles.cos().to(wide), angles.sin().to(wide)


def map_token(token: Token, change: Callable[[Tensor], Tensor]) -> Token:
    x, cos, sin = token
    return change(x), change(cos), change(sin)


def written(stack: Stack, rows: Sequence[int]) -> list[Tensor]:
    both = zip(stack.layers, rows, strict=True)
    return [cache[:, row] for layer, row in both for cache in (layer.k_cache, layer.v_cache)]


def assert_agrees(
    own_step: Step, stack: Stack, dtype: torch.dtype, rows: Sequence[int], counts: Sequence[int]
) -> None:
    """`own_step` is as near to float64 as the plain formulas at `dtype` are, and writes one row of each cache."""
    token = make_token(stack, dtype)
    exact, plain, own = cast(cast(stack, dtype), torch.float64), cast(stack, dtype), cast(stack, dtype)
    for s in (exact, plain, own):
        poison(s, rows, counts)
    before = cast(own, dtype)
    truth = step(exact, *map_token(token, Tensor.double), seen(rows, counts), backend="reference")
    honest = step(plain, *token, seen(rows, counts), backend="reference")
    found = own_step(own, *token, seen(rows, counts))
    assert [t.dtype for t in found] == [t.dtype for t in honest] == [dtype, dtype, torch.float32]
    results = ((truth, exact), (honest, plain), (found, own))
    all_written = [(*out, *written(s, rows)) for out, s in results]
    for index, (e, p, o) in enumerate(zip(*all_written, strict=True)):
        budget = 2 * relative_error(p, e) + 4 * torch.finfo(dtype).eps
        error = relative_error(o, e)
        assert error <= budget, f"result {index}: error {error:.3g} beyond {budget:.3g}"
    for old, new, row in zip(before.layers, own.layers, rows, strict=True):
        for was, now in ((old.k_cache, new.k_cache), (old.v_cache, new.v_cache)):
            was[:, row] = now[:, row]
            assert torch.equal(was.nan_to_num(7.0), now.nan_to_num(7.0))
