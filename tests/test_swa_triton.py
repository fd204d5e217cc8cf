"""Attention's Triton kernels, every order against float64: interpreted, or on a GPU where there is one."""

import sys

import pytest
import torch
from dense_attention import dense
from harness import assert_within_budget, draw, relative_error
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from small_model import model
from torch import Tensor
from triton_here import DEVICE, needs_triton

from engine.ops import Ops
from ttt_kernels import sliding_window_attention
from ttt_kernels.swa import operator, triton_configs

pytestmark = needs_triton
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = {
    "contiguous": lambda t: t,
    "heads first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "dimensions apart": lambda t: t.transpose(1, 3).contiguous().transpose(1, 3),
    "sliced": lambda t: torch.cat([t, t], 2)[:, :, : t.shape[2]],
}


def on(backend: str, layout: str = "contiguous", **options):
    place = LAYOUTS[layout]
    return lambda q, k, v: sliding_window_attention(place(q), place(k), place(v), **options, backend=backend)


def qkv(b: int, tq: int, tk: int, heads: int, kv_heads: int, d: int) -> list[Tensor]:
    shapes = ((b, tq, heads, d), (b, tk, kv_heads, d), (b, tk, kv_heads, d))
    return [draw(*shape, seed=i).to(DEVICE) for i, shape in enumerate(shapes)]


def numbers(*values: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


# Tiles are 16 queries by 32 keys when interpreted, so that these have tiles at both edges and between them.
CASES = {
    "one key": ((1, 1, 1, 1, 1, 5), {}),
    "causal": ((1, 70, 70, 1, 1, 16), {}),
    "group": ((1, 33, 33, 3, 1, 8), {"window": 20}),
    "groups": ((2, 18, 18, 4, 2, 5), {"scale": 0.4}),
    "prefix": ((1, 40, 110, 1, 1, 16), {"window": 70}),
    "small and everything": (
        (1, 19, 35, 2, 1, 20),
        {"window": 22, "key_lengths": (33,)},
    ),
    "packed in short": ((1, 34, 34, 1, 1, 8), {"cu_seqlens": (0, 3, 3, 20, 33, 34), "window": 12}),
    "window smaller than a tile": ((1, 36, 36, 1, 1, 5), {"window": 9}),
    "window that reaches the last key of a tile": ((1, 49, 49, 1, 1, 8), {"window": 18}),
    "window of a tile": ((1, 66, 66, 1, 1, 8), {"window": 32}),
    "window beyond the keys": ((1, 20, 40, 1, 1, 8), {"window": 1000}),
    "two pieces": ((1, 20, 20, 1, 1, 40), {"window": 15}),
    "80 = 64 + 16": ((1, 17, 20, 1, 1, 80), {}),
    "cache that is not full": ((3, 20, 75, 1, 1, 8), {"key_lengths": (0, 7, 75), "window": 60}),
    "packed": ((1, 70, 70, 2, 1, 8), {"cu_seqlens": (0, 1, 22, 22, 60, 70), "window": 25}),
    "packed and not full": ((1, 50, 50, 1, 1, 8), {"cu_seqlens": (0, 20, 50), "key_lengths": (43,)}),
    # Larger scores would show that NumPy adds up the products of K Q^T and of Q K^T in different orders.
    "negative scale": ((1, 20, 20, 1, 1, 8), {"scale": -0.4}),
    "scale of zero": ((1, 20, 20, 1, 1, 8), {"scale": 0.0, "window": 9}),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name != "one key" else ()) for name in CASES]
)
def test_within_budget_in_float32(name: str) -> None:
    sizes, given_options = CASES[name]
    options = {k: numbers(*v) if isinstance(v, tuple) else v for k, v in given_options.items()}
    assert_within_budget(lambda b: on(b, **options), qkv(*sizes), torch.float32, "triton")


