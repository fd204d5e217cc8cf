"""SwiGLU and its tangent, written out so that a tangent which is zero costs no product."""

import torch
from torch import Tensor

from ttt_kernels.matmul import mm
from ttt_kernels.swiglu.reference import silu_derivatives, wide
from ttt_kernels.tangents import product, total, transposed


def forward(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    t_x: Tensor | None,
    t_gate: Tensor | None,
    t_up: Tensor | None,
    t_down: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y and its tangent along (t_x, t_gate, t_up, t_down), where None is zero; letters as in `reference`.

    G^ = t_x Wg^T + x t_gate^T, U^ = t_x Wu^T + x t_up^T, y^ = (S' U G^ + S U^) Wd^T + H t_down^T.
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    gate, up = wide(mm(x, w_gate.mT)), wide(mm(x, w_up.mT))
    silu, slope, _ = silu_derivatives(gate)
    hidden = (silu * up).to(x.dtype)

    along_gate = total(product(t_x, w_gate.mT, compute), product(x, transposed(t_gate), compute))
    along_up = total(product(t_x, w_up.mT, compute), product(x, transposed(t_up), compute))
    along_hidden = total(
        None if along_gate is None else slope * up * along_gate,
        None if along_up is None else silu * along_up,
    )
    rounded = None if along_hidden is None else along_hidden.to(x.dtype)
    tangent = total(product(rounded, w_down.mT), product(hidden, transposed(t_down)))
    y = mm(hidden, w_down.mT)
    return y, torch.zeros_like(y) if tangent is None else tangent
