"""RMSNorm: every order on every backend against float64, and its forward-mode twin."""

import pytest
import torch
from harness import BACKENDS, INSTRUCTION_SETS, assert_within_budget, draw, instruction_set, orders
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ttt_kernels import rms_norm, rms_norm_jvp

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, 1),
    "sliced": lambda x: x[:, ::2],
    "expanded": lambda x: x[:1].expand(3, *x.shape[1:]),
}


def floor(dtype: torch.dtype) -> float | None:
    """In float64 the plain formulas are the truth, but gradients of rows of two elements cancel."""
    return 32.0 if dtype == torch.float64 else None


def on(backend: str, layout: str = "contiguous", eps: float = 1e-6):
    place = LAYOUTS[layout]
    return lambda x, weight, *residual: rms_norm(
        place(x), weight, eps=eps, residual=place(residual[0]) if residual else None, backend=backend
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    rows=st.integers(1, 5),
    n=st.sampled_from([1, 2, 7, 16, 33, 64, 100]),
    layout=st.sampled_from(sorted(LAYOUTS)),
    eps=st.sampled_from([1e-6, 0.1]),
    added=st.booleans(),
)
def test_within_budget(
    backend: str, dtype: torch.dtype, rows: int, n: int, layout: str, eps: float, added: bool
) -> None:
    # A row of one element is its own norm: without a visible eps its derivative vanishes.
    eps = 0.5 if n == 1 else eps
    inputs = [draw(3, rows, n, seed=rows), draw(n, seed=n)] + [draw(3, rows, n, seed=9)] * added
    assert_within_budget(lambda name: on(name, layout, eps), inputs, dtype, backend, floor=floor(dtype))


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set(name: str, dtype: torch.dtype) -> None:
    with instruction_set(name):
        for n in (3, 40, 65):
            inputs = [draw(70, n, seed=0), draw(n, seed=1), draw(70, n, seed=2)]
            assert_within_budget(on, inputs, dtype, "cpu", floor=floor(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_residual_is_added_before_the_only_rounding(backend: str, dtype: torch.dtype) -> None:
    x, weight, residual = (draw(*s, seed=i) for i, s in enumerate([(40, 24), (24,), (40, 24)]))
    x, weight, residual = x.to(dtype), weight.float(), residual.to(dtype)
    exact = rms_norm(x.double(), weight.double(), residual=residual.double(), backend="reference")
    assert torch.equal(rms_norm(x, weight, residual=residual, backend=backend), exact.to(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_rows(backend: str) -> None:
    """The weight's gradient is a sum over rows: its error must not grow with their number."""
    assert_within_budget(on, [draw(20_000, 11, seed=0), draw(11, seed=1)], torch.float32, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_weight_beside_half_x(backend: str, dtype: torch.dtype) -> None:
    x, weight = draw(4, 24, seed=0).to(dtype), draw(24, seed=1).float()
    y, dx, dw = (t for order in orders(on(backend), [x, weight], highest=1) for t in order)
    assert (y.dtype, dx.dtype, dw.dtype) == (dtype, dtype, torch.float32)
    exact = rms_norm(x.double(), weight.double(), backend="reference")
    # One rounding of the output, none of the weight.
    assert torch.equal(y, exact.to(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_cotangent_and_empty_rows(backend: str) -> None:
    x, weight = draw(3, 8, seed=0).requires_grad_(), draw(8, seed=1).requires_grad_()
    found = torch.autograd.grad(rms_norm(x, weight, backend=backend).sum(), (x, weight))
    expected = torch.autograd.grad(rms_norm(x, weight, backend="reference").sum(), (x, weight))
    torch.testing.assert_close(found, expected)
    empty = rms_norm(x[:0], weight, backend=backend)
    assert empty.shape == (0, 8)
    assert torch.autograd.grad(empty.sum(), weight)[0].abs().max() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_row(backend: str) -> None:
    x = draw(3, 20, seed=0).float()
    x[1, 4] = float("nan")
    y = rms_norm(x, torch.ones(20), backend=backend)
    assert y[1].isnan().all()
    assert y[[0, 2]].isfinite().all()


def _tangents() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return draw(2, 3, 6, seed=0), draw(6, seed=1), draw(2, 3, 6, seed=2), draw(6, seed=3)


def test_jvp_is_the_directional_derivative() -> None:
    x, weight, x_dot, weight_dot = _tangents()
    y, y_dot = rms_norm_jvp(x, weight, x_dot, weight_dot)
    step = 1e-6
    ahead, behind = (rms_norm(x + s * x_dot, weight + s * weight_dot) for s in (step, -step))
    torch.testing.assert_close(y, rms_norm(x, weight))
    torch.testing.assert_close(y_dot, (ahead - behind) / (2 * step), rtol=1e-7, atol=1e-8)


def test_jvp_takes_none_for_zero() -> None:
    x, weight, x_dot, weight_dot = _tangents()
    of_x = rms_norm_jvp(x, weight, x_dot, None)[1]
    of_weight = rms_norm_jvp(x, weight, None, weight_dot)[1]
    torch.testing.assert_close(of_x + of_weight, rms_norm_jvp(x, weight, x_dot, weight_dot)[1])
    assert rms_norm_jvp(x, weight)[1].abs().max() == 0
    half = rms_norm_jvp(x.bfloat16(), weight.bfloat16(), x_dot.bfloat16())
    assert [t.dtype for t in half] == [torch.bfloat16, torch.bfloat16]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.ones(7)}, r"weight has shape \(7,\).*x having shape \(2, 8\)"),
        ({"weight": torch.ones(8, dtype=torch.float64)}, "weight .* dtype torch.float64"),
        ({"x": torch.ones(2, 8, dtype=torch.int64)}, "x .* dtype torch.int64"),
        ({"x": torch.tensor(1.0)}, "weight has shape"),
        ({"x": None}, "x must be a tensor, got NoneType"),
        ({"weight": torch.ones(8, device="meta")}, "weight is on meta but x is on cpu"),
        ({"eps": -1.0}, "eps is -1.0"),
        ({"residual": torch.ones(8)}, r"residual has shape \(8,\) and dtype torch.float32; accepted are x's"),
        ({"residual": torch.ones(2, 8).half()}, "residual has shape .* and dtype torch.float16"),
        ({"residual": 1.0}, "residual must be a tensor"),
    ],
)
def test_refuses(changes: dict, message: str) -> None:
    arguments = {"x": torch.ones(2, 8), "weight": torch.ones(8), **changes}
    with pytest.raises(ValueError, match=f"rms_norm: {message}"):
        rms_norm(**arguments)
    with pytest.raises(ValueError, match=f"rms_norm_jvp: {message}"):
        rms_norm_jvp(**arguments)


def test_jvp_refuses() -> None:
    x, weight = torch.ones(2, 8), torch.ones(8)
    with pytest.raises(ValueError, match=r"x_dot has shape \(8,\)"):
        rms_norm_jvp(x, weight, torch.ones(8))
    with pytest.raises(ValueError, match=r"weight_dot has shape .* torch.float64"):
        rms_norm_jvp(x, weight, None, torch.ones(8, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"'cuda' cannot serve this call: .*what can: .*'reference'"):
        rms_norm_jvp(x, weight, x, backend="cuda")
    with pytest.raises(ValueError, match="residual_dot is given without residual"):
        rms_norm_jvp(x, weight, residual_dot=x)
