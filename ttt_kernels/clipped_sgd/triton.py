"""Clipped SGD on the Triton kernels of triton_*.py, which a first call imports."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ttt_kernels.backends import refuse_on_triton
from ttt_kernels.clipped_sgd.reference import Tensors
from ttt_kernels.clipped_sgd.triton_call import Call, located, number

_STORED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Dtypes of copies that kernels write and read; others go through float32."""


def refuse(tensors: tuple[Tensor, ...]) -> str | None:
    """As `refuse_on_triton`, but for a learning rate, which may be on the CPU and of any floating dtype."""
    return refuse_on_triton(tuple(t for t in tensors if t.dim()))


def _through(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype in _STORED else torch.float32


def _empty(like: Tensors, dtype: torch.dtype | None = None) -> list[Tensor]:
    return [t.new_empty(t.shape, dtype=dtype or t.dtype) for t in like]


def _step(
    weights: Tensors,
    grads: Tensors,
    lr: Tensor,
    max_norm: float | None,
    out: Tensors,
    copies: Tensors | None,
    active: Tensor | None,
) -> Tensor:
    from ttt_kernels.clipped_sgd import triton_kernels as kernels

    call, t_g = Call(grads, max_norm), located(grads)
    norm = grads[0].new_empty(grads[0].shape[:1], dtype=torch.float32)
    call.products(t_g)
    call.run(
        "step", kernels.step, out is weights,
        t_w=located(weights), t_g=t_g, t_new=located(out), t_copy=located(copies), p_norm=norm, lr=number(lr),
        p_active=active, active_stride=0 if active is None else active.stride(0),
    )  # fmt: skip
    return norm


def forward(
    weights: Tensors, grads: Tensors, lr: Tensor, max_norm: float | None, copy_dtype: torch.dtype | None
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """As `reference.forward`."""
    new = _empty(weights)
    copies = [] if copy_dtype is None else _empty(weights, _through(copy_dtype))
    norm = _step(weights, grads, lr, max_norm, new, copies, None)
    return new, norm, [c.to(copy_dtype) for c in copies]


def backward(
    d_weights: Tensors,
    d_norm: Tensor,
    d_copies: Tensors,
    weights: Tensors,
    grads: Tensors,
    lr: Tensor,
    max_norm: float | None,
    copy_dtype: torch.dtype | None,
    needs: Sequence[bool],
) -> tuple[list[Tensor] | None, list[Tensor] | None, Tensor | None]:
    """As `reference.backward`."""
    from ttt_kernels.clipped_sgd import triton_kernels as kernels

    to_weights = _empty(d_weights) if needs[0] else None
    to_grads = _empty(grads) if needs[1] else None
    call = Call(grads, max_norm)
    t_g, t_l = located(grads), located(d_weights)
    t_c = located([c.to(_through(c.dtype)) for c in d_copies])
    if needs[1] or needs[2]:
        call.products(t_g, t_l, t_c)
    if needs[0] or needs[1]:
        call.run(
            "backward", kernels.backward,
            t_g=t_g, t_l=t_l, t_c=t_c, t_dw=located(to_weights), t_dg=located(to_grads), p_dnorm=d_norm,
            norm_stride=d_norm.stride(0), lr=number(lr),
        )  # fmt: skip
    return to_weights, to_grads, call.of_rate(lr, second=False) if needs[2] else None


def double_backward(
    g_weights: Tensors | None,
    g_grads: Tensors | None,
    g_lr: Tensor | None,
    d_weights: Tensors,
    d_norm: Tensor,
    d_copies: Tensors,
    weights: Tensors,
    grads: Tensors,
    lr: Tensor,
    max_norm: float | None,
    copy_dtype: torch.dtype | None,
    needs: Sequence[bool],
) -> tuple[
    list[Tensor] | None,
    Tensor | None,
    list[Tensor] | None,
    list[Tensor] | None,
    list[Tensor] | None,
    Tensor | None,
]:
    """As `reference.double_backward`."""
    from ttt_kernels.clipped_sgd import triton_kernels as kernels

    to_l = _empty(d_weights) if needs[0] else None
    to_norm = torch.empty_like(d_norm, memory_format=torch.contiguous_format) if needs[1] else None
    to_c = [c.new_empty(c.shape, dtype=_through(c.dtype)) for c in d_copies] if needs[2] else None
    to_g = _empty(grads) if needs[4] else None
    call = Call(grads, max_norm)
    t_g, t_l, t_u = located(grads), located(d_weights), located(g_grads)
    t_c = located([c.to(_through(c.dtype)) for c in d_copies])
    call.products(t_g, t_l, t_c, t_u)
    if any(result is not None for result in (to_l, to_norm, to_c, to_g)):
        call.run(
            "double_backward", kernels.double_backward,
            t_g=t_g, t_l=t_l, t_c=t_c, t_u=t_u, t_a=located(g_weights), t_to_l=located(to_l), t_to_c=located(to_c),
            t_to_g=located(to_g), p_to_norm=to_norm, p_dnorm=d_norm, norm_stride=d_norm.stride(0),
            lr=number(lr), of_lr=number(g_lr),
        )  # fmt: skip
    to_rate = None
    if needs[5]:
        to_rate = torch.zeros_like(lr) if t_u is None else call.of_rate(lr, second=True)
    return (
        to_l,
        to_norm,
        None if to_c is None else [t.to(c.dtype) for t, c in zip(to_c, d_copies, strict=True)],
        [w.new_zeros(w.shape) for w in weights] if needs[3] else None,
        to_g,
        to_rate,
    )


def update_(
    weights: Tensors,
    grads: Tensors,
    lr: Tensor,
    max_norm: float | None,
    copies: Tensors | None,
    active: Tensor | None,
) -> Tensor:
    """As `reference.update_`; the elements of a sequence are contiguous in weights and copies."""
    return _step(weights, grads, lr, max_norm, weights, copies, active)
