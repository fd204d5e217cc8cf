"""Every Triton kernel of clipped SGD with every configuration, for compilation ahead of time."""

from typing import Any

from ttt_kernels.aot import Case, Constant
from ttt_kernels.clipped_sgd import triton_kernels, triton_sums
from ttt_kernels.clipped_sgd.triton_configs import configs

_KERNELS = {
    "products": triton_sums.products,
    "step": triton_kernels.step,
    "backward": triton_kernels.backward,
    "double_backward": triton_kernels.double_backward,
    "of_rate": triton_kernels.of_rate,
}
_COPIES = ("t_copy", "t_c", "t_to_c")
_OPTIONAL = (
    "t_l", "t_c", "t_u", "t_copy", "p_active", "t_dw", "t_dg", "t_a", "t_to_l", "t_to_c", "t_to_g", "p_to_norm",
    "of_lr", "max_norm",
)  # fmt: skip
_GIVEN = {
    "p_partial": "*fp64",
    "p_norm": "*fp32",
    "p_dnorm": "*fp32",
    "p_to_norm": "*fp32",
    "p_active": "*i1",
    "p_sum": "*fp32",
    "lr": "i64",
    "of_lr": "*fp32",
    "max_norm": "i64",
    "SECOND": Constant(True),
}


def _arguments(kernel: Any, dtype: str, copies: str, tensors: int) -> dict[str, Any]:
    """Types of all arguments but the sizes of blocks, with every result wanted and every cotangent given."""
    found: dict[str, Any] = {}
    for name in kernel.arg_names:
        if name.startswith("t_"):
            found[name] = ((f"*{copies if name in _COPIES else dtype}",) * tensors, ("i32",) * tensors)
        elif name == "counts":
            found[name] = ("i32",) * tensors
        elif name not in ("BLOCK", "PARTS"):
            found[name] = _GIVEN.get(name, "i32")
    return found


def cases(arch: int) -> list[Case]:
    """All kernels for an architecture: tuples of many tensors and of one, and each missing argument."""
    found = []
    for name, kernel in _KERNELS.items():
        first = configs(name)[0]
        for dtype, copies, tensors in (("fp32", "bf16", 12), ("bf16", "bf16", 1), ("fp16", "fp32", 3)):
            arguments = _arguments(kernel, dtype, copies, tensors)
            found += [
                Case(f"clipped_sgd.{name}", f"{dtype} {tensors}", kernel, arguments, config, None)
                for config in configs(name)
            ]
        arguments = _arguments(kernel, "fp32", "bf16", 3)
        found += [
            Case(
                f"clipped_sgd.{name}",
                f"fp32 -{missing}",
                kernel,
                {**arguments, missing: Constant(None)},
                first,
                None,
            )
            for missing in _OPTIONAL
            if missing in arguments and (missing != "t_l" or name == "products")
        ]
    return found
