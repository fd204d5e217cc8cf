"""Which backend can serve a call, and why another cannot."""

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from torch import Tensor

from ttt_kernels import extension, tuning

NAMES = ("cuda", "triton", "cpu", "reference")
"""Every backend, the best first."""

_ON_GPU = ("cuda", "triton")
_GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ENVIRONMENT = "TTT_KERNELS_BACKEND"


class _Default(threading.local):
    """Names given to the `use_backend` contexts that a thread is in, the innermost last."""

    def __init__(self) -> None:
        self.names: list[str] = []


_default = _Default()

Refusal = Callable[[tuple[Tensor, ...]], str | None]
"""Why a backend's kernels of one operator cannot serve these tensors, or None when they can."""


def _missing(name: str) -> str | None:
    """Why a backend cannot run on this machine at all, or None."""
    if name == "cpu":
        return extension.missing or None
    if name == "triton":
        if find_spec("triton") is None:
            return "the triton package is not installed"
        if not (torch.cuda.is_available() or tuning.interpreted()):
            return "no GPU is available (with TRITON_INTERPRET=1 its kernels are interpreted, for debugging)"
        return None
    if name == "cuda":
        return extension.load_cuda()[1] or _not_built_for(torch.device("cuda", torch.cuda.current_device()))
    return None


def _not_built_for(device: torch.device) -> str | None:
    """Why the CUDA kernels cannot run on a GPU, or None."""
    built, capability = extension.cuda_kernels().architectures(), tuning.capability(device)
    if any(_runs(code, capability) for code in built):
        return None
    return f"{device} is sm_{capability}, and the CUDA extension was built for {', '.join(built)}"