@pytest.mark.slow
def test_a_window_of_one_copies_the_values() -> None:
    q, k, v = (t.float().requires_grad_() for t in qkv(1, 35, 40, 2, 1, 8))
    o = sliding_window_attention(q, k, v, window=1, backend="triton")
    torch.testing.assert_close(o, v[:, -35:].expand_as(o))
    dq, dk, dv = torch.autograd.grad(o.sum(), (q, k, v))
    torch.testing.assert_close(dv[:, -35:], torch.full_like(dv[:, -35:], 2.0))
    assert dv[:, :-35].abs().max() == 0
    assert max(float(dq.abs().max()), float(dk.abs().max())) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_within_budget_in_16_bits(dtype: torch.dtype) -> None:
    options = {"window": 20, "key_lengths": numbers(36, dtype=torch.int32)}
    inputs = qkv(1, 18, 40, 1, 1, 24)
    assert_within_budget(lambda b: on(b, "heads first", **options), inputs, dtype, "triton")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("of_keys", "of_values"), [(10, 0), (0, 10)])
def test_within_budget_where_keys_or_values_have_a_mean(
    dtype: torch.dtype, of_keys: int, of_values: int
) -> None:
    """Then gradients are small differences of large numbers.

    In float32, where nothing is more exact than the output itself, rowsum(dO * O) has more of its rounding than plain
    softmax, which makes that sum of the products dO V^T.
    """
    slack = 3.0 if dtype == torch.float32 else 2.0
    q, k, v = qkv(1, 20, 150, 1, 1, 16)
    plain = lambda *x: dense(*x, window=130)  # noqa: E731
    function = lambda name: plain if name == "reference" else on(name, window=130)  # noqa: E731
    assert_within_budget(function, [q, k + of_keys, v + of_values], dtype, "triton", slack=slack)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_within_budget_with_keys_of_huge_scores_and_no_weight(dtype: torch.dtype) -> None:
    """Their S', huge too, has no part in any result."""
    q, k, v = qkv(1, 2, 70, 1, 1, 16)
    q[..., 0], k[..., 0] = 4, 0.1 * k[..., 0]
    k[:, :35, :, 0] = -300
    function = lambda name: dense if name == "reference" else on(name)  # noqa: E731
    assert_within_budget(function, [q, k, v], dtype, "triton")


