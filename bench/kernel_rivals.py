"""Other libraries' kernels, where they are installed and on the device that they are for."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from bench.kernel_contenders import Contender, Function
from bench.kernel_problem import Draw

PACKAGES = {"liger": "liger_kernel", "fla": "fla"}


class Rival(Contender):
    """A library's kernel; `load` imports it, so that a run without it needs no such package."""

    orders: tuple[str, ...] = ("forward", "backward")

    def __init__(
        self, name: str, load: Callable[[Any], Function], orders: tuple[str, ...] = ("forward", "backward")
    ) -> None:
        self.package = PACKAGES[name]
        self.load = load
        self.orders = orders

    def refusal(self, problem: Any) -> str | None:
        if find_spec(self.package) is None:
            return f"the package {self.package} is not installed"
        if not torch.cuda.is_available():
            return "its kernels run on a GPU"
        return None

    def function(self, problem: Any, x: Draw) -> Function:
        function = self.load(problem)
        if not all(t.is_cuda for t in x.inputs):
            raise RuntimeError("its kernels run on a GPU")
        return function


def of_one(kernel: Callable[..., Tensor]) -> Function:
    """A function of one output as contenders have it."""
    return lambda *arguments: (kernel(*arguments),)
