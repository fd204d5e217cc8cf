"""Clipped SGD's Triton kernels, every order against float64: interpreted, or on a GPU where there is one."""

import math
from functools import partial

import pytest
import torch
from harness import assert_within_budget, draw, orders
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_here import DEVICE, needs_triton

from ttt_kernels import clipped_sgd
from ttt_kernels.clipped_sgd import operator, triton_configs
from ttt_kernels.clipped_sgd.update import update_

# test_every_operator.py has a fast test of every order.
pytestmark = [needs_triton, pytest.mark.slow]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.transpose(1, -1).contiguous().transpose(1, -1),
    "sequences apart": lambda t: t.repeat_interleave(2, 0)[::2],
    "batch last": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    "shared": lambda t: t[:1].expand(t.shape),
}


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


def tuple_of(batch: int, *shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    return [draw(batch, *shape, seed=seed + i).to(DEVICE) for i, shape in enumerate(shapes)]


def inputs(batch: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    rate = torch.tensor(0.3, dtype=torch.float64, device=DEVICE)
    return [*tuple_of(batch, *shapes), *tuple_of(batch, *shapes, seed=10), rate]


# Interpreted blocks have 32 elements, and a sequence about three chunks: these begin, end and lie within chunks.
@pytest.mark.parametrize(
    ("dtype", "max_norm", "copy_dtype"),
    [
        (torch.float32, 1.0, None),
        (torch.float32, None, torch.float64),
        (torch.bfloat16, 100.0, torch.bfloat16),
        (torch.float16, 0.7, None),
    ],
    ids=str,
)
def test_within_budget(dtype: torch.dtype, max_norm: float | None, copy_dtype: torch.dtype | None) -> None:
    step = partial(on, max_norm=max_norm, copy_dtype=copy_dtype)
    assert_within_budget(step, inputs(1, (5,), (35, 3)), dtype, "triton")


@pytest.mark.parametrize("max_norm", [None, 9.0])
def test_within_budget_of_a_longer_tuple(max_norm: float | None) -> None:
    """Of tensors that are empty, or of one element, and of more than one sequence."""
    step = partial(on, max_norm=max_norm, copy_dtype=torch.bfloat16)
    assert_within_budget(step, inputs(2, (0,), (5,), (11, 3), (0,), (1,), (0,)), torch.float32, "triton")


# To find a smaller failing example takes minutes.
@settings(max_examples=3, phases=[Phase.explicit, Phase.generate])
@given(data=st.data())
def test_within_budget_of_anything(data: st.DataObject) -> None:
    pick = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
    shapes = ((pick(1, 7, 40), pick(1, 3)), (2, 3))
    step = partial(
        on, max_norm=pick(None, 0.5, 1000.0), copy_dtype=pick(None, *DTYPES), layout=pick(*sorted(LAYOUTS))
    )
    assert_within_budget(step, inputs(pick(1, 2), *shapes), pick(*DTYPES), "triton", floor=4.0)


def test_one_sequence_clips_and_its_neighbour_does_not() -> None:
    weights, grads = ([t.float() for t in tuple_of(2, (3,), (2, 2), seed=s)] for s in (0, 5))
    for g in grads:
        g[0] *= 100
        g[1] *= 0.01
    out = clipped_sgd(weights, grads, lr=0.5, max_norm=1.0, backend="triton")
    norm = torch.cat([g.flatten(1) for g in grads], dim=1).norm(dim=1)
    torch.testing.assert_close(out.norm, norm)
    for w, g, new in zip(weights, grads, out.weights, strict=True):
        torch.testing.assert_close(new[0], w[0] - 0.5 * g[0] / norm[0])
        torch.testing.assert_close(new[1], w[1] - 0.5 * g[1])
    of_one = ([t[1:] for t in weights], [t[1:] for t in grads])
    alone = clipped_sgd(*of_one, lr=0.5, max_norm=1.0, backend="triton")
    assert all(torch.equal(a[0], b[1]) for a, b in zip(alone.weights, out.weights, strict=True))


@pytest.mark.parametrize("norm", [5.0, math.nextafter(5.0, 0), math.nextafter(5.0, 9)])
def test_at_the_threshold_the_derivative_is_that_of_clipping(norm: float) -> None:
    """The threshold is compared in float64, where a float32 argument would be rounded."""
    weight, gradient = torch.zeros(1, 2), torch.tensor([[3.0, 4.0]])
    weight, gradient = weight.to(DEVICE), gradient.to(DEVICE).requires_grad_()
    cotangent = torch.tensor([[2.0, -1.0]], device=DEVICE)
    out = clipped_sgd([weight], [gradient], lr=0.1, max_norm=norm, backend="triton")
    (found,) = torch.autograd.grad(out.weights[0], gradient, cotangent)
    g = gradient.detach()
    tangential = -0.1 * (cotangent - g * (g * cotangent).sum() / 25)
    torch.testing.assert_close(found, tangential if norm <= 5 else -0.1 * cotangent)


@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_zero_gradient(max_norm: float | None) -> None:
    """No clipping, the norm's own derivative 0, and no NaN at any order."""
    given = [t.float() for t in inputs(2, (4,))]
    given[1][0] = 0
    found = orders(on("triton", max_norm), given)
    assert all(t.isfinite().all() for order in found for t in order)
    assert found[0][1][0] == 0
    assert torch.equal(found[0][0][0], given[0][0])
    torch.testing.assert_close(found[1][1][0], -given[2] * draw(2, 4, seed=0).float().to(DEVICE)[0])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("max_norm", [None, 1.0])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_bad_gradients_show(bad: float, max_norm: float | None, dtype: torch.dtype) -> None:
    weights, grads = ([t.to(dtype) for t in tuple_of(2, (3,), (2, 2), seed=s)] for s in (0, 5))
    grads[0][0, 1] = bad
    own, truth = (
        clipped_sgd(weights, grads, lr=0.5, max_norm=max_norm, backend=b) for b in ("triton", "reference")
    )
    torch.testing.assert_close(own.norm, truth.norm, equal_nan=True)
    torch.testing.assert_close(own.weights, truth.weights, equal_nan=True)


def test_norm_of_extreme_float32_gradients() -> None:
    """Squares that float32 cannot hold: too large, and too small."""
    for size in (1e30, 1e-30):
        gradient = torch.full((1, 9), size, device=DEVICE)
        zero = torch.zeros_like(gradient)
        out = clipped_sgd([zero], [gradient], lr=1.0, max_norm=size, backend="triton")
        torch.testing.assert_close(out.norm, torch.tensor([3 * size], device=DEVICE))
        torch.testing.assert_close(out.weights[0], -gradient / 3)


def test_norm_of_many_elements() -> None:
    gradient = draw(1, 1000, seed=0).float().to(DEVICE)
    norm = clipped_sgd([gradient], [gradient], lr=1.0, backend="triton").norm
    torch.testing.assert_close(norm, gradient.double().norm(dim=1).float(), rtol=1.2e-7, atol=0)


@pytest.mark.parametrize("copy_dtype", [*DTYPES, torch.float64, torch.float8_e5m2], ids=str)
def test_copies_are_casts_of_the_new_weights(copy_dtype: torch.dtype) -> None:
    for dtype in DTYPES[:2]:
        weights, grads = ([t.to(dtype) for t in tuple_of(1, (33,), seed=s)] for s in (0, 1))
        out = clipped_sgd(weights, grads, lr=0.1, copy_dtype=copy_dtype, backend="triton")
        assert out.copies[0].dtype == copy_dtype
        assert torch.equal(out.copies[0].float(), out.weights[0].to(copy_dtype).float())


def test_rates_of_any_kind() -> None:
    weights, grads = ([t.float() for t in tuple_of(1, (5,), seed=s)] for s in (0, 1))
    number = clipped_sgd(weights, grads, lr=0.1, backend="triton").weights[0]
    torch.testing.assert_close(number, weights[0] - 0.1 * grads[0])
    for dtype in (*DTYPES, torch.float64):
        rate = torch.tensor(0.125, dtype=dtype, device=DEVICE, requires_grad=True)
        new = clipped_sgd(weights, grads, lr=rate, backend="triton").weights[0]
        torch.testing.assert_close(new.detach(), weights[0] - 0.125 * grads[0])
        (found,) = torch.autograd.grad(new.sum(), rate)
        assert found.dtype == dtype
        torch.testing.assert_close(found, -grads[0].sum().to(dtype))


@pytest.mark.parametrize("shape", [(2, 0), (0, 3)])
def test_without_elements(shape: tuple[int, int]) -> None:
    leaves = [torch.zeros(shape, device=DEVICE).requires_grad_() for _ in range(2)]
    rate = torch.tensor(1.0, device=DEVICE, requires_grad=True)
    out = clipped_sgd(leaves[:1], leaves[1:], lr=rate, max_norm=1.0, backend="triton")
    assert torch.equal(out.norm, torch.zeros(shape[0], device=DEVICE))
    first = torch.autograd.grad(out.weights[0].sum() + out.norm.sum(), [*leaves, rate], create_graph=True)
    assert [g.shape for g in first] == [shape, shape, ()]
    assert first[2] == 0


@pytest.mark.parametrize("active", [None, [True, False, True], [False] * 3], ids=str)
@pytest.mark.parametrize("copy_dtype", [None, torch.bfloat16], ids=str)
def test_update_in_place(copy_dtype: torch.dtype | None, active: list[bool] | None) -> None:
    weights = [t.float() for t in tuple_of(3, (3, 4), (40,))]
    grads = [t.float().transpose(1, -1) for t in tuple_of(3, (4, 3), (40,), seed=5)]
    grads[0][1, 2, 0] = math.nan
    out = clipped_sgd(weights, grads, lr=0.3, max_norm=2.0, copy_dtype=copy_dtype, backend="triton")
    # Sequences apart in memory, as slices of a larger state are.
    wider = [torch.full((3, 2, *w.shape[1:]), 7.0, device=DEVICE) for w in weights]
    kept = [w[:, 1].copy_(t) for w, t in zip(wider, weights, strict=True)]
    copies = None if copy_dtype is None else [torch.full_like(w, 5.0, dtype=copy_dtype) for w in weights]
    mask = None if active is None else torch.tensor(active, device=DEVICE).repeat_interleave(2)[::2]
    norm = update_(kept, grads, lr=0.3, max_norm=2.0, copies=copies, active=mask, backend="triton")
    torch.testing.assert_close(norm, out.norm, rtol=0, atol=0, equal_nan=True)
    for i in range(2):
        assert (wider[i][:, 0] == 7).all()
        for b in range(3):
            moves = active is None or active[b]
            expected = out.weights[i][b] if moves else weights[i][b]
            torch.testing.assert_close(kept[i][b], expected, rtol=0, atol=0, equal_nan=True)
            if copies is not None:
                expected = out.copies[i][b] if moves else torch.full_like(copies[i][b], 5.0)
                torch.testing.assert_close(copies[i][b], expected, rtol=0, atol=0, equal_nan=True)


# -- Kernels called for themselves --------------------------------------------------------------------------


def of(seed: int) -> list[Tensor]:
    return [t.float() for t in tuple_of(1, (2, 3), (20,), seed=seed)]


def arguments(copies: bool = True) -> list:
    """Arguments of the backward."""
    d_norm = draw(1, seed=9).float().to(DEVICE)
    rate = torch.tensor(0.3, device=DEVICE)
    return [
        of(0),
        d_norm,
        of(2) if copies else [],
        of(4),
        of(6),
        rate,
        3.0,
        torch.float32 if copies else None,
    ]


def wide(value: object) -> object:
    if isinstance(value, list):
        return [wide(t) for t in value]
    return value.double() if isinstance(value, Tensor) else value


def test_results_do_not_share_memory_with_cotangents() -> None:
    given = arguments(copies=False)
    found = operator.kernels["triton"]["backward"](*given, [True, False, False])[0]
    assert all(torch.equal(f, d) for f, d in zip(found, given[0], strict=True))
    assert all(f.data_ptr() != d.data_ptr() for f, d in zip(found, given[0], strict=True))


@pytest.mark.parametrize("counts", [(1,), (2048, 2049), (0, 5), (10**6, 3, 10**7), (3 * 10**9,), (7,) * 30])
def test_chunks_hold_all_elements(counts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    steps, chunks = triton_configs.divided(counts)
    assert chunks == max(1, sum(-(-n // (2048 * steps)) for n in counts))
    assert chunks <= triton_configs.CHUNKS + len(counts)


def test_refuses() -> None:
    wide = torch.zeros(1, 4, dtype=torch.float64, device=DEVICE)
    for call in (clipped_sgd, update_):
        with pytest.raises(
            ValueError, match=r"'triton' cannot serve this call: .*dtype torch.float64; accepted"
        ):
            call([wide], [wide], lr=0.1, backend="triton")