@pytest.mark.slow
# To find a smaller failing example takes minutes.
@settings(max_examples=3, phases=[Phase.explicit, Phase.generate])
@given(data=st.data())
def test_within_budget_of_anything(data: st.DataObject) -> None:
    pick = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
    dtype = pick(*DTYPES)
    heads, kv_heads = pick((1, 1), (2, 1))
    b, tq, prefix, d = pick(1, 2), pick(1, 17, 33), pick(0, 1, 40), pick(2, 5, 16, 40)
    # All gradients but those of the values are zero where no query sees two keys.
    assume(tq + prefix // 2 > 1)
    options: dict = {"window": pick(None, 2, 31, 50, 500), "scale": pick(None, 0.4)}
    packing = pick("none", "lengths", "packed")
    if packing == "lengths":
        options["key_lengths"] = numbers(*[tq + prefix // 2, min(2, tq + prefix)][:b])
    if packing == "packed":
        assume(b == 1 and prefix == 0)
        options["cu_seqlens"] = numbers(0, tq // 3, tq, dtype=torch.int32)
    layout = pick(*sorted(LAYOUTS))
    inputs = qkv(b, tq, tq + prefix, heads, kv_heads, d)
    plain = lambda *x: dense(*x, **options)  # noqa: E731
    function = lambda name: plain if name == "reference" else on(name, layout, **options)  # noqa: E731
    assert_within_budget(function, inputs, dtype, "triton")


# -- Kernels called for themselves --------------------------------------------------------------------------


def arguments(key_start: int = 0, dtype: torch.dtype = torch.float32, lengths=(39,)) -> list:
    """Arguments of the backward; the window and the length cut within tiles."""
    q, k, v = (t.to(dtype) for t in qkv(1, 19, 50, 2, 1, 8))
    given = (q, k, v, None if lengths is None else numbers(*lengths), None)
    kept = operator.forward(*given, 25, 0.4, 0, True, backend="reference")
    d_o = draw(*q.shape, seed=9).to(DEVICE, dtype)
    return [d_o, *given, *kept, 25, 0.4, key_start, True]


def cotangents(key_start: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    _, q, k, v, *_ = arguments()
    shapes = (q.shape, k[:, key_start:].shape, v[:, key_start:].shape)
    return [draw(*shape, seed=20 + i).to(DEVICE, dtype) for i, shape in enumerate(shapes)]


def both(order: str, given: list, needs: list[bool]) -> list[tuple[Tensor | None, Tensor | None]]:
    """Results of an order by the Triton kernels and by the formulas in float64."""
    wide = [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in given]
    own = operator.kernels["triton"][order](*given, needs)
    return list(zip(own, operator.kernels["reference"][order](*wide, needs), strict=True))


def assert_close(order: str, given: list, needs: list[bool], limit: float = 2e-6) -> None:
    for own, truth in both(order, given, needs):
        if truth is None:
            assert own is None
            continue
        assert own.shape == truth.shape
        assert own.is_contiguous()
        assert truth.norm() > 0
        assert relative_error(own, truth) < limit


@pytest.mark.slow
@pytest.mark.parametrize("key_start", [0, 1, 30, 49])
def test_gradients_of_the_last_keys_only(key_start: int) -> None:
    assert_close("backward", arguments(key_start), [True] * 3)
    assert_close("double_backward", [*cotangents(key_start), *arguments(key_start)], [True] * 4)


@pytest.mark.slow
@pytest.mark.parametrize("missing", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_missing_cotangents(missing: tuple[int, ...]) -> None:
    given = [None if i in missing else g for i, g in enumerate(cotangents(0))]
    needs = [True] * 4
    if missing == (0, 1):
        # Without cotangents of dQ and dK there is no S', and V_bar is zero.
        needs[3] = False
        own = operator.kernels["triton"]["double_backward"](*given, *arguments(), [True] * 4)
        assert own[3].abs().max() == 0
    assert_close("double_backward", [*given, *arguments()], needs)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_heads_too_wide_for_one_launch(dtype: torch.dtype) -> None:
    """Gradients of keys and values are summed one after the other, and by parts; 144 = 64 + 64 + 16."""
    assert_within_budget(on, qkv(1, 9, 9, 1, 1, 144), dtype, "triton")


@pytest.mark.slow
@pytest.mark.parametrize(("queries", "keys"), [(32, 16), (16, 16)])
def test_tiles_of_other_sizes(monkeypatch: pytest.MonkeyPatch, queries: int, keys: int) -> None:
    config = (triton_configs.config(queries, keys, 4, 1),)
    monkeypatch.setattr("ttt_kernels.swa.triton_launch.configs", lambda *_: config)
    assert_close("backward", arguments(3), [True] * 3)
    assert_close("double_backward", [*cotangents(3), *arguments(3)], [True] * 4)
    o = operator.forward(*arguments()[1:6], 25, 0.4, 0, False, backend="triton")[0]
    assert relative_error(o, arguments()[6].double()) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_queries_without_keys_and_what_lies_there(dtype: torch.dtype) -> None:
    """Invalid keys may hold anything; a query that sees no other has an output and gradients of zero."""
    q, k, v = (t.to(dtype) for t in qkv(2, 20, 40, 1, 1, 8))
    lengths = numbers(19, 0)
    for t in (k, v):
        t[0, :21] = float("nan")
        t[1] = float("inf")
    leaves = [t.requires_grad_() for t in (q, k, v)]
    o = sliding_window_attention(*leaves, key_lengths=lengths, backend="triton")
    d_o = draw(*o.shape, seed=3).to(DEVICE, dtype).requires_grad_()
    first = torch.autograd.grad(o, leaves, d_o, create_graph=True)
    seconds = [draw(*t.shape, seed=6 + i).to(DEVICE, dtype) for i, t in enumerate(leaves)]
    for t in seconds[1:]:
        t[0, :21] = float("nan")
    second = torch.autograd.grad(first, [*leaves, d_o], seconds)
    for t in (o, *first, *second):
        assert t.isfinite().all()
        assert t[1].abs().max() == 0
        assert t[0].abs().max() > 0
    for t in (o, first[0], second[0], second[3]):
        assert t[0, 0].abs().max() == 0
    for t in (*first[1:], *second[1:3]):
        assert t[0, :21].abs().max() == 0
    lse = operator.kernels["triton"]["forward"](q, k, v, lengths, None, None, 0.3)[1]
    assert torch.equal(lse.detach() == float("-inf"), (torch.arange(20) < 1).expand(2, 1, 20).to(DEVICE) | (
        torch.arange(2)[:, None, None] == 1).to(DEVICE))  # fmt: skip


def test_lengths_that_lie_apart() -> None:
    q, k, v = (t.float() for t in qkv(2, 3, 5, 1, 1, 4))
    lengths = numbers(3, 0, 5, 0)[::2]
    found, expected = (
        sliding_window_attention(q, k, v, key_lengths=lengths, backend=b) for b in ("triton", "reference")
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.slow
def test_weights_are_at_most_one_however_large_the_scores() -> None:
    """The float32 score of a query's only key differs from its lse by their rounding, which grows with them."""
    q, k, v = (t.float() for t in qkv(1, 35, 35, 1, 1, 8))
    leaves = [t.requires_grad_() for t in (1e9 * q, k, v)]
    d_o = torch.ones_like(v).requires_grad_()
    first = torch.autograd.grad(
        sliding_window_attention(*leaves, window=1, backend="triton"), leaves, d_o, create_graph=True
    )
    assert first[2].detach().abs().max() <= 1
    second = torch.autograd.grad(first, d_o, [torch.zeros_like(t) for t in leaves[:2]] + [torch.ones_like(v)])
    assert second[0].abs().max() <= 1


def test_large_scores_do_not_overflow() -> None:
    q, k, v = (t.float() for t in qkv(1, 40, 40, 1, 1, 8))
    found = sliding_window_attention(q, k, v, scale=1000.0, backend="triton")
    wide = [t.double() for t in (q, k, v)]
    assert relative_error(found, sliding_window_attention(*wide, scale=1000.0, backend="reference")) < 1e-4


@pytest.mark.parametrize("sizes", [(0, 3, 5, 2, 1, 4), (2, 0, 5, 2, 1, 4)])
def test_empty(sizes: tuple[int, ...]) -> None:
    leaves = [t.float().requires_grad_() for t in qkv(*sizes)]
    o = sliding_window_attention(*leaves, backend="triton")
    assert o.shape == leaves[0].shape
    assert all(g.sum() == 0 for g in torch.autograd.grad(o.sum(), leaves))


# -- The registered operators and the choice of the backend -------------------------------------------------


@pytest.mark.parametrize(
    ("head_dim", "dtype", "message"),
    [
        (257, torch.float32, r"head_dim is 257; accepted are up to 256; what can: .*'reference'"),
        (8, torch.float64, r"dtype torch.float64; accepted are .*; what can: .*'reference'"),
    ],
)
def test_refuses(head_dim: int, dtype: torch.dtype, message: str) -> None:
    q = torch.zeros(1, 2, 1, head_dim, dtype=dtype, device=DEVICE)
    with pytest.raises(ValueError, match=message):
        sliding_window_attention(q, q, q, backend="triton")


def test_tensors_of_the_processor_are_interpreted_only_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    q = torch.zeros(1, 2, 1, 4)
    assert operator.select(None, q, q, q) != "triton"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert operator.select("triton", q, q, q) == "triton"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match=r"backend 'triton' cannot serve this call: .*GPU.*what can: "):
        operator.select("triton", q, q, q)


def test_the_engine_uses_it_wherever_tensors_are_not_the_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["ttt_kernels.backends"], "_on_cpu", lambda tensors: False)
    ops = Ops(model().to(DEVICE), None)
    monkeypatch.undo()
    calls = []
    own = operator.kernels["triton"]["forward"]
    monkeypatch.setitem(operator.kernels["triton"], "forward", lambda *given: calls.append(1) or own(*given))
    q, k, v = (t.float() for t in qkv(1, 3, 5, 1, 1, 16))
    o, _ = ops.attention(q, k, v, 2, for_backward=False)
    assert calls == [1]
    truth = sliding_window_attention(q, k, v, window=2, backend="reference")
    assert relative_error(o, truth.double()) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pieces_of_the_head_dimension(dtype: torch.dtype) -> None:
    """Powers of two from 16 on, padded to no more than the next multiple of 16."""
    for head_dim in range(1, 257):
        found = triton_configs.pieces("forward", head_dim, dtype)
        assert sum(found) == -(-head_dim // 16) * 16
        assert all(size >= 16 and size & (size - 1) == 0 for size in found)
