"""Every Triton kernel of RMSNorm with every configuration, for compilation ahead of time."""

from typing import Any

import torch

from ttt_kernels.aot import Case, Constant
from ttt_kernels.rms_norm import triton_kernels
from ttt_kernels.rms_norm.triton_configs import LARGEST, SUMMED, configs, sums

_ORDERS = ("forward", "backward", "double_backward", "jvp_backward")
_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_WIDE = ("p_rstd", "p_partial")
"""Always float32."""
_OF_X = ("p_y", "p_dx", "p_da", "p_residual", "p_residual_dot", "p_to_dy", "p_to_x")


def _arguments(kernel: Any, dtype: str, weight: str, n: int, rank: int) -> dict[str, Any]:
    """Types of all arguments but the sizes of tiles, with every result wanted and every cotangent given."""
    found: dict[str, Any] = {}
    for argument in kernel.arg_names:
        if argument.startswith("t_"):
            found[argument] = (f"*{dtype}", "i32", "i32", "i32")
        elif argument in _WIDE:
            found[argument] = "*fp32"
        elif argument in _OF_X:
            found[argument] = f"*{dtype}"
        elif argument.startswith("p_"):
            found[argument] = f"*{weight}"
        elif argument not in ("ROWS", "BLOCK"):
            found[argument] = "i32"
    given = {"eps": "fp32", "N": Constant(n), "RANK": Constant(rank)}
    return {**found, **{name: value for name, value in given.items() if name in found}}


def _launches(order: str, n: int) -> list[dict[str, Constant]]:
    """What is missing in each launch of an order: long rows are summed apart."""
    apart = {
        "double_backward": ("t_z", "p_to_dy", "p_to_x"),
        "jvp_backward": ("p_dx", "p_da", "p_residual", "p_residual_dot"),
    }
    if order not in apart or n <= SUMMED:
        return [{}]
    results = apart[order]
    return [{"p_partial": Constant(None)}, dict.fromkeys(results, Constant(None))]


def cases(arch: int) -> list[Case]:
    """All kernels for an architecture, with every configuration of narrow and wide rows."""
    found = []
    for order in _ORDERS:
        kernel = getattr(triton_kernels, order)
        for dtype, weight, n, rank in (
            ("bf16", "fp32", 64, 2),
            ("bf16", "bf16", 1024, 1),
            ("bf16", "fp32", 768, 1),
            ("bf16", "fp32", 4096, 1),
            ("bf16", "fp32", LARGEST, 1),
            ("fp16", "fp16", 128, 3),
            ("fp32", "fp32", 64, 2),
            ("fp32", "fp32", 2048, 1),
            ("fp32", "fp32", LARGEST, 1),
        ):
            arguments = _arguments(kernel, dtype, weight, n, rank)
            found += [
                Case(f"rms_norm.{order}", f"{dtype} {n}", kernel, {**arguments, **missing}, config, None)
                for config in configs(order, n)
                for missing in _launches(order, n)
            ]
        arguments = _arguments(kernel, "bf16", "fp32", 1024, 1)
        found += [
            Case(f"rms_norm.{order}", f"bf16 -{name}", kernel, {**arguments, name: Constant(None)},
                 configs(order, 1024)[0], None)
            for name in (
                "t_residual", "p_dx", "p_da", "p_partial", "p_residual", "p_residual_dot", "t_a", "p_b", "t_z",
                "p_to_dy", "p_to_x",
            )
            if name in arguments
        ]  # fmt: skip
    for weight in _TYPES.values():
        arguments = {"p_partial": "*fp32", "p_sum": f"*{weight}", "count": "i32", "N": Constant(1024)}
        found.append(Case("rms_norm.total", weight, triton_kernels.total, arguments, sums(), None))
    return found
