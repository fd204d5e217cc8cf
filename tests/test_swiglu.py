"""SwiGLU: every order, dtype, layout and instruction set against the formulas in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import (
    BACKENDS,
    INSTRUCTION_SETS,
    assert_within_budget,
    draw,
    instruction_set,
    relative_error,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from ttt_kernels import swiglu, swiglu_jvp

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def on(backend: str) -> Callable[..., Tensor]:
    return lambda x, g, u, d: swiglu(x, g, u, d, backend=backend)


def arguments(
    lead: tuple[int, ...],
    d: int,
    i: int,
    *,
    batched: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> list[Tensor]:
    """x, w_gate, w_up, w_down, scaled so that gates are of order one."""
    own = lead[:1] if batched else ()
    shapes = [(*lead, d), (*own, i, d), (*own, i, d), (*own, d, i)]
    scales = (1.0, d**-0.5, d**-0.5, i**-0.5)
    return [
        draw(*s, seed=seed + k, scale=c).to(dtype)
        for k, (s, c) in enumerate(zip(shapes, scales, strict=True))
    ]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=12)
@given(
    batch=st.integers(1, 3),
    rows=st.integers(1, 5),
    d=st.integers(4, 40),
    i=st.integers(4, 70),
    batched=st.booleans(),
)
def test_every_order_within_budget(
    backend: str, dtype: torch.dtype, batch: int, rows: int, d: int, i: int, batched: bool
) -> None:
    inputs = arguments((batch, rows), d, i, batched=batched)
    assert_within_budget(on, inputs, dtype, backend, slack=3.0)


@pytest.mark.parametrize("lead", [(), (7,), (2, 1, 3), (0,), (2, 0)], ids=str)
def test_shared_weights_take_any_leading_dimensions(lead: tuple[int, ...]) -> None:
    x, *weights = arguments(lead, 6, 10)
    y = swiglu(x, *weights, backend="cpu")
    assert y.shape == x.shape
    torch.testing.assert_close(y.reshape(-1, 6), swiglu(x.reshape(-1, 6), *weights, backend="reference"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_sequence_has_its_own_weights(backend: str) -> None:
    x, *weights = arguments((3, 5), 8, 12, batched=True)
    y = swiglu(x, *weights, backend=backend)
    for b in range(3):
        torch.testing.assert_close(y[b], swiglu(x[b], *(w[b] for w in weights), backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides(backend: str) -> None:
    x, w_gate, w_up, w_down = arguments((3, 6), 10, 14)
    transposed = x.transpose(0, 1).contiguous().transpose(0, 1)
    sliced = torch.cat([x, x], -1)[..., :10]
    weights = (w_gate.t().contiguous().t(), torch.cat([w_up, w_up])[:14], w_down)
    expected = swiglu(x, w_gate, w_up, w_down, backend="reference")
    for same in (transposed, sliced):
        torch.testing.assert_close(swiglu(same, *weights, backend=backend), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_weights_beside_a_half_precision_x(backend: str, dtype: torch.dtype) -> None:
    x, *weights = (t.to(torch.float32) for t in arguments((4, 5), 12, 20))
    x = x.to(dtype).requires_grad_()
    weights = [w.requires_grad_() for w in weights]
    y = swiglu(x, *weights, backend=backend)
    grads = torch.autograd.grad(y, [x, *weights], torch.ones_like(y))
    assert y.dtype == dtype
    assert [g.dtype for g in grads] == [dtype, torch.float32, torch.float32, torch.float32]
    rounded = [x.detach().double(), *(w.detach().to(dtype).double() for w in weights)]
    rounded = [t.requires_grad_() for t in rounded]
    truth = swiglu(*rounded, backend="reference")
    eps = torch.finfo(dtype).eps
    assert relative_error(y.detach(), truth.detach()) < 2 * eps
    for grad, exact in zip(grads, torch.autograd.grad(truth, rounded, torch.ones_like(truth)), strict=True):
        assert relative_error(grad, exact) < 2 * eps


def test_extreme_gates_stay_finite() -> None:
    gate = torch.tensor([-1e4, -100.0, -88.0, 0.0, 88.0, 100.0, 1e4] * 3)
    eye = torch.eye(21)
    inputs = [gate.diag(), eye, eye, eye]
    for which in BACKENDS:
        leaves = [t.clone().requires_grad_() for t in inputs]
        y = swiglu(*leaves, backend=which)
        grads = torch.autograd.grad(y, leaves, torch.ones_like(y))
        exact = torch.nn.functional.silu(gate.double()) * gate.double()
        assert all(torch.isfinite(g).all() for g in grads)
        torch.testing.assert_close(y.diag().double(), exact, rtol=1e-6, atol=1e-30)


def products(call: Callable[[], Any]) -> int:
    """How many products of matrices a call makes."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        call()
    names = ("aten::mm", "aten::bmm", "aten::addmm_", "aten::baddbmm_")
    return sum(event.name in names for event in found.events())


