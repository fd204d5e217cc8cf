"""RMSNorm on the C++ kernels of csrc/cpu/rms_norm.cpp."""

from collections.abc import Sequence

from torch import Tensor

from ttt_kernels.extension import compute_dtype, dtype_code, kernels


def _rows(t: Tensor) -> Tensor:
    """(rows, n) with unit stride in n; copies only where the layout has no single row stride."""
    rows = t.reshape(-1, t.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As `reference.forward`."""
    rows = _rows(x)
    wide = weight.to(compute_dtype(x.dtype)).contiguous()
    y = x.new_empty(x.shape)
    rstd = wide.new_empty(x.shape[:-1])
    if rows.numel():
        kernels().rms_norm_forward(
            dtype_code(x.dtype), rows.data_ptr(), rows.stride(0), wide.data_ptr(), y.data_ptr(),
            rstd.data_ptr(), rows.shape[0], rows.shape[1], eps,
        )  # fmt: skip
    return y, rstd


def backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, eps: float, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None]:
    """As `reference.backward`."""
    rows, d_rows = _rows(x), _rows(dy)
    wide = weight.to(compute_dtype(x.dtype)).contiguous()
    # Bound to a name: a temporary would be freed before the kernel reads it.
    rstd = rstd.contiguous()
    dx = x.new_empty(x.shape) if needs[0] else None
    dw = wide.new_zeros(weight.shape) if needs[1] else None
    if rows.numel():
        kernels().rms_norm_backward(
            dtype_code(x.dtype), d_rows.data_ptr(), d_rows.stride(0), rows.data_ptr(), rows.stride(0),
            wide.data_ptr(), rstd.data_ptr(), dx.data_ptr() if dx is not None else 0,
            dw.data_ptr() if dw is not None else 0, rows.shape[0], rows.shape[1],
        )  # fmt: skip
    return dx, dw.to(weight.dtype) if dw is not None else None
