"""SwiGLU's Triton kernels, every order against float64: interpreted, or on a GPU where there is one."""

from collections.abc import Callable

import pytest
import torch
from harness import assert_within_budget, draw, relative_error
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_here import DEVICE, needs_triton

from ttt_kernels import swiglu
from ttt_kernels.swiglu import operator, triton, triton_configs
from ttt_kernels.swiglu.triton_configs import SEPARATE, of_products

# test_every_operator.py has a fast test of every order.
pytestmark = [needs_triton, pytest.mark.slow]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=["fused", "separate"])
def candidate(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way of making the forward's products."""
    chosen = slice(1) if request.param == "separate" else slice(-1, None)
    with_both = lambda *given: (SEPARATE, *of_products(*given))[chosen]  # noqa: E731
    monkeypatch.setattr(triton, "of_products", with_both)
    return request.param


def on(backend: str) -> Callable[..., Tensor]:
    return lambda *inputs: swiglu(*inputs, backend=backend)


def problem(lead: tuple[int, ...], d: int, i: int, batched: bool = False) -> list[Tensor]:
    """x, w_gate, w_up, w_down, scaled so that gates are of order one."""
    own = lead[:1] if batched else ()
    shapes = ((*lead, d), (*own, i, d), (*own, i, d), (*own, d, i))
    scales = (1.0, d**-0.5, d**-0.5, i**-0.5)
    pairs = zip(shapes, scales, strict=True)
    return [draw(*s, seed=k, scale=c).to(DEVICE) for k, (s, c) in enumerate(pairs)]


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.usefixtures("candidate")
def test_within_budget_in_float32(batched: bool) -> None:
    """Two tiles of rows, of columns and of what is summed over; when interpreted, one has 16, 32 and 32."""
    assert_within_budget(on, problem((2, 17), 48, 48, batched), torch.float32, "triton")


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.usefixtures("candidate")
def test_within_budget_in_16_bits(dtype: torch.dtype, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With products in the inputs' type, and in the float32 that a processor widens them to."""
    monkeypatch.setattr("ttt_kernels.matmul.has_native", lambda _: native)
    assert_within_budget(on, problem((1, 17), 16, 48, True), dtype, "triton")


# To find a smaller failing example takes minutes.
@settings(max_examples=4, phases=[Phase.explicit, Phase.generate])
@given(data=st.data())
def test_within_budget_of_anything(data: st.DataObject) -> None:
    pick = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
    dtype, batched = pick(*DTYPES), pick(False, True)
    # With fewer numbers than these, a single sum that cancels is the whole result.
    inputs = problem((pick(1, 2), pick(1, 5, 16)), pick(4, 16, 35, 48), pick(7, 32, 48), batched)
    assert_within_budget(on, inputs, dtype, "triton")


def test_tiles_in_every_place() -> None:
    """More tiles below each other than follow one another, of several sequences."""
    x, w_gate, w_up, _ = (t.float() for t in problem((2, 16 * 9 + 1), 16, 48, True))
    found = operator.kernels["triton"]["forward"](x, w_gate, w_up, torch.zeros_like(w_up.mT))
    for own, w in zip(found[1:], (w_gate, w_up), strict=True):
        assert relative_error(own, x.double() @ w.double().mT) < 1e-6


@pytest.mark.usefixtures("candidate")
def test_layouts() -> None:
    """Rows that are parts of longer ones, columns apart, one set of weights for all sequences, strides of 0."""
    x, w_gate, w_up, w_down = (t.float() for t in problem((2, 3), 16, 32))
    sliced, apart = torch.cat([x, x], -1)[..., 16:], x.mT.contiguous().mT
    expected = swiglu(x, w_gate, w_up, w_down, backend="reference")
    weights = (w_gate.t().contiguous().t(), torch.cat([w_up, w_up])[32:], w_down)
    same = tuple(w.expand(2, *w.shape) for w in weights)
    for given_x in (sliced, apart, x.transpose(0, 1).contiguous().transpose(0, 1)):
        for given_weights in (weights, same):
            torch.testing.assert_close(swiglu(given_x, *given_weights, backend="triton"), expected)


@pytest.mark.parametrize("lead", [(), (2, 1, 3), (0,), (2, 0)], ids=str)
@pytest.mark.usefixtures("candidate")
def test_any_leading_dimensions(lead: tuple[int, ...]) -> None:
    leaves = [t.float().requires_grad_() for t in problem(lead, 16, 16)]
    y = swiglu(*leaves, backend="triton")
    torch.testing.assert_close(y, swiglu(*leaves, backend="reference"))
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), leaves))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.usefixtures("candidate")
def test_float32_weights_beside_a_half_precision_x(dtype: torch.dtype) -> None:
    x, *weights = problem((4,), 16, 32)
    leaves = [x.to(dtype).requires_grad_(), *(w.float().requires_grad_() for w in weights)]
    y = swiglu(*leaves, backend="triton")
    grads = torch.autograd.grad(y.sum(), leaves)
    assert [t.dtype for t in (y, *grads)] == [dtype, dtype, *[torch.float32] * 3]
    wide = [t.detach().to(dtype).double().requires_grad_() for t in leaves]
    truth = swiglu(*wide, backend="reference")
    eps = torch.finfo(dtype).eps
    assert relative_error(y.detach(), truth.detach()) < 2 * eps
    for grad, exact in zip(grads, torch.autograd.grad(truth.sum(), wide), strict=True):
        assert relative_error(grad, exact) < 2 * eps


