"""Every Triton kernel of cross-entropy with every configuration, for compilation ahead of time."""

from typing import Any

from ttt_kernels.aot import Case, Constant
from ttt_kernels.linear_ce import triton_kernels
from ttt_kernels.linear_ce.triton_configs import configs
from ttt_kernels.tuning import Config

_KERNELS = {
    "online": triton_kernels.online,
    "d_logits": triton_kernels.d_logits,
    "second": triton_kernels.second,
}


def _arguments(kernel: Any, kind: str, aligned: bool) -> dict[str, Any]:
    """Types of all arguments but the sizes, for float32 logits and factors of a type."""
    found: dict[str, Any] = {}
    for argument in kernel.arg_names:
        if argument == "p_own":
            found[argument] = "*i64"
        elif argument.startswith("p_"):
            found[argument] = f"*{kind}" if argument.startswith("p_factor") else "*fp32"
        elif argument in ("first", "cols", "width"):
            found[argument] = "i32"
    return {**found, "ALIGNED": Constant(aligned)}


def cases(arch: int) -> list[Case]:
    """All kernels for an architecture (80 is sm_80); variants are named after the factors' type."""
    found: list[Case] = []

    def add(name: str, variant: str, arguments: dict[str, Any], *chosen: Config) -> None:
        found.extend(
            Case(f"linear_ce.{name}", variant, _KERNELS[name], arguments, config, None) for config in chosen
        )

    for name, kernel in _KERNELS.items():
        for kind in ("bf16", "fp32"):
            add(name, kind, _arguments(kernel, kind, True), *configs())
        add(name, "fp16", _arguments(kernel, "fp16", True), configs()[-1])
        add(name, "bf16 odd", _arguments(kernel, "bf16", False), configs()[-1])
    without = dict.fromkeys(("p_acc", "p_factor"), Constant(None))
    everything = _arguments(triton_kernels.online, "fp32", True)
    add("online", "fp32 -p_acc", {**everything, **without}, configs()[-1])
    return found
