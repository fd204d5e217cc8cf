"""The rotation's Triton kernel with every configuration, for compilation ahead of time."""

import math

from ttt_kernels.aot import Case, Constant
from ttt_kernels.rope import triton_kernels
from ttt_kernels.rope.triton_configs import LARGEST, configs


def cases(arch: int) -> list[Case]:
    """The kernel for an architecture: both pairings, back and forth, heads of many sizes."""
    found = []
    for dtype, head_dim, heads, interleaved in (
        ("bf16", 64, 16, True),
        ("bf16", 64, 16, False),
        ("bf16", 80, 12, True),
        ("fp16", 128, 32, True),
        ("bf16", 256, 8, True),
        ("bf16", 256, 8, False),
        ("bf16", 2, 1, True),
        ("fp32", 64, 16, True),
        ("fp32", 256, 8, False),
        ("fp32", LARGEST, 8, True),
    ):
        arguments = {
            "t_x": (f"*{dtype}", "i32", "i32", "i32"),
            "t_positions": ("*i64", "i32", "i32"),
            "p_y": f"*{dtype}",
            "T": "i32",
            "H": Constant(heads),
            "D": Constant(head_dim),
            "STEP": Constant(-2 / head_dim * math.log2(10_000.0)),
            "INTERLEAVED": Constant(interleaved),
            "INVERSE": Constant(head_dim == 64),
        }
        variant = f"{dtype} {head_dim} {'pairs' if interleaved else 'halves'}"
        found += [
            Case("rope.rotate", variant, triton_kernels.rotate, arguments, config, None)
            for config in configs(head_dim, heads)
        ]
    return found
