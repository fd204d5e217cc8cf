"""Clipped SGD: every order on both sides of the threshold, at a zero gradient, and the step in place."""

import math
from functools import partial

import pytest
import torch
from harness import BACKENDS, assert_within_budget, draw, orders
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from ttt_kernels import clipped_sgd
from ttt_kernels.clipped_sgd.update import update_
from ttt_kernels.extension import cpu as extension

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INSTRUCTION_SETS = extension.instruction_sets() if extension else []
LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.transpose(1, 2),
    "sliced": lambda t: t[:, ::2],
    "batch last": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "shared": lambda t: t[:1].expand(t.shape),
}


def tuple_of(batch: int, *shapes: tuple[int, ...], seed: int = 0, scale: float = 1.0) -> list[Tensor]:
    return [draw(batch, *shape, seed=seed + i, scale=scale) for i, shape in enumerate(shapes)]


def floor(dtype: torch.dtype) -> float:
    """The learning rate's gradient is an inner product, which cancels."""
    return 100.0 if dtype == torch.float64 else 4.0


def on(
    backend: str,
    max_norm: float | None = 1.0,
    copy_dtype: torch.dtype | None = None,
    layout: str = "contiguous",
):
    """The operator as a function of weights, grads and lr, returning all that has a gradient."""

    def step(*tensors: Tensor) -> list[Tensor]:
        count = len(tensors) // 2
        weights, grads = ([LAYOUTS[layout](t) for t in part] for part in (tensors[:count], tensors[count:-1]))
        out = clipped_sgd(
            weights, grads, lr=tensors[-1], max_norm=max_norm, copy_dtype=copy_dtype, backend=backend
        )
        return [*out.weights, out.norm, *(out.copies or ())]

    return step


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    batch=st.integers(1, 3),
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    max_norm=st.sampled_from([None, 0.5, 3.0, 1000.0]),
    copy_dtype=st.sampled_from([None, torch.bfloat16, torch.float32, torch.float64]),
    layout=st.sampled_from(sorted(LAYOUTS)),
)
def test_within_budget(
    backend: str,
    dtype: torch.dtype,
    batch: int,
    sizes: tuple[int, int],
    max_norm: float | None,
    copy_dtype: torch.dtype | None,
    layout: str,
) -> None:
    shapes = (sizes, sizes[::-1], (2, 3))
    inputs = [*tuple_of(batch, *shapes), *tuple_of(batch, *shapes, seed=10), torch.tensor(0.3).double()]
    step = partial(on, max_norm=max_norm, copy_dtype=copy_dtype, layout=layout)
    assert_within_budget(step, inputs, dtype, backend, floor=floor(dtype))


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set(name: str, dtype: torch.dtype) -> None:
    before = extension.instruction_set()
    extension.choose_instruction_set(name)
    try:
        # One element, a part of a vector, and more than one of the kernel's blocks.
        inputs = [*tuple_of(2, (1,), (37,), (8200,)), *tuple_of(2, (1,), (37,), (8200,), seed=9)]
        inputs.append(torch.tensor(0.7).double())
        for copy_dtype in DTYPES:
            step = partial(on, max_norm=2.0, copy_dtype=copy_dtype)
            assert_within_budget(step, inputs, dtype, "cpu", highest=1, floor=floor(dtype))
    finally:
        extension.choose_instruction_set(before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("max_norm", [None, 0.7, 100.0])
@pytest.mark.parametrize("copies", [None, torch.float64], ids=str)
def test_derivatives_in_float64(backend: str, max_norm: float | None, copies: torch.dtype | None) -> None:
    tensors = [*tuple_of(2, (2, 2), (3,)), *tuple_of(2, (2, 2), (3,), seed=5)]
    inputs = [t.requires_grad_() for t in (*tensors, torch.tensor(0.3, dtype=torch.float64))]
    assert gradcheck(on(backend, max_norm, copies), inputs)
    assert gradgradcheck(on(backend, max_norm, copies), inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_sequence_clips_and_its_neighbour_does_not(backend: str) -> None:
    weights, grads = tuple_of(2, (3,), (2, 2)), tuple_of(2, (3,), (2, 2), seed=5)
    for g in grads:
        g[0] *= 100
        g[1] *= 0.01
    out = clipped_sgd(weights, grads, lr=0.5, max_norm=1.0, backend=backend)
    norm = torch.cat([g.flatten(1) for g in grads], dim=1).norm(dim=1)
    torch.testing.assert_close(out.norm, norm)
    assert norm[0] > 1 > norm[1]
    for w, g, new in zip(weights, grads, out.weights, strict=True):
        torch.testing.assert_close(new[0], w[0] - 0.5 * g[0] / norm[0])
        torch.testing.assert_close(new[1], w[1] - 0.5 * g[1])
    alone = clipped_sgd(
        [w[1:] for w in weights], [g[1:] for g in grads], lr=0.5, max_norm=1.0, backend=backend
    )
    assert all(torch.equal(a[0], b[1]) for a, b in zip(alone.weights, out.weights, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_at_the_threshold_the_derivative_is_that_of_clipping(backend: str) -> None:
    weight, gradient = torch.zeros(1, 2), torch.tensor([[3.0, 4.0]], requires_grad=True)
    cotangent = torch.tensor([[2.0, -1.0]])
    out = clipped_sgd([weight], [gradient], lr=0.1, max_norm=5.0, backend=backend)
    assert out.norm.item() == 5.0
    torch.testing.assert_close(out.weights[0], -0.1 * gradient.detach())
    (found,) = torch.autograd.grad(out.weights[0], gradient, cotangent)
    g = gradient.detach()
    expected = -0.1 * (cotangent - g * (g * cotangent).sum() / 25)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("max_norm", [None, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_zero_gradient(backend: str, max_norm: float | None, dtype: torch.dtype) -> None:
    """No clipping, the norm's own derivative 0, and no NaN at any order."""
    weights, grads = tuple_of(2, (4,), (2, 2)), tuple_of(2, (4,), (2, 2), seed=5)
    for g in grads:
        g[0] = 0
    inputs = [t.to(dtype) for t in (*weights, *grads, torch.tensor(0.25))]
    found = orders(on(backend, max_norm), inputs)
    assert all(t.isfinite().all() for order in found for t in order)
    new, first, _ = found
    assert new[2][0] == 0
    assert all(torch.equal(n[0], w[0]) for n, w in zip(new[:2], inputs[:2], strict=True))
    # Cotangents as the harness draws them: of the new weights, then of the norm.
    for i in range(2):
        cotangent = draw(*inputs[i].shape, seed=i).to(dtype)
        torch.testing.assert_close(first[2 + i][0], -0.25 * cotangent[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradient_of_the_norm(backend: str) -> None:
    grads = [t.requires_grad_() for t in tuple_of(2, (3,), (2, 2))]
    norm = clipped_sgd([torch.zeros_like(g) for g in grads], grads, lr=1.0, backend=backend).norm
    found = torch.autograd.grad(norm.sum(), grads)
    for f, g in zip(found, grads, strict=True):
        torch.testing.assert_close(f, g.detach() / norm.detach().reshape(-1, *[1] * (g.dim() - 1)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_bad_gradients_show(backend: str, bad: float, max_norm: float | None) -> None:
    weights, grads = tuple_of(2, (3,), (2, 2)), tuple_of(2, (3,), (2, 2), seed=5)
    grads[0][0, 1] = bad
    out = clipped_sgd(weights, grads, lr=0.5, max_norm=max_norm, backend=backend)
    assert not out.norm[0].isfinite()
    assert not out.weights[0][0, 1].isfinite()
    if math.isnan(bad) and max_norm is not None:
        assert all(w[0].isnan().all() for w in out.weights)
    assert out.norm[1].isfinite()
    assert all(w[1].isfinite().all() for w in out.weights)


@pytest.mark.parametrize("backend", BACKENDS)
def test_norm_of_extreme_float32_gradients(backend: str) -> None:
    """Squares that float32 cannot hold: too large, and too small."""
    for size in (1e30, 1e-30):
        gradient = torch.full((1, 9), size)
        out = clipped_sgd([torch.zeros(1, 9)], [gradient], lr=1.0, max_norm=size, backend=backend)
        torch.testing.assert_close(out.norm, torch.tensor([3 * size]))
        torch.testing.assert_close(out.weights[0], -gradient / 3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_norm_of_many_elements(backend: str) -> None:
    gradient = draw(1, 300_000, seed=0).float()
    norm = clipped_sgd([gradient], [gradient], lr=1.0, backend=backend).norm
    torch.testing.assert_close(norm, gradient.double().norm(dim=1).float(), rtol=1.2e-7, atol=0)


@pytest.mark.skipif(extension is None, reason="the C++ extension is not built")
def test_bits_do_not_depend_on_threads() -> None:
    inputs = [*tuple_of(2, (50_000,)), *tuple_of(2, (50_000,), seed=3), torch.tensor(0.3).double()]
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append([t for order in orders(on("cpu"), inputs, highest=1) for t in order])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("copy_dtype", DTYPES, ids=str)
def test_copies_are_casts_of_the_new_weights(backend: str, copy_dtype: torch.dtype) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        weights, grads = ([t.to(dtype) for t in tuple_of(2, (33,), seed=s)] for s in (0, 1))
        out = clipped_sgd(weights, grads, lr=0.1, max_norm=1.0, copy_dtype=copy_dtype, backend=backend)
        assert torch.equal(out.copies[0], out.weights[0].to(copy_dtype))
        assert out.copies[0].data_ptr() != out.weights[0].data_ptr()
    assert clipped_sgd(weights, grads, lr=0.1, backend=backend).copies is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_lr_number_or_tensor(backend: str) -> None:
    weights, grads = tuple_of(1, (5,)), tuple_of(1, (5,), seed=1)
    number = clipped_sgd(weights, grads, lr=0.1, backend=backend).weights[0]
    tensor = clipped_sgd(weights, grads, lr=torch.tensor(0.1).double(), backend=backend).weights[0]
    torch.testing.assert_close(number, weights[0] - 0.1 * grads[0], rtol=1e-15, atol=1e-15)
    torch.testing.assert_close(tensor, number, rtol=1e-7, atol=0)
    rate = torch.tensor(0.1, dtype=torch.bfloat16, requires_grad=True)
    new = clipped_sgd(weights, grads, lr=rate, backend=backend).weights[0]
    assert torch.autograd.grad(new.sum(), rate)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_elements(backend: str) -> None:
    out = clipped_sgd([torch.zeros(2, 0)], [torch.zeros(2, 0)], lr=1.0, max_norm=1.0, backend=backend)
    assert torch.equal(out.norm, torch.zeros(2))
    none = clipped_sgd([torch.zeros(0, 3)], [torch.zeros(0, 3)], lr=1.0, max_norm=1.0, backend=backend)
    assert none.weights[0].shape == (0, 3)
    assert none.norm.shape == (0,)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("copy_dtype", [None, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("active", [None, [True, False, True], [False] * 3], ids=str)
def test_update_in_place(
    backend: str, dtype: torch.dtype, copy_dtype: torch.dtype | None, active: list[bool] | None
) -> None:
    shapes = ((3, 4), (9000,))
    weights = [t.to(dtype) for t in tuple_of(3, *shapes)]
    grads = [t.to(dtype).transpose(1, -1) for t in tuple_of(3, (4, 3), (9000,), seed=5)]
    grads[0][1, 2, 0] = math.nan
    out = clipped_sgd(weights, grads, lr=0.3, max_norm=2.0, copy_dtype=copy_dtype, backend=backend)
    # Sequences apart in memory, as slices of a larger state are.
    kept = [torch.full((3, 2, *w.shape[1:]), 7.0, dtype=dtype)[:, 1].copy_(w) for w in weights]
    copies = None if copy_dtype is None else [torch.full(w.shape, 5.0, dtype=copy_dtype) for w in weights]
    mask = None if active is None else torch.tensor(active)
    norm = update_(kept, grads, lr=0.3, max_norm=2.0, copies=copies, active=mask, backend=backend)
    torch.testing.assert_close(norm, out.norm, rtol=0, atol=0, equal_nan=True)
    for i in range(2):
        for b in range(3):
            moves = active is None or active[b]
            expected = out.weights[i][b] if moves else weights[i][b]
            torch.testing.assert_close(kept[i][b], expected, rtol=0, atol=0, equal_nan=True)
            if copies is not None:
                expected = out.copies[i][b] if moves else torch.full_like(copies[i][b], 5.0)
                torch.testing.assert_close(copies[i][b], expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weights": [], "grads": []}, "0 weights and 0 grads"),
        ({"grads": [torch.ones(2, 3)] * 2}, "1 weights and 2 grads"),
        ({"grads": [torch.ones(2, 4)]}, r"grads\[0\] has shape \(2, 4\)"),
        ({"grads": [torch.ones(2, 3).double()]}, r"grads\[0\] .* torch.float64"),
        ({"grads": [torch.ones(2, 3, device="meta")]}, r"grads\[0\] is on meta"),
        ({"weights": [torch.ones(2, 3).int()]}, r"weights\[0\] .* torch.int32"),
        ({"weights": [torch.ones(2, 3), torch.ones(1, 3)], "grads": [torch.ones(2, 3)] * 2}, r"weights\[1\]"),
        ({"weights": [torch.tensor(1.0)], "grads": [torch.tensor(1.0)]}, r"weights\[0\] has shape \(\)"),
        ({"max_norm": 0.0}, "max_norm is 0.0"),
        ({"max_norm": math.nan}, "max_norm is nan"),
        ({"lr": torch.ones(2)}, r"lr has shape \(2,\)"),
        ({"lr": torch.tensor(1)}, "lr .* torch.int64"),
        ({"lr": torch.tensor(1.0, device="meta")}, "lr .* on meta"),
    ],
)
def test_refuses(changes: dict, message: str) -> None:
    arguments = {"weights": [torch.ones(2, 3)], "grads": [torch.ones(2, 3)], "lr": 1.0, **changes}
    with pytest.raises(ValueError, match=f"clipped_sgd: {message}"):
        clipped_sgd(**arguments)
    with pytest.raises(ValueError, match=f"clipped_sgd.update_: {message}"):
        update_(**arguments)


def test_refuses_integer_copies() -> None:
    with pytest.raises(ValueError, match=r"copy_dtype is torch.int8"):
        clipped_sgd([torch.ones(1, 2)], [torch.ones(1, 2)], lr=1.0, copy_dtype=torch.int8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"copies": [torch.ones(2, 4)]}, r"copies have shapes \['\(2, 4\)'\]"),
        ({"copies": []}, r"copies have shapes \[\]"),
        ({"copies": [torch.ones(2, 3).int()]}, r"copies\[0\] .* torch.int32"),
        ({"copies": [torch.ones(3, 2).T]}, r"copies\[0\] has strides \(1, 2\)"),
        ({"weights": [torch.ones(1, 3).expand(2, 3)]}, r"weights\[0\] has strides \(0, 1\)"),
        ({"active": torch.ones(3, dtype=torch.bool)}, r"active has shape \(3,\)"),
        ({"active": torch.ones(2)}, "active .* torch.float32"),
        ({"grads": [torch.ones(2, 3, requires_grad=True)]}, "no gradient is recorded"),
        ({"backend": "cuda"}, "backend 'cuda' cannot serve this call"),
    ],
)
def test_update_refuses(changes: dict, message: str) -> None:
    arguments = {"weights": [torch.ones(2, 3)], "grads": [torch.ones(2, 3)], "lr": 1.0, **changes}
    with pytest.raises(ValueError, match=f"clipped_sgd.update_: {message}"):
        update_(**arguments)
