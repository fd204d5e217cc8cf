"""The rotation's Triton kernels with every configuration, for compilation ahead of time."""

import math
from typing import Any

from ttt_kernels.aot import Case, Constant
from ttt_kernels.rope import triton_heads, triton_kernels
from ttt_kernels.rope.triton_configs import LARGEST, WIDEST_HEAD, configs, configs_of_heads


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
    return found + _heads()


def _heads() -> list[Case]:
    """The kernels of triton_heads.py, back and forth."""
    found: list[Case] = []

    def add(name: str, variant: str, dtype: str, head_dim: int, heads: int, *missing: str) -> None:
        kernel = getattr(triton_heads, name)
        step = -2 / head_dim * math.log2(500_000.0)
        constants = {"H": heads, "D": head_dim, "STEP": step, **dict.fromkeys(missing)}
        arguments: dict[str, Any] = {
            a: Constant(constants[a]) if a in constants else _type(a, dtype)
            for a in kernel.arg_names
            if a not in ("POSITIONS", "PAIRS", "HEADS")
        }
        found.extend(
            Case(f"rope.heads_{name}", f"{dtype} {head_dim}{variant}", kernel, arguments, config, None)
            for config in configs_of_heads(head_dim, heads)
        )

    for name in ("forward", "backward"):
        for dtype, head_dim, heads in (
            ("bf16", 64, 12),
            ("bf16", 80, 32),
            ("fp16", 128, 16),
            ("bf16", WIDEST_HEAD, 8),
            ("fp32", WIDEST_HEAD, 8),
        ):
            add(name, "", dtype, head_dim, heads)
    add("forward", " -t_v", "bf16", 80, 32, "t_v", "t_to_v")
    return found


def _type(argument: str, dtype: str) -> str | tuple[str, ...]:
    if argument.startswith("t_"):
        return (f"*{dtype}", "i32", "i32", "i32")
    if argument == "p_positions":
        return "*i64"
    return "*fp32" if argument.startswith("p_") else "fp32" if argument == "eps" else "i32"
