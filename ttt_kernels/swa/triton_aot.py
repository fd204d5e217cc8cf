"""Every Triton kernel of attention with every configuration, for compilation ahead of time."""

from typing import Any

import torch

from ttt_kernels.aot import Case, Constant
from ttt_kernels.swa import (
    triton_backward,
    triton_double_backward,
    triton_forward,
    triton_jvp_backward,
    triton_jvp_forward,
)
from ttt_kernels.swa.triton_configs import configs, parts, pieces, sums_both, sums_together

_KERNELS = {
    "forward": triton_forward.attention,
    "backward_queries": triton_backward.queries,
    "backward_keys": triton_backward.keys,
    "along": triton_double_backward.along,
    "double_backward_queries": triton_double_backward.queries,
    "double_backward_keys": triton_double_backward.keys,
    "jvp_forward": triton_jvp_forward.attention,
    "jvp_backward_queries": triton_jvp_backward.queries,
    "jvp_backward_keys": triton_jvp_backward.keys,
    "jvp_keys_before": triton_jvp_backward.keys,
}
_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_VECTORS = {"p_lengths": "*i32", "p_first": "*i32", "p_end": "*i32"}
"""Which keys are seen, where the window does not say."""
_OPTIONAL = {
    **{name: (name,) for name in ("t_rest", "t_dq", "t_dv", "t_a", "t_b", "t_c", "t_dobar", "t_vbar")},
    "t_dk": ("t_dk", "p_delta"),
    "t_kbar": ("t_kbar", "p_e", "p_delta"),
}
_OPTIONAL_JVP = {
    **{name: (name,) for name in ("t_a", "t_b", "t_c", "t_qbar", "t_dq", "t_kbar", "t_vbar", "t_dk", "t_dv")},
    "t_rest": ("t_rest", "t_odot_rest"),
}
"""Result or cotangent that may be missing -> the arguments that are missing then."""


def _arguments(name: str, kernel: Any, dtype: torch.dtype, head_dim: int, packed: bool) -> dict[str, Any]:
    """Types of all arguments but the sizes of tiles, with every result wanted and every cotangent given."""
    found: dict[str, Any] = {}
    for argument in kernel.arg_names:
        if argument in ("t_rest", "t_odot_rest") and dtype == torch.float32:
            found[argument] = Constant(None)
        elif argument.startswith("t_"):
            found[argument] = (f"*{_TYPES[dtype]}", "i32", "i32", "i32")
        elif argument in _VECTORS:
            found[argument] = _VECTORS[argument] if packed else Constant(None)
        elif argument.startswith("p_"):
            found[argument] = "*fp32"
        elif argument not in ("BQ", "BK"):
            found[argument] = "i32"
    first, count = parts(name, head_dim, dtype)[-1]
    constants = {
        "D": head_dim,
        "PIECES": pieces(name, head_dim, dtype),
        # The usual one of each: with tangents, keys from before have none.
        "SHIFTED": packed != name.startswith("jvp"),
        "MOVES": True,
        # Of as many heads of keys as of queries, as the presets have: Triton compiles a 1 in.
        **({} if packed else {"group": 1}),
        "FIRST": first,
        "COUNT": count,
    }
    given = {name: Constant(value) for name, value in constants.items() if name in found}
    if name == "jvp_keys_before":
        given |= dict.fromkeys(("t_b", "t_c", "t_dk", "t_dv"), Constant(None))
    return {**found, "scale": "fp32", **given}


def _results(name: str, arguments: dict[str, Any], dtype: torch.dtype, head_dim: int) -> list[dict[str, Any]]:
    """The results of a launch: all, or some at a time where registers do not hold sums of all."""
    if name in ("jvp_backward_keys", "jvp_keys_before"):
        launches = [set(together) for together in sums_together(name, head_dim, dtype)]
        every = {"t_kbar", "t_vbar", "t_dk", "t_dv"}
        return [_without(arguments, tuple(every - together)) for together in launches]
    sums = [argument for argument in arguments if argument in ("t_dk", "t_dv", "t_kbar", "t_vbar")]
    if not sums or sums_both(head_dim, dtype):
        return [arguments]
    return [_without(arguments, _OPTIONAL[missing]) for missing in sums]


def _without(arguments: dict[str, Any], missing: tuple[str, ...]) -> dict[str, Any]:
    return {name: Constant(None) if name in missing else kind for name, kind in arguments.items()}


def cases(arch: int) -> list[Case]:
    """All kernels for an architecture (80 is sm_80): every configuration, and special cases of each kernel.

    A variant such as `bf16 64 -t_a` lacks a result or a cotangent.
    """
    plain = [(dtype, d, False) for dtype in (torch.bfloat16, torch.float32) for d in (64, 80, 96, 128, 256)]
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
                    for arguments in _results(name, everything, dtype, head_dim)
                ]
        everything = _arguments(name, kernel, torch.bfloat16, 64, False)
        config = configs(name, 64, torch.bfloat16, arch)[0]
        found += [
            # Without dQ there is nothing to multiply.
            Case(
                f"swa.{name}",
                f"bf16 64 -{missing}",
                kernel,
                _without(everything, also),
                config,
                missing != "t_dq" or name != "backward_queries",
            )
            for missing, also in (_OPTIONAL_JVP if name.startswith("jvp") else _OPTIONAL).items()
            if isinstance(everything.get(missing, Constant(None)), str | tuple)
        ]
    return found
