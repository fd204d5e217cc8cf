"""Every Triton kernel of attention with every configuration, for compilation ahead of time."""

from typing import Any

import torch

from ttt_kernels.aot import Case, Constant
from ttt_kernels.swa import triton_backward, triton_double_backward, triton_forward
from ttt_kernels.swa.triton_configs import configs, pieces, sums_both

_KERNELS = {
    "forward": triton_forward.attention,
    "backward_queries": triton_backward.queries,
    "backward_keys": triton_backward.keys,
    "along": triton_double_backward.along,
    "double_backward_queries": triton_double_backward.queries,
    "double_backward_keys": triton_double_backward.keys,
}
_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_VECTORS = {"p_lengths": "*i32", "p_first": "*i32", "p_end": "*i32"}
"""Which keys are seen, where the window does not say."""


def _arguments(name: str, kernel: Any, dtype: torch.dtype, head_dim: int, packed: bool) -> dict[str, Any]:
    """Types of all arguments but the sizes of tiles, with every result wanted and every cotangent given."""
    found: dict[str, Any] = {}
    for argument in kernel.arg_names:
        if argument.startswith("t_"):
            found[argument] = (f"*{_TYPES[dtype]}", "i32", "i32", "i32")
        elif argument in _VECTORS:
            found[argument] = _VECTORS[argument] if packed else Constant(None)
        elif argument.startswith("p_"):
            found[argument] = "*fp32"
        elif argument not in ("BQ", "BK"):
            found[argument] = "i32"
    constants = {"D": head_dim, "PIECES": pieces(name, head_dim, dtype), "SHIFTED": packed}
    given = {name: Constant(value) for name, value in constants.items() if name in found}
    return {**found, "scale": "fp32", **given}


def _results(arguments: dict[str, Any], dtype: torch.dtype, head_dim: int) -> list[dict[str, Any]]:
    """The results of a launch: all, or one by one where registers do not hold sums of both."""
    sums = [argument for argument in arguments if argument in ("t_dk", "t_dv", "t_kbar", "t_vbar")]
    if not sums or sums_both(head_dim, dtype):
        return [arguments]
    return [{**arguments, missing: Constant(None)} for missing in sums]


def cases(arch: int) -> list[Case]:
    """All kernels for an architecture (80 is sm_80): every configuration, and special cases of each kernel."""
    plain = [(dtype, d, False) for dtype in (torch.bfloat16, torch.float32) for d in (64, 80, 128, 256)]
    special = [(torch.float16, 64, False), (torch.bfloat16, 64, True)]
    found = []
    for name, kernel in _KERNELS.items():
        for dtype, head_dim, packed in plain + special:
            everything = _arguments(name, kernel, dtype, head_dim, packed)
            variant = f"{_TYPES[dtype]} {head_dim}{' packed' if packed else ''}"
            choices = configs(name, head_dim, dtype, arch)
            for config in choices if (dtype, head_dim, packed) in plain else choices[:1]:
                found += [
                    Case(f"swa.{name}", variant, kernel, arguments, config, dtype != torch.float32)
                    for arguments in _results(everything, dtype, head_dim)
                ]
    return found
