"""Results written past the processor's caches are those written into them."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from harness import BACKENDS, INSTRUCTION_SETS, draw, instruction_set
from operators import flat
from torch import Tensor

from ttt_kernels import extension
from ttt_kernels.registry import OPERATORS, ORDERS

pytestmark = pytest.mark.skipif("cpu" not in BACKENDS, reason="without the C++ extension")

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def drawn(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    return draw(*shape, seed=seed).to(dtype)


def norm(dtype: torch.dtype, order: str, width: int) -> list[Any]:
    x, weight, residual, dy = (
        drawn(dtype, *s, seed=i) for i, s in enumerate([(5, width), (width,)] + [(5, width)] * 2)
    )
    given = [x, weight, residual]
    if order == "forward":
        return [*given, 1e-5]
    rstd = OPERATORS["rms_norm"].kernels["reference"]["forward"](*given, 1e-5)[1]
    if order == "backward":
        return [dy, *given, rstd, 1e-5, [True] * 3]
    return [dy + 1, weight + 1, residual + 1, dy, *given, rstd, 1e-5, [True] * 4]


def rotation(dtype: torch.dtype, order: str, width: int, interleaved: bool) -> list[Any]:
    x, dy = (drawn(dtype, 2, 3, 2, width, seed=i) for i in range(2))
    rest = [torch.arange(3), 1e4, interleaved]
    return {
        "forward": [x, *rest],
        "backward": [dy, x, *rest, [True]],
        "double_backward": [x + 1, dy, x, *rest, [True] * 2],
    }[order]


def step(dtype: torch.dtype, order: str, copied: torch.dtype | None) -> list[Any]:
    # Several pieces and blocks, a last one that is not full, and rows of which some are not aligned.
    def tensors(seed: int) -> list[Tensor]:
        return [drawn(dtype, *s, seed=seed + i) for i, s in enumerate([(2, 91, 100), (2, 7), (2, 16)])]

    rest = [torch.tensor(0.1, dtype=dtype if dtype == torch.float64 else torch.float32), 3.0, copied]
    d_copies = [] if copied is None else [t.to(copied) for t in tensors(30)]
    backward = [tensors(20), torch.ones(2, dtype=rest[0].dtype), d_copies, tensors(0), tensors(10), *rest]
    return {
        "forward": [tensors(0), tensors(10), *rest],
        "backward": [*backward, [True] * 3],
        "double_backward": [tensors(40), tensors(50), rest[0], *backward, [True] * 6],
    }[order]


CASES: dict[str, tuple[str, Callable[[torch.dtype, str], list[Any]]]] = {
    **{f"norm of {n}": ("rms_norm", lambda d, o, n=n: norm(d, o, n)) for n in (32, 37)},
    **{
        f"rotation of {n}{', interleaved' * i}": ("rope", lambda d, o, n=n, i=i: rotation(d, o, n, bool(i)))
        for n in (64, 18)
        for i in (0, 1)
    },
    **{
        f"step, copies in {c}": ("clipped_sgd", lambda d, o, c=c: step(d, o, c))
        for c in (None, torch.bfloat16, torch.float32)
    },
}


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_same_bits(
    case: str, dtype: torch.dtype, order: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    operator, arguments = CASES[case]
    kernel = OPERATORS[operator].kernels["cpu"][order]
    given = arguments(dtype, order)

    def results() -> Sequence[Tensor]:
        with instruction_set(name):
            return flat(kernel(*given))

    expected = results()
    monkeypatch.setattr(extension, "_CACHE_BYTES", -1)
    for own, other in zip(results(), expected, strict=True):
        assert torch.equal(own, other)


def test_what_caches_hold_stays_there() -> None:
    assert not extension.beyond_caches(torch.empty(1 << 20), None)
    assert extension.beyond_caches(torch.empty(9 << 20, dtype=torch.bfloat16), torch.empty(4 << 20))
