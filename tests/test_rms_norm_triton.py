"""RMSNorm's Triton kernels, every order against float64: interpreted, or on a GPU where there is one."""

import sys

import pytest
import torch
from harness import assert_within_budget, draw
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_here import DEVICE, needs_triton

from ttt_kernels import rms_norm
from ttt_kernels.rms_norm import operator
from ttt_kernels.rms_norm.triton_configs import LARGEST
from ttt_kernels.rms_norm.triton_located import rows_of

# test_every_operator.py has a fast test of every order.
pytestmark = [needs_triton, pytest.mark.slow]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = {
    "contiguous": lambda x: x,
    "heads of a product": lambda x: torch.cat([x, x], 2)[:, :, : x.shape[2]],
    "heads first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "every second row": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "strided elements": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "expanded": lambda x: x[:1].expand(x.shape),
}


def on(backend: str, layout: str = "contiguous", eps: float = 0.1):
    place = LAYOUTS[layout]

    def norm(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> Tensor:
        residual = None if residual is None else place(residual)
        return rms_norm(place(x), weight, residual=residual, eps=eps, backend=backend)

    return norm


def inputs(*shape: int, residual: bool = True) -> list[Tensor]:
    found = [draw(*shape, seed=1), draw(shape[-1], seed=2), draw(*shape, seed=3)]
    return [t.to(DEVICE) for t in found[: 3 if residual else 2]]


# Interpreted tiles have 4 rows, and three programs at most sum over rows.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(2, 15, 1, 20), (1, 1, 1, 1), (1, 1, 2, 64)])
def test_within_budget(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    assert_within_budget(on, inputs(*shape), dtype, "triton")


def test_rows_of_three_strides() -> None:
    function = lambda name: on(name, "heads first")  # noqa: E731
    assert_within_budget(function, inputs(2, 3, 2, 8), torch.float32, "triton")


# To find a smaller failing example takes minutes.
@settings(max_examples=8, phases=[Phase.explicit, Phase.generate])
@given(data=st.data())
def test_within_budget_of_anything(data: st.DataObject) -> None:
    pick = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
    dtype, layout = pick(*DTYPES), pick(*sorted(LAYOUTS))
    shape = (pick(1, 3), pick(1, 2, 5), pick(1, 3), pick(1, 2, 7, 16, 33))
    given = inputs(*shape, residual=pick(True, False))
    assert_within_budget(lambda name: on(name, layout), given, dtype, "triton")


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_float32_weight_beside_half_x(dtype: torch.dtype) -> None:
    x, weight, residual = inputs(1, 3, 2, 24)
    x, weight = x.to(dtype).requires_grad_(), weight.float().requires_grad_()
    y = rms_norm(x, weight, backend="triton")
    assert torch.equal(y, rms_norm(x.double(), weight.double(), backend="reference").to(dtype))
    dx, dw = torch.autograd.grad(y, (x, weight), residual.to(dtype))
    assert (dx.dtype, dw.dtype) == (dtype, torch.float32)


def test_long_rows_are_summed_apart() -> None:
    assert_within_budget(on, inputs(1, 2, 1, 5000), torch.float32, "triton")


def arguments(dtype: torch.dtype = torch.float32) -> list:
    """Arguments of the backward."""
    x, weight, residual = (t.to(dtype) for t in inputs(3, 5, 1, 12))
    rstd = operator.forward(x, weight, residual, 0.1, backend="reference")[1]
    return [draw(*x.shape, seed=4).to(DEVICE, dtype), x, weight, residual, rstd, 0.1]


def cotangents(dtype: torch.dtype = torch.float32) -> list[Tensor]:
    _, x, weight, *_ = arguments()
    return [draw(*t.shape, seed=7 + i).to(DEVICE, dtype) for i, t in enumerate((x, weight, x))]


@pytest.mark.parametrize("order", ["backward", "double_backward"])
@pytest.mark.parametrize("long", [False, True])
def test_only_what_is_needed(order: str, long: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if long:
        monkeypatch.setattr(sys.modules["ttt_kernels.rms_norm.triton"], "SUMMED", 4)
    given = arguments() if order == "backward" else [*cotangents(), *arguments()]
    results = 3 if order == "backward" else 4
    everything = operator.kernels["triton"][order](*given, [True] * results)
    for wanted in range(2**results):
        needs = [bool(wanted >> i & 1) for i in range(results)]
        for need, f, e in zip(
            needs, operator.kernels["triton"][order](*given, needs), everything, strict=True
        ):
            assert torch.equal(f, e) if need else f is None


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_residuals_gradient_is_a_copy(dtype: torch.dtype) -> None:
    given = arguments(dtype)
    given[0][0, 0] = 1e-7
    assert torch.equal(operator.kernels["triton"]["backward"](*given, [True] * 3)[2], given[0])


def test_nan_stays_in_its_row() -> None:
    leaves = [t.float().requires_grad_() for t in inputs(1, 3, 1, 20)]
    x = leaves[0].detach().clone()
    x[0, 1, 0, 4] = float("nan")
    leaves[0] = x.requires_grad_()
    y = rms_norm(leaves[0], leaves[1], residual=leaves[2], backend="triton")
    dx = torch.autograd.grad(y, leaves[0], torch.ones_like(y))[0]
    for t in (y, dx):
        assert t[0, 1].isnan().all()
        assert t[0, [0, 2]].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 4)])
def test_empty(shape: tuple[int, ...]) -> None:
    leaves = [t.float().requires_grad_() for t in inputs(*shape)]
    y = rms_norm(leaves[0], leaves[1], residual=leaves[2], backend="triton")
    assert y.shape == shape
    first = torch.autograd.grad(y.sum(), leaves, create_graph=True)
    assert all(g.sum() == 0 for g in first)


def test_rows_are_copied_only_where_strides_do_not_locate_them() -> None:
    x = torch.zeros(2, 6, 4, 8)
    for tensors, rank, copied in (
        ([x, None], 1, 0),
        ([x[:, :, :2], None, x[:, :, 1:3]], 2, 0),
        ([x.transpose(1, 2), x.new_zeros(2, 4, 6, 8)], 3, 0),
        ([x[..., :4], x[..., 4:]], 1, 0),
        ([x[..., ::2]], 1, 1),
        ([torch.zeros(2, 3, 2, 3, 8)[:, :, ::2, ::2], torch.zeros(2, 2, 3, 3, 8).transpose(1, 2)[:, :, :1, :2]], 3, 0),
        ([torch.zeros(8, 9, 9, 9, 8)[:, ::2, ::2, ::2], torch.zeros(8, 5, 5, 5, 8)], 1, 1),
    ):  # fmt: skip
        found = rows_of(tensors)
        assert found.rank == rank
        given = [(f[0], t) for f, t in zip(found.located, tensors, strict=True) if f is not None]
        assert sum(a.data_ptr() != b.data_ptr() for a, b in given) == copied


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, LARGEST + 1), f"rows have {LARGEST + 1} elements; accepted are up to {LARGEST}"),
        (torch.zeros(1, 1).expand(2**31, 1), "there are 2147483648 rows; accepted are up to"),
        (torch.zeros(2, 8).double(), "dtype torch.float64; accepted are "),
    ],
)
def test_refuses(x: Tensor, message: str) -> None:
    x = x.to(DEVICE) if x.numel() < 2**20 else x
    weight = torch.ones(x.shape[-1], dtype=x.dtype, device=x.device)
    with pytest.raises(ValueError, match=f"backend 'triton' cannot serve this call: .*{message}"):
        rms_norm(x, weight, backend="triton")
