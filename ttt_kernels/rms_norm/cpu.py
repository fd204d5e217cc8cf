"""RMSNorm on the C++ kernels of csrc/cpu/rms_norm.cpp."""

from collections.abc import Sequence

from torch import Tensor

from ttt_kernels.extension import addresses, beyond_caches, compute_dtype, dtype_code, kernels, located

_ROWS_PER_SUM = 32
"""As in csrc/cpu/rms_norm.cpp."""


def _rows(t: Tensor) -> Tensor:
    """(rows, n) with unit stride in n; copies only where the layout has no single row stride."""
    rows = t.reshape(-1, t.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def _rows_or_none(t: Tensor | None) -> Tensor | None:
    return None if t is None else _rows(t)


def _wide(weight: Tensor, x: Tensor) -> Tensor:
    return weight.to(compute_dtype(x.dtype)).contiguous()


def _sums(weight: Tensor, rows: Tensor, need: bool) -> tuple[Tensor | None, Tensor | None]:
    """What a sum over rows is written to, and memory for its parts."""
    if not need:
        return None, None
    return weight.new_zeros(weight.shape), weight.new_empty(-(-rows.shape[0] // _ROWS_PER_SUM), len(weight))


def forward(x: Tensor, weight: Tensor, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """As `reference.forward`."""
    rows, added, wide = _rows(x), _rows_or_none(residual), _wide(weight, x)
    y, rstd = x.new_empty(x.shape), wide.new_empty(x.shape[:-1])
    if rows.numel():
        kernels().rms_norm_forward(
            dtype_code(x.dtype), *located(rows), wide.data_ptr(), *located(added), y.data_ptr(), rstd.data_ptr(),
            beyond_caches(y), *rows.shape, eps,
        )  # fmt: skip
    return y, rstd


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    rstd: Tensor,
    eps: float,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As `reference.backward`."""
    rows, d_rows, wide = _rows(x), _rows(dy), _wide(weight, x)
    # Bound to a name: a temporary would be freed before the kernel reads it.
    rstd = rstd.contiguous()
    dx, d_residual = (x.new_empty(x.shape) if need else None for need in (needs[0], needs[2]))
    dw, partial = _sums(wide, rows, needs[1])
    if rows.numel() and any(needs):
        kernels().rms_norm_backward(
            dtype_code(x.dtype), *located(d_rows), *located(rows), wide.data_ptr(), rstd.data_ptr(),
            *addresses(dx, dw, d_residual, partial), beyond_caches(dx, d_residual), *rows.shape,
        )  # fmt: skip
    return dx, None if dw is None else dw.to(weight.dtype), d_residual


def double_backward(
    g_x: Tensor | None,
    g_weight: Tensor | None,
    g_residual: Tensor | None,
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    residual: Tensor | None,
    rstd: Tensor,
    eps: float,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """As `reference.double_backward`."""
    rows, d_rows, wide = _rows(x), _rows(dy), _wide(weight, x)
    a, z = _rows_or_none(g_x), _rows_or_none(g_residual)
    b = None if g_weight is None else _wide(g_weight, x)
    rstd = rstd.contiguous()
    dy_bar, x_bar = (x.new_empty(x.shape) if need else None for need in needs[:2])
    w_bar, partial = _sums(wide, rows, needs[2])
    if rows.numel() and any(needs[:3]):
        kernels().rms_norm_double_backward(
            dtype_code(x.dtype), *located(a), *addresses(b), *located(z), *located(d_rows), *located(rows),
            wide.data_ptr(), rstd.data_ptr(), *addresses(dy_bar, x_bar, w_bar, partial),
            beyond_caches(dy_bar, x_bar), *rows.shape,
        )  # fmt: skip
    to_weight = None if w_bar is None else w_bar.to(weight.dtype)
    return dy_bar, x_bar, to_weight, x.new_zeros(x.shape) if needs[3] else None
