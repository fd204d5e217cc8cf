"""Decoding on CUDA: the kernel against float64, and that its bits depend on nothing but a sequence.

It runs on the processor (tests/cuda_here.py), and on a GPU too where there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from cuda_here import OnHost
from decode_stacks import assert_agrees, make_stack, map_stack
from torch import Tensor

from ttt_kernels import extension
from ttt_kernels.backends import available, backends
from ttt_kernels.decode import Stack, cuda, step

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Result = tuple[Tensor, Tensor, Tensor]


class Device:
    """Where the kernel runs, and how to change what must not matter there."""

    def __init__(self, name: str, arrange: Callable[[int, int], None]) -> None:
        self.name, self.arrange = name, arrange

    def step(self, stack: Stack, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor) -> Result:
        """A step with the caches of `stack`, results on the CPU."""
        if self.name == "cpu":
            return cuda.step(stack, x, cos, sin, visible)
        there = map_stack(stack, lambda name, t: t.to(self.name))
        arguments = (t.to(self.name) for t in (x, cos, sin, visible))
        prefix, hidden, logits = (t.cpu() for t in step(there, *arguments, backend="cuda"))
        for here, own in zip(stack.layers, there.layers, strict=True):
            here.k_cache.copy_(own.k_cache)
            here.v_cache.copy_(own.v_cache)
        return prefix, hidden, logits


@pytest.fixture(scope="module", params=["host", "gpu"])
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    if request.param == "gpu":
        if "cuda" not in available():
            pytest.skip(str(backends()["cuda"]["reason"]))
        yield Device("cuda", lambda order, processors: None)
        return
    on_host: OnHost = request.getfixturevalue("built_cuda_on_host")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extension, "load_cuda", lambda: (on_host.kernels, ""))
        yield Device("cpu", on_host.arrange)
    on_host.arrange()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "counts"),
    [
        ((1, 2, 64, 104), (70, 33)),
        ((3, 2, 40, 56), (1, 8)),
        ((2, 1, 80, 136), (205, 2)),
        ((5, 3, 8, 8), (3, 1)),
    ],
    ids=str,
)
def test_within_budget(
    device: Device, dtype: torch.dtype, shape: tuple[int, int, int, int], counts: tuple[int, int]
) -> None:
    """`shape`: sequences, heads, their width and the intermediate size."""
    device.arrange(0, 3)
    stack = make_stack(*shape, capacities=(210, 40))
    assert_agrees(device.step, stack, dtype, (counts[0] + 2, counts[1] - 1), counts)
