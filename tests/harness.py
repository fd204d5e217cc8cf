"""What the operators' tests share: every order of an operator against float64, with an honest budget."""

import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from ttt_kernels.backends import available
from ttt_kernels.extension import cpu as extension

BACKENDS = tuple(name for name in available() if name in ("cpu", "reference"))
"""Backends whose kernels run on CPU tensors here."""


def _interprets() -> bool:
    """Whether Triton's kernels can run here: that of 3.6 makes integers of arrays in a way that NumPy 2.4 refuses."""
    if torch.cuda.is_available():
        return True
    old = tuple(map(int, version("triton").split(".")[:2])) < (3, 7)
    return not old or tuple(map(int, version("numpy").split(".")[:2])) < (2, 4)


EVERY_BACKEND = tuple(name for name in available() if name != "triton" or _interprets())
"""Backends whose kernels run here, interpreted ones included."""
INSTRUCTION_SETS = extension.instruction_sets() if extension else []
"""Instruction sets of the C++ kernels that run here."""

Function = Callable[..., Tensor | Sequence[Tensor]]


def draw(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    """Standard normal float64 values, times `scale`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64) * scale


def orders(
    function: Function, inputs: Sequence[Tensor], *, highest: int = 2, seed: int = 0
) -> list[list[Tensor]]:
    """Outputs, gradients and gradients of gradients of a function at `inputs`.

    The first-order loss is the inner product of the outputs with fixed random cotangents; the second-order
    loss is that of all gradients with fixed random cotangents, differentiated with respect to the inputs and
    to the first cotangents, so that every term of every formula counts.
    """
    leaves = [t.detach().clone().requires_grad_() if t.is_floating_point() else t for t in inputs]
    wanted = [t for t in leaves if t.requires_grad]
    out = function(*leaves)
    outputs = [out] if isinstance(out, Tensor) else list(out)
    results = [[o.detach() for o in outputs]]
    if highest == 0:
        return results
    cotangents = [draw(*o.shape, seed=seed + i).to(o.dtype).requires_grad_() for i, o in enumerate(outputs)]
    first = torch.autograd.grad(outputs, wanted, cotangents, create_graph=highest > 1)
    results.append([g.detach() for g in first])
    if highest > 1:
        seconds = [draw(*g.shape, seed=seed + 100 + i).to(g.dtype) for i, g in enumerate(first)]
        both = [*wanted, *cotangents]
        grads = torch.autograd.grad(first, both, seconds, allow_unused=True)
        results.append([torch.zeros_like(t) if g is None else g for g, t in zip(grads, both, strict=True)])
    return results


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Norm of the difference over the norm of the float64 truth; NaN and infinity count as infinite."""
    difference = (value.double() - truth).norm() / truth.norm().clamp_min(1e-300)
    return float(difference) if torch.isfinite(difference) else float("inf")


def assert_within_budget(
    function: Callable[[str], Function],
    inputs: Sequence[Tensor],
    dtype: torch.dtype,
    backend: str,
    *,
    highest: int = 2,
    slack: float = 2.0,
    floor: float | None = None,
) -> None:
    """A backend's error at every order is at most `slack` times that of the plain formulas at the same dtype.

    Both are measured against the formulas in float64 on the same (already rounded) inputs.

    Args:
        function: gives the operator on a backend, as a function of the input tensors.
        inputs: float64 tensors (rounded to `dtype` here) and integer tensors.
        slack: how many times the plain formulas' error is allowed.
        floor: how many of the dtype's epsilons are allowed besides: by default half of one in 16 bits, where the
            rounding of a result alone is more, and 4 where the plain formulas happen to be nearly exact (in
            float64 they are the truth and have no error, so that sums which cancel need more).
    """
    if floor is None:
        floor = 0.5 if dtype in (torch.bfloat16, torch.float16) else 4.0
    rounded = [t.to(dtype) if t.is_floating_point() else t for t in inputs]
    wide = [t.double() if t.is_floating_point() else t for t in rounded]
    truth = orders(function("reference"), wide, highest=highest)
    honest = orders(function("reference"), rounded, highest=highest)
    found = orders(function(backend), rounded, highest=highest)
    for order, (exact, plain, own) in enumerate(zip(truth, honest, found, strict=True)):
        assert any(t.abs().max() > 0 for t in exact if t.numel()), f"order {order}: the truth is all zeros"
        for i, (e, p, o) in enumerate(zip(exact, plain, own, strict=True)):
            if e.numel() == 0:
                continue
            # A result may be rounded to a dtype of its own.
            unit = max(torch.finfo(dtype).eps, torch.finfo(p.dtype).eps)
            budget = slack * relative_error(p, e) + floor * unit
            error = relative_error(o, e) if e.norm() > 0 else float(o.double().norm())
            assert error <= budget, f"order {order}, result {i}: error {error:.3g} beyond {budget:.3g}"


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """The C++ kernels of one instruction set, within the context."""
    assert extension is not None
    before = extension.instruction_set()
    extension.choose_instruction_set(name)
    try:
        yield
    finally:
        extension.choose_instruction_set(before)


def reason_in(folder: Path, backend: str, environment: Mapping[str, str]) -> str:
    """Why a backend cannot run, in a process that has the packages of `folder`."""
    # The finder of an editable installation would look for what was not built there in its checkout.
    script = (
        "import sys\n"
        "of_checkout = lambda finder: getattr(finder, '__module__', '').startswith('__editable__')\n"
        "sys.meta_path[:] = [finder for finder in sys.meta_path if not of_checkout(finder)]\n"
        "import ttt_kernels\n"
        f"print(ttt_kernels.backends()[{backend!r}]['reason'])"
    )
    run = [sys.executable, "-c", script]
    told = subprocess.run(run, cwd=folder, env=environment, check=True, capture_output=True, text=True)
    return told.stdout.strip()