@pytest.mark.parametrize("batched", [False, True])
def test_reverse_over_reverse_makes_no_product_twice(batched: bool) -> None:
    """Of a loss of the result and of its gradients, as a meta-gradient is.

    Forward 3 and backward 6; then d_hidden again, 4 for the tangents of gate and up, 1 for hidden's cotangent, 2 for
    y's, and for the inputs 5 by the gradients and 6 by the result.
    """
    leaves = [t.requires_grad_() for t in arguments((2, 3), 4, 6, batched=batched)]
    seconds = arguments((2, 3), 4, 6, batched=batched, seed=9)
    results: list[Tensor] = []

    def first() -> None:
        y = swiglu(*leaves, backend="cpu")
        cotangent = torch.ones_like(y).requires_grad_()
        results[:] = y, *torch.autograd.grad(y, leaves, cotangent, create_graph=True)

    def second() -> None:
        loss = results[0].sum() + sum((g * s).sum() for g, s in zip(results[1:], seconds, strict=True))
        torch.autograd.grad(loss, leaves)

    assert products(first) == 3 + 6
    assert products(second) == 1 + 4 + 1 + 2 + 5 + 6


def test_what_carried_cotangents_led_to_is_not_differentiated_again() -> None:
    """It would leave out how they depend on the arguments, even for a leaf that no second order stands before."""
    leaves = [t.requires_grad_() for t in arguments((2, 3), 4, 6)]
    y = swiglu(*leaves, backend="cpu")
    first = torch.autograd.grad(y, leaves, torch.ones_like(y), create_graph=True)
    cotangent = torch.ones_like(y).requires_grad_()
    given = [cotangent, *(torch.ones_like(g) for g in first)]
    second = torch.autograd.grad([y, *first], leaves, given, create_graph=True)
    with pytest.raises(NotImplementedError, match="swiglu_double_backward"):
        torch.autograd.grad(second[0].sum(), cotangent)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set(name: str, dtype: torch.dtype) -> None:
    """With hidden sizes around every vector's, and one that several threads share."""
    with instruction_set(name):
        for i in (1, 2, 7, 9, 16, 33):
            assert_within_budget(on, arguments((1, 3), 4, i), dtype, "cpu", slack=3.0)
        assert_within_budget(on, arguments((150,), 3, 130), dtype, "cpu", slack=3.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_products_in_half_precision(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of processors with such instructions, which torch emulates on others."""
    monkeypatch.setattr("ttt_kernels.matmul.has_native", lambda _: True)
    for batched in (False, True):
        assert_within_budget(on, arguments((2, 5), 12, 20, batched=batched), dtype, "cpu", slack=3.0)


def good() -> dict[str, Tensor]:
    names = ("x", "w_gate", "w_up", "w_down")
    return dict(zip(names, arguments((2, 3), 4, 5), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 3, 4, dtype=torch.int64)}, "x of shape .2, 3, 4. has dtype torch.int64"),
        ({"x": torch.tensor(1.0, dtype=torch.float64)}, "x has no dimensions"),
        ({"x": torch.ones(2, 3, 6, dtype=torch.float64)}, r"w_gate has shape \(5, 4\); accepted is \(5, 6\)"),
        ({"w_gate": torch.ones(5, dtype=torch.float64)}, r"w_gate has shape \(5,\)"),
        ({"w_gate": torch.ones(5, 4)}, "w_gate of shape .5, 4. has dtype torch.float32"),
        ({"w_up": torch.ones(6, 4, dtype=torch.float64)}, r"w_up has shape \(6, 4\); accepted is \(5, 4\)"),
        ({"w_up": torch.ones(2, 5, 4, dtype=torch.float64)}, r"w_up has shape \(2, 5, 4\)"),
        (
            {"w_down": torch.ones(5, 4, dtype=torch.float64)},
            r"w_down has shape \(5, 4\); accepted is \(4, 5\)",
        ),
        (
            {"w_gate": torch.ones(3, 5, 4, dtype=torch.float64)},
            r"w_gate has shape .* accepted is \(2, 5, 4\)",
        ),
        ({"w_down": torch.ones(4, 5, dtype=torch.float64, device="meta")}, "w_down is on meta"),
        ({"w_down": None}, "w_down must be a tensor, got NoneType"),
    ],
)
def test_unsuitable_arguments(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=f"swiglu: {message}"):
        swiglu(**{**good(), **change})
    with pytest.raises(ValueError, match=f"swiglu_jvp: {message}"):
        swiglu_jvp(**{**good(), **change})


def test_batched_weights_need_sequences() -> None:
    _, *weights = arguments((2, 3), 4, 5, batched=True)
    with pytest.raises(ValueError, match=r"x has shape \(2, 4\); accepted is \(B, T, d\)"):
        swiglu(torch.ones(2, 4, dtype=torch.float64), *weights)


def test_unsuitable_tangents_and_backends() -> None:
    with pytest.raises(ValueError, match=r"w_up_dot has shape \(5, 3\)"):
        swiglu_jvp(**good(), w_up_dot=torch.ones(5, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"x_dot has shape \(2, 3, 4\), torch.float32"):
        swiglu_jvp(**good(), x_dot=torch.ones(2, 3, 4))
    with pytest.raises(ValueError, match="x_dot must be a tensor"):
        swiglu_jvp(**good(), x_dot=1.0)
    with pytest.raises(ValueError, match="swiglu_jvp: backend 'cuda' cannot serve this call"):
        swiglu_jvp(**good(), backend="cuda")
    with pytest.raises(ValueError, match="backend 'cuda' cannot serve this call"):
        swiglu(**good(), backend="cuda")
    with pytest.raises(ValueError, match="backend is 'gpu'"):
        swiglu(**good(), backend="gpu")
