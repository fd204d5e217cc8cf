"""Queries, keys and values of an attention branch in one Triton kernel, and back: against the formulas in float64."""

from typing import Any

import pytest
import torch
from small_model import model
from torch import Tensor
from triton_here import DEVICE, needs_triton

from engine.blocks import attention_forward
from engine.caches import FixedRows
from engine.ops import Ops
from engine.weights import for_inference
from engine.window import Window
from ttt_kernels.rms_norm import reference as norm
from ttt_kernels.rope import heads
from ttt_kernels.rope import reference as rope

pytestmark = needs_triton
EPS, THETA = 0.01, 1e4
# Interpreted programs have 4 positions of 2 heads.
SHAPES = [(2, 5, 3, 6), (1, 9, 2, 80), (1, 1, 1, 2)]


def given(dtype: torch.dtype, *shape: int) -> list[Tensor]:
    """q, k and v as views of one product, positions far out, and both weights."""
    generator = torch.Generator().manual_seed(sum(shape))
    product = torch.randn(*shape[:2], 3, *shape[2:], generator=generator).to(DEVICE, dtype)
    weights = (torch.rand(2, shape[3], generator=generator) + 0.5).to(DEVICE)
    return [*product.unbind(2), torch.arange(3_000_000, 3_000_000 + shape[1], device=DEVICE), *weights]


def formulas(
    dtype: torch.dtype, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, *weights: Tensor
) -> list[Tensor]:
    """q, k and both reciprocal root mean squares, in a dtype."""
    normed = [norm.forward(t.to(dtype), w.to(dtype), None, EPS) for t, w in zip((q, k), weights, strict=True)]
    turned = [rope.forward(y, positions, THETA, True)[0] for y, _ in normed]
    return turned + [rstd for _, rstd in normed]


def assert_as_exact(found: Tensor, plain: Tensor, exact: Tensor) -> None:
    """No worse than the formulas at the same dtype, but for what rounding the result alone may be."""
    rounding = torch.finfo(found.dtype).eps * exact.abs().max()
    assert (found.double() - exact).abs().max() <= (plain.double() - exact).abs().max() + rounding


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    q, k, v, *rest = given(dtype, *shape)
    found = heads.forward(q, k, v, *rest, EPS, THETA)
    plain, exact = (formulas(t, q, k, v, *rest) for t in (dtype, torch.float64))
    for mine, theirs, truth in zip((*found[:2], *found[3:]), plain, exact, strict=True):
        assert_as_exact(mine, theirs, truth)
    assert found[2] is v


@pytest.mark.parametrize("shape", SHAPES)
def test_into_a_cache(shape: tuple[int, ...]) -> None:
    """Nothing but the new rows is written, with the same bits as elsewhere."""
    q, k, v, *rest = given(torch.bfloat16, *shape)
    memory = torch.full((2, shape[0], shape[1] + 3, *shape[2:]), 7.0, dtype=torch.bfloat16, device=DEVICE)
    into = memory[0, :, 2:-1], memory[1, :, 2:-1]
    found = heads.forward(q, k, v, *rest, EPS, THETA, into)
    for mine, elsewhere in zip(found, heads.forward(q, k, v, *rest, EPS, THETA), strict=True):
        assert torch.equal(mine, elsewhere)
    assert torch.equal(into[0], found[1])
    assert torch.equal(into[1], v)
    assert (memory[:, :, [0, 1, -1]] == 7).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_backward(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    q, k, v, positions, *weights = given(dtype, *shape)
    # Cotangents of keys lie as a transposed tensor's, those of values as an expanded one's.
    d_q, d_k = (torch.roll(t, 1, 1) for t in (k, q))
    d_k, d_v = d_k.transpose(2, 3).contiguous().transpose(2, 3), v[:, :1].expand(v.shape)
    exact_rstd = formulas(torch.float64, q, k, v, positions, *weights)[2:]
    rstd = [r.float() for r in exact_rstd]
    found = heads.backward(d_q, d_k, d_v, q, k, positions, *weights, *rstd, THETA)

    def back(dtype: torch.dtype, kept: list[Tensor]) -> list[Tensor]:
        gradients = []
        for d, x, w, r in zip((d_q, d_k), (q, k), weights, kept, strict=True):
            turned = rope.backward(d.to(dtype), x.to(dtype), positions, THETA, True, (True,))[0]
            arguments = (turned, x.to(dtype), w.to(dtype), None, r, EPS, (True, False, False))
            gradients.append(norm.backward(*arguments)[0])
        return gradients

    for mine, theirs, truth in zip(
        found.unbind(2), back(dtype, rstd), back(torch.float64, exact_rstd), strict=False
    ):
        assert_as_exact(mine, theirs, truth)
    assert torch.equal(found[:, :, 2], d_v)


def test_fixed_rows_take_what_is_there_and_copy_what_is_not() -> None:
    window = Window(1, 2, 4, 6, 6, torch.empty(0, device=DEVICE))
    window.k.zero_()
    window.v.zero_()
    cache = FixedRows(window.k, window.v, 2)
    k, v = cache.rows(3)
    k.fill_(1)
    keys, values = cache.extend(k, torch.full_like(v, 2))
    assert keys[:, 2:].eq(1).all()
    assert values[:, 2:].eq(2).all()
    assert not keys[:, :2].any()
    assert keys.shape[1] == values.shape[1] == 5


def test_where_a_graph_is_built_operators_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    m = model().to(DEVICE)
    ops = Ops(m, "triton")
    q, k, v, positions, *weights = given(torch.float32, 1, 2, 2, m.config.head_dim)
    arguments = (q, k, v, *weights, positions)
    with torch.no_grad():
        fused = ops.heads(*arguments)
    monkeypatch.setattr(heads, "forward", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ops.heads(*arguments)
    recorded = ops.heads(q.requires_grad_(), *arguments[1:])
    assert recorded[0].requires_grad
    for mine, theirs in zip(fused, recorded, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)


def test_keys_and_values_are_left_where_a_static_cache_wants_them(monkeypatch: pytest.MonkeyPatch) -> None:
    m = model().to(DEVICE)
    ops, w, positions = Ops(m, "triton"), for_inference(m).prefix[0], torch.arange(3, device=DEVICE)
    x = torch.randn(2, 3, m.config.hidden_size, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    static, other = (Window(2, m.config.num_heads, m.config.head_dim, 6, 6, x[:0]) for _ in range(2))
    forward, given = heads.forward, []

    def logged(*arguments: Any) -> Any:
        given.append(arguments[-1])
        return forward(*arguments)

    monkeypatch.setattr(heads, "forward", logged)
    with torch.no_grad():
        found, _ = attention_forward(
            ops, w, x, positions, FixedRows(static.k, static.v, 0), 4, for_backward=False
        )
        expected, _ = attention_forward(ops, w, x, positions, other, 4, for_backward=False)
    assert [t.data_ptr() for t in given[0]] == [static.k.data_ptr(), static.v.data_ptr()]
    assert given[1] is None
    assert torch.equal(found, expected)