def _runs(code: str, capability: int) -> bool:
    """Whether code for an architecture (PTX is called compute_90) runs on a GPU of a capability (90 is sm_90)."""
    kind, number = code.split("_")
    own = int(number.removesuffix("a"))
    if number.endswith("a"):
        return capability == own
    return capability >= own and (kind == "compute" or capability // 10 == own // 10)


def available() -> tuple[str, ...]:
    """Names of the backends that can run on this machine, the best first."""
    return tuple(name for name in NAMES if _missing(name) is None)


def _check_name(name: str, source: str) -> None:
    if name not in NAMES:
        raise ValueError(f"{source} is {name!r}; accepted are {', '.join(map(repr, reversed(NAMES)))}")


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Within the context, this thread's calls that name no backend use this one, or raise if it cannot.

    Raises:
        ValueError: the name is unknown, or the backend cannot run on this machine.
    """
    _check_name(name, "use_backend's name")
    reason = _missing(name)
    if reason is not None:
        raise ValueError(f"use_backend({name!r}): {reason}; available here: {', '.join(available())}")
    _default.names.append(name)
    try:
        yield
    finally:
        _default.names.pop()


def _default_name() -> str | None:
    if _default.names:
        return _default.names[-1]
    name = os.environ.get(_ENVIRONMENT) or None
    if name is not None:
        _check_name(name, f"the environment variable {_ENVIRONMENT}")
    return name


def _transform_refusal(name: str, tensors: tuple[Tensor, ...]) -> str | None:
    if name == "reference" or torch.compiler.is_compiling() or not in_transform(tensors):
        return None
    return (
        "its kernels have no rule for forward mode or torch.func transforms (a registered operator would "
        "return zeros for the tangent without a word)"
    )


def in_transform(tensors: Iterable[Tensor]) -> bool:
    """Whether any tensor is a dual tensor or wrapped by a torch.func transform (jvp, vmap, grad)."""
    return any(torch._C._functorch.is_functorch_wrapped_tensor(t) for t in tensors) or has_tangent(tensors)


def has_tangent(tensors: Iterable[Tensor]) -> bool:
    """Whether any tensor is a dual tensor of forward mode."""
    return any(
        t.is_floating_point() and torch.autograd.forward_ad.unpack_dual(t).tangent is not None
        for t in tensors
    )


def select(
    operator: str,
    backend: str | None,
    tensors: tuple[Tensor, ...],
    refusals: dict[str, Refusal],
    fastest: Callable[[Sequence[str]], str] | None = None,
) -> str:
    """The backend that serves a call of `operator`: the one asked for, or else the best that can.

    Args:
        operator: its name, for messages.
        backend: the name of the one asked for, or None.
        tensors: everything that the call reads and writes.
        refusals: of each backend that has kernels for it.
        fastest: which backend is, of several on the GPU that can serve; without it the first of `NAMES` does.

    Raises:
        ValueError: the backend asked for (by argument, `use_backend` or the environment) cannot serve the
            call; the message says why, and what can.
    """
    asked = backend if backend is not None else _default_name()
    if asked is not None:
        _check_name(asked, "backend")
        reason = _refusal(operator, asked, tensors, refusals)
        if reason is not None:
            can = [n for n in NAMES if _refusal(operator, n, tensors, refusals) is None]
            raise ValueError(
                f"{operator}: backend {asked!r} cannot serve this call: {reason}; what can: {can}"
            )
        return asked
    for name in NAMES:
        if name == "triton" and _on_cpu(tensors):
            # Only its interpreter would serve them, which nobody wants who does not debug a kernel.
            continue
        # Finding out why a backend is missing takes longer than a kernel: not where it has no kernel anyway.
        if (name in refusals or name == "reference") and _refusal(operator, name, tensors, refusals) is None:
            if fastest is not None and name in _ON_GPU:
                able = [n for n in _ON_GPU if _refusal(operator, n, tensors, refusals) is None]
                return fastest(able) if len(able) > 1 else name
            return name
    raise AssertionError("the reference backend serves every call")


def _refusal(
    operator: str, name: str, tensors: tuple[Tensor, ...], refusals: dict[str, Refusal]
) -> str | None:
    if name == "reference":
        return None
    if name not in refusals:
        return _missing(name) or f"it has no kernel for {operator}"
    return _missing(name) or _transform_refusal(name, tensors) or refusals[name](tensors)


def refuse_on_cpu(tensors: tuple[Tensor, ...]) -> str | None:
    """What the C++ kernels cannot take: tensors on another device, or of another element type."""
    for t in tensors:
        if t.device.type != "cpu":
            return f"a tensor is on {t.device}"
        if t.is_floating_point() and t.dtype not in extension.DTYPES:
            return f"a tensor has dtype {t.dtype}; accepted are {', '.join(map(str, extension.DTYPES))}"
    return None


def refuse_on_triton(tensors: tuple[Tensor, ...]) -> str | None:
    """What Triton kernels cannot take: tensors off the GPU, unless they are interpreted, and of some dtypes."""
    for t in tensors:
        if t.device.type != "cuda" and not (t.device.type == "cpu" and tuning.interpreted()):
            return f"a tensor is on {t.device}, and its kernels run on a GPU"
        if t.is_floating_point() and t.dtype not in _GPU_DTYPES:
            return f"a tensor has dtype {t.dtype}; accepted are {', '.join(map(str, _GPU_DTYPES))}"
    return None


def refuse_on_cuda(tensors: tuple[Tensor, ...]) -> str | None:
    """What the CUDA kernels cannot take: tensors off the GPU, on one they were not built for, or of some dtypes."""
    for t in tensors:
        if t.device.type != "cuda":
            return f"a tensor is on {t.device}, and its kernels run on a GPU"
        if t.is_floating_point() and t.dtype not in _GPU_DTYPES:
            return f"a tensor has dtype {t.dtype}; accepted are {', '.join(map(str, _GPU_DTYPES))}"
    return next(filter(None, map(_not_built_for, {t.device for t in tensors})), None)


def _on_cpu(tensors: tuple[Tensor, ...]) -> bool:
    return all(t.device.type == "cpu" for t in tensors)


def backends() -> dict[str, dict[str, object]]:
    """What can run here, and for what cannot, why.

    Returns:
        One entry per backend: `available` (bool), `reason` (why not, or None), and `operators`: for each
        operator that the backend has kernels for, the orders ("forward", "backward", "double_backward")
        that there are; an order that is not listed raises. The cpu entry also has `instruction_set`, and those
        of cuda and triton have `choices`: where both have kernels, the operators for which this one was measured
        to be the faster on the current device, each with what the choice depends on (dtypes, sizes).
    """
    from ttt_kernels import decode
    from ttt_kernels.clipped_sgd import update
    from ttt_kernels.registry import OPERATORS

    table: dict[str, dict[str, object]] = {}
    for name in NAMES:
        reason = _missing(name)
        orders = {op.name: op.orders(name) for op in OPERATORS.values() if op.orders(name)}
        if name in decode.BACKENDS:
            orders["decode"] = ("forward",)
        if name in update.RUN:
            orders[update.NAME] = ("forward",)
        table[name] = {"available": reason is None, "reason": reason, "operators": orders}
    for name in _ON_GPU:
        table[name]["choices"] = tuple(
            work for work, chosen in tuning.choices(_ON_GPU).items() if chosen == name
        )
    if extension.cpu is not None:
        table["cpu"]["instruction_set"] = extension.cpu.instruction_set()
    return table
