"""Matrix products by torch's BLAS, at the dtype that this processor multiplies fastest."""

import torch
from torch import Tensor

_NATIVE = {
    torch.bfloat16: torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported(),
    torch.float16: torch.cpu._is_amx_fp16_supported(),
}


def has_native(dtype: torch.dtype) -> bool:
    """Whether this processor multiplies matrices of `dtype` in hardware.

    Without such instructions torch's products of bfloat16 and float16 run at a small fraction of the float32
    rate (measured on an AVX2 processor: 20 against 140 GFLOP/s, and 1 GFLOP/s for some layouts).
    """
    return _NATIVE.get(dtype, True)


def best_dtype(device: str = "cpu") -> torch.dtype:
    """The dtype in which products are fastest: bfloat16 on a GPU or a processor that has it, else float32."""
    if torch.device(device).type == "cpu" and not has_native(torch.bfloat16):
        return torch.float32
    return torch.bfloat16


def operand(t: Tensor) -> Tensor:
    """`t` as products read it: widened to float32 where that loses nothing and is the only fast way."""
    if t.device.type == "cpu" and not has_native(t.dtype):
        return t.float()
    return t


def mm(a: Tensor, b: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """a @ b for matrices or batches of them, accumulated in float32 (float64), in `out_dtype` or a's dtype.

    b may have another dtype (a float32 weight beside bfloat16 activations): it is rounded to a's. Where products of
    a's dtype are native, they are rounded to it whatever `out_dtype` is.
    """
    out_dtype = out_dtype or a.dtype
    return torch.matmul(operand(a), operand(b.to(a.dtype))).to(out_dtype)


def sum_of_products(
    *factors: tuple[Tensor | None, Tensor | None], dtype: torch.dtype | None = None
) -> Tensor | None:
    """The sum of a @ b over pairs (a, b) of operands of one dtype; a pair without one is zero.

    Operands are matrices or batches of them. The sum is in their dtype; for a float32 `dtype` that of 16-bit operands
    on a GPU is float32, and not rounded in between. None where no pair has both.
    """
    total: Tensor | None = None
    for a, b in factors:
        if a is None or b is None:
            continue
        if a.is_cuda and dtype == torch.float32 and a.dtype in (torch.bfloat16, torch.float16):
            product = (torch.mm if a.dim() == 2 else torch.bmm)(a, b, out_dtype=dtype)
            total = product if total is None else total.add_(product)
        elif total is None:
            total = torch.matmul(a, b)
        elif total.dim() == 2:
            total.addmm_(a, b)
        else:
            total.baddbmm_(a, b)
    return total


def accumulate(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b in place for matrices that are operands, total being at least as wide as they are."""
    if total.dtype == a.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        total.add_(torch.mm(a, b, out_dtype=total.dtype))
    else:
        total.add_(torch.mm(a, b))


def multiply_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a @ b for matrices that are operands; out may be float32 where they have 16 bits on a GPU."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    else:
        torch.mm(a, b, out_dtype=out.dtype, out=out)
