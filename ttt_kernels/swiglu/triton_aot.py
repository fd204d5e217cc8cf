"""Every Triton kernel of SwiGLU with every configuration, for compilation ahead of time."""

import torch

from ttt_kernels.aot import Case, Constant
from ttt_kernels.swiglu import triton_kernels, triton_products
from ttt_kernels.swiglu.triton_configs import SEPARATE, of_pass, of_products

_TYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
_PASSES = {
    "forward": (triton_kernels.forward, ("p_kept_gate", "p_kept_up")),
    "backward": (triton_kernels.backward, ("p_dh", "p_gbar", "p_ubar", "p_dg", "p_du", "p_hidden")),
    "double_backward": (
        triton_kernels.double_backward,
        ("p_hbar", "p_tg", "p_tu", "p_th", "p_gbar", "p_ubar", "p_dg", "p_du", "p_hidden"),
    ),
}
"""Pass -> its kernel, and the tensors that may be missing."""


def _passes() -> list[Case]:
    found = []
    for name, (kernel, optional) in _PASSES.items():
        for kind in _TYPES.values():
            tensors = [argument for argument in kernel.arg_names if argument.startswith("p_")]
            given = {**dict.fromkeys(tensors, f"*{kind}"), "count": "i32"}
            found.append(Case(f"swiglu.{name}", kind, kernel, given, of_pass(), None))
            found += [
                Case(f"swiglu.{name}", f"{kind} -{missing}", kernel, {**given, missing: Constant(None)},
                     of_pass(), None)
                for missing in optional if kind == "bf16"
            ]  # fmt: skip
    return found


def cases(arch: int) -> list[Case]:
    """All kernels for an architecture (80 is sm_80); a variant such as `bf16 -p_dh` lacks that tensor."""
    found = _passes()
    for dtype, kind in _TYPES.items():
        for whole in (True, False):
            tensors = dict.fromkeys(("t_x", "t_wg", "t_wu"), (f"*{kind}", "i32", "i32"))
            results = dict.fromkeys(("p_hidden", "p_gate", "p_up"), f"*{kind}")
            sizes = dict.fromkeys(("rows", "columns", "width"), "i32")
            given = {**tensors, **results, **sizes, "WHOLE": Constant(whole)}
            variant = kind if whole else f"{kind} part"
            found += [
                Case("swiglu.gate_and_up", variant, triton_products.gate_and_up, given, config,
                     dtype != torch.float32)
                for config in of_products(dtype, 64, 64, arch) if config != SEPARATE
            ]  # fmt: skip
    return found
