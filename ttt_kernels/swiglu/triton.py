"""SwiGLU with the Triton kernels of triton_*.py between, or in place of, its products; a first call imports them."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ttt_kernels import tuning
from ttt_kernels.swiglu import products
from ttt_kernels.swiglu.triton_configs import SEPARATE, of_pass, of_products
from ttt_kernels.triton_launch import launch, on
from ttt_kernels.tuning import Config, amount

_Optional = Tensor | None
_Located = tuple[Tensor, int, int]
_LARGEST_TILE = 256
"""At least as many rows as any tile has."""


def _run(name: str, kernel: Any, like: Tensor, *tensors: _Optional) -> None:
    """Launches a pass over tensors of like's shape, in the order of the kernel's arguments."""
    count = like.numel()
    if count:
        given = {**dict(zip(kernel.arg_names, tensors, strict=False)), "count": count}
        launch(
            f"swiglu.{name}",
            kernel,
            lambda sizes: -(-count // sizes["BLOCK"]),
            (of_pass(),),
            (),
            like.device,
            given,
        )


def _located(t: Tensor) -> _Located:
    """A matrix or a batch of them with unit stride along rows, as the kernel takes it: with its other strides.

    Within a tile it counts in 32 bits, so rows that lie very far apart are copied together.
    """
    if (t.stride(-1) != 1 and t.shape[-1] > 1) or t.stride(-2) * _LARGEST_TILE >= 2**31:
        t = t.contiguous()
    return t, t.stride(0) if t.dim() == 3 else 0, t.stride(-2)


class _Passes:
    """As `products.Passes`."""

    def forward(
        self, x: Tensor, w_gate: Tensor, w_up: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        (rows, d), columns = x.shape[-2:], w_gate.shape[-2]
        found: list[Tensor] = []

        def run(config: Config) -> None:
            way = self._separate if config == SEPARATE else partial(self._fused, config)
            found[:] = way(x, w_gate, w_up, dtype)

        sequences = amount(len(x)) if x.dim() == 3 else "shared"
        key = (x.dtype, dtype, d, columns, sequences, amount(rows))
        choices = of_products(x.dtype, d, columns, tuning.capability(x.device))
        with on(x.device):
            tuning.run("swiglu.forward", key, choices, run)
        hidden, gate, up = found
        return hidden, gate, up

    def _separate(
        self, x: Tensor, w_gate: Tensor, w_up: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        from ttt_kernels.swiglu import triton_kernels

        gate, up = products.gate_and_up(x, w_gate, w_up)
        hidden = torch.empty_like(gate)
        if gate.dtype == dtype:
            _run("forward", triton_kernels.forward, gate, gate, up, hidden, None, None)
            return hidden, gate, up
        kept_gate, kept_up = (torch.empty_like(gate, dtype=dtype) for _ in range(2))
        _run("forward", triton_kernels.forward, gate, gate, up, hidden, kept_gate, kept_up)
        return hidden, kept_gate, kept_up

    def _fused(
        self, config: Config, x: Tensor, w_gate: Tensor, w_up: Tensor, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor]:
        from ttt_kernels.swiglu import triton_products

        (rows, width), columns = x.shape[-2:], w_gate.shape[-2]
        shape = (*x.shape[:-1], columns)
        hidden, gate, up = (
            x.new_empty(shape),
            x.new_empty(shape, dtype=dtype),
            x.new_empty(shape, dtype=dtype),
        )
        if hidden.numel() == 0:
            return hidden, gate, up
        sizes = dict(config.sizes)
        tiles = -(-rows // sizes["BM"]) * -(-columns // sizes["BN"])
        sequences = x.shape[0] if x.dim() == 3 else 1
        triton_products.gate_and_up[(sequences * tiles,)](
            t_x=_located(x), t_wg=_located(w_gate), t_wu=_located(w_up), p_hidden=hidden, p_gate=gate,
            p_up=up, rows=rows, columns=columns, width=width,
            WHOLE=width % sizes["BK"] == 0, **sizes, **config.options(),
        )  # fmt: skip
        return hidden, gate, up

    def backward(
        self,
        gate: Tensor,
        up: Tensor,
        d_hidden: _Optional,
        carried: Sequence[_Optional],
        like: Tensor,
        wanted: Sequence[bool],
    ) -> tuple[_Optional, ...]:
        from ttt_kernels.swiglu import triton_kernels

        results = products.results(gate, like, wanted)
        if any(wanted):
            _run("backward", triton_kernels.backward, gate, gate, up, d_hidden, *carried, *results)
        return tuple(results)

    def double_backward(
        self,
        gate: Tensor,
        up: Tensor,
        d_hidden: _Optional,
        h_bar: _Optional,
        t_gate: _Optional,
        t_up: _Optional,
        like: Tensor,
        wanted: Sequence[bool],
    ) -> tuple[_Optional, ...]:
        from ttt_kernels.swiglu import triton_kernels

        given = [None if t is None else t.contiguous() for t in (d_hidden, h_bar, t_gate, t_up)]
        results = products.results(gate, like, wanted)
        if any(wanted):
            _run("double_backward", triton_kernels.double_backward, gate, gate, up, *given, *results)
        return tuple(results)


passes = _Passes()
forward = partial(products.forward, passes)
backward = partial(products.backward, passes)
double_backward = partial(products.double_backward, passes)
factored_backward = partial(products.factored_backward, passes)