@pytest.mark.usefixtures("candidate")
def test_extreme_gates_stay_finite() -> None:
    gate = torch.tensor([-1e4, -100.0, -88.0, 0.0, 88.0, 100.0, 1e4], device=DEVICE)
    gate = torch.nn.functional.pad(gate, (0, 9))
    eye = torch.eye(16, device=DEVICE)
    leaves = [t.clone().requires_grad_() for t in (gate.diag(), eye, eye, eye)]
    y = swiglu(*leaves, backend="triton")
    first = torch.autograd.grad(y, leaves, torch.ones_like(y), create_graph=True)
    second = torch.autograd.grad(first, leaves, [torch.ones_like(g) for g in first])
    exact = torch.nn.functional.silu(gate.double()) * gate.double()
    assert all(torch.isfinite(g).all() for g in (*first, *second))
    torch.testing.assert_close(y.diag().double(), exact, rtol=1e-6, atol=1e-30)


# -- Orders called for themselves ---------------------------------------------------------------------------


def assert_close(order: str, given: list, needs: list[bool]) -> None:
    wide = [None if t is None else t.double() for t in given]
    own = operator.kernels["triton"][order](*given, needs)
    for o, e, need in zip(own, operator.kernels["reference"][order](*wide, needs), needs, strict=True):
        if not need:
            assert o is None
        elif o is None:
            # What no cotangent reaches.
            assert e.norm() == 0
        else:
            assert relative_error(o, e) < 2e-6


# -- The registered operators and the choices ---------------------------------------------------------------


def test_refuses() -> None:
    with pytest.raises(ValueError, match=r"dtype torch.float64; accepted are .*; what can: .*'reference'"):
        swiglu(*problem((2,), 3, 4), backend="triton")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_products_of_torch_are_among_the_choices(
    dtype: torch.dtype, capability: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And are what is taken where nothing can be timed."""
    monkeypatch.setattr(triton_configs, "interpreted", lambda: False)
    choices = of_products(dtype, 32, 48, capability)
    assert choices[0] == SEPARATE
    assert len(set(map(str, choices))) == len(choices) > 1
    assert of_products(dtype, 32, 40, capability) == of_products(dtype, 8, 48, capability) == (SEPARATE,)
