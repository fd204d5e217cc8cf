"""Sliding-window attention: every order on every backend against float64 and against dense attention."""

import pytest
import torch
from dense_attention import dense
from harness import BACKENDS, assert_within_budget, draw, orders, relative_error
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from ttt_kernels import backends, sliding_window_attention, sliding_window_attention_jvp
from ttt_kernels.extension import cpu as extension
from ttt_kernels.swa import operator

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
KERNELS = tuple(name for name in BACKENDS if name != "reference")
INSTRUCTION_SETS = extension.instruction_sets() if extension else []
LAYOUTS = {
    "contiguous": lambda t: t,
    "heads first": lambda t: t.transpose(1, 2).contiguous().transpose(1, 2),
    "dimensions apart": lambda t: t.transpose(1, 3).contiguous().transpose(1, 3),
    "sliced": lambda t: torch.cat([t, t], 2)[:, :, : t.shape[2]],
    # Their cotangents have such strides of 0 too.
    "one sequence": lambda t: t[:1].expand(t.shape),
    "one head": lambda t: t[:, :, :1].expand(t.shape),
}


def on(backend: str, layout: str = "contiguous", **options):
    place = LAYOUTS[layout]
    return lambda q, k, v: sliding_window_attention(place(q), place(k), place(v), **options, backend=backend)


def qkv(b: int, tq: int, tk: int, heads: int, kv_heads: int, d: int, seed: int = 0) -> list[Tensor]:
    shapes = ((b, tq, heads, d), (b, tk, kv_heads, d), (b, tk, kv_heads, d))
    return [draw(*shape, seed=seed + i) for i, shape in enumerate(shapes)]


CASES = {
    "one key": ((1, 1, 1, 1, 1, 4), {}),
    "causal": ((2, 50, 50, 4, 2, 8), {}),
    "prefix": ((1, 70, 300, 2, 2, 16), {"window": 90, "scale": 0.3}),
    "several blocks of queries": ((1, 700, 700, 2, 1, 8), {"window": 300}),
    "window of one": ((1, 9, 20, 2, 1, 4), {"window": 1}),
    "window smaller than a tile": ((1, 330, 350, 2, 1, 40), {"window": 7}),
    "window of a tile": ((1, 300, 500, 2, 1, 8), {"window": 96}),
    "window beyond the keys": ((1, 100, 130, 2, 1, 8), {"window": 1000}),
    "cache that is not full": ((3, 20, 150, 2, 1, 8), {"key_lengths": [0, 7, 150], "window": 100}),
    "packed": ((1, 400, 400, 2, 2, 8), {"cu_seqlens": [0, 1, 130, 130, 390, 400], "window": 50}),
    "packed and not full": ((1, 60, 60, 2, 2, 8), {"cu_seqlens": [0, 20, 60], "key_lengths": [50]}),
    "one query": ((1, 1, 1300, 2, 1, 40), {}),
    "few queries of a group": ((1, 2, 1100, 2, 1, 24), {"window": 1000}),
    "few tasks": ((1, 30, 1500, 1, 1, 16), {"key_lengths": [1400]}),
    "no keys in a part": ((2, 1, 1200, 1, 1, 16), {"key_lengths": [0, 3]}),
}


def case(name: str) -> tuple[list[Tensor], dict]:
    sizes, options = CASES[name]
    return qkv(*sizes), {k: torch.tensor(v) if isinstance(v, list) else v for k, v in options.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", CASES)
def test_equals_dense_attention(backend: str, name: str) -> None:
    """Forward and both gradients in float64 against the whole matrix of scores."""
    inputs, options = case(name)
    leaves = [t.requires_grad_() for t in inputs]
    cotangent = draw(*inputs[0].shape, seed=5)
    expected, found = dense(*leaves, **options), on(backend, **options)(*leaves)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    expected_grads = torch.autograd.grad(expected, leaves, cotangent)
    for e, f in zip(expected_grads, torch.autograd.grad(found, leaves, cotangent), strict=True):
        torch.testing.assert_close(f, e, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("name", ["prefix", "several blocks of queries", "cache that is not full", "packed"])
def test_second_order_equals_dense_attention(name: str) -> None:
    """The written double backward against automatic differentiation of the whole matrix of scores."""
    inputs, options = case(name)
    leaves = [t.requires_grad_() for t in inputs]
    d_o = draw(*inputs[0].shape, seed=5).requires_grad_()
    seconds = [draw(*t.shape, seed=6 + i) for i, t in enumerate(leaves)]
    results = []
    for function in (lambda *x: dense(*x, **options), on("cpu" if extension else "reference", **options)):
        first = torch.autograd.grad(function(*leaves), leaves, d_o, create_graph=True)
        results.append(torch.autograd.grad(first, [*leaves, d_o], seconds))
    for expected, found in zip(*results, strict=True):
        assert relative_error(found, expected) < 1e-11


def assert_accurate(
    function, inputs: list[Tensor], dtype: torch.dtype, highest: int, slack: float = 2.0
) -> None:
    """Within the budget of the plain formulas; float64, which is the truth there, within its rounding."""
    if dtype != torch.float64:
        return assert_within_budget(function, inputs, dtype, "cpu", slack=slack, highest=highest)
    truth, found = (orders(function(name), inputs, highest=highest) for name in ("reference", "cpu"))
    for expected, results in zip(truth, found, strict=True):
        for e, f in zip(expected, results, strict=True):
            assert relative_error(f, e) < 1e-13
    return None


@pytest.mark.skipif(not KERNELS, reason="needs the C++ kernels")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=15)
@given(data=st.data())
def test_within_budget(dtype: torch.dtype, data: st.DataObject) -> None:
    pick = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
    heads, kv_heads = pick((1, 1), (2, 1), (2, 2), (6, 2))
    b, tq, prefix, d = pick(1, 3), pick(5, 17, 60, 150), pick(0, 1, 40, 100), pick(1, 2, 8, 33, 64, 80)
    window, layout = pick(None, 2, 3, 30, 500), pick(*sorted(LAYOUTS))
    options: dict = {"window": window, "scale": pick(None, 0.4)}
    packing = pick("none", "lengths", "packed")
    if packing == "lengths":
        options["key_lengths"] = torch.tensor(
            [tq + prefix, 2, tq + prefix // 2][:b], dtype=pick(torch.int32, torch.int64)
        )
    if packing == "packed":
        assume(b == 1 and prefix == 0)
        options["cu_seqlens"] = torch.tensor([0, tq // 3, tq])
    inputs = qkv(b, tq, tq + prefix, heads, kv_heads, d, seed=tq)
    # The cotangent of a sum has strides of 0.
    whole = pick(True, False)
    function = lambda name: on(name, layout, **options)  # noqa: E731
    summed = function if whole else lambda name: lambda *x: function(name)(*x).sum(3)
    assert_accurate(summed, inputs, dtype, highest=2)


@pytest.mark.skipif(not KERNELS, reason="needs the C++ kernels")
@pytest.mark.parametrize("dtype", [t for t in DTYPES if t != torch.float64], ids=str)
@pytest.mark.parametrize(("of_keys", "of_values"), [(10, 0), (0, 10), (10, 10)])
@pytest.mark.parametrize(("tq", "tk", "window"), [(40, 40, 24), (192, 704, 512)])
def test_within_budget_where_keys_or_values_have_a_mean(
    dtype: torch.dtype, of_keys: int, of_values: int, tq: int, tk: int, window: int
) -> None:
    """Then gradients are small differences of large numbers.

    In float32, where nothing is more exact than the output itself, rowsum(dO * O) has more of its rounding than plain
    softmax, which makes that sum of the products dO V^T.
    """
    slack = 3.0 if dtype == torch.float32 else 2.0
    q, k, v = qkv(1, tq, tk, 2, 1, 32)
    own = on("cpu", window=window)
    function = lambda name: own if name == "cpu" else lambda *x: dense(*x, window=window)  # noqa: E731
    assert_within_budget(function, [q, k + of_keys, v + of_values], dtype, "cpu", slack=slack)


@pytest.mark.skipif(not KERNELS, reason="needs the C++ kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("which", [(1,), (2, 5)], ids=str)
def test_jvp_where_tensors_have_a_mean(dtype: torch.dtype, which: tuple[int, ...]) -> None:
    """Then a tangent of scores has much in common along a row, or the output's is a small difference of large numbers.

    Beside plain attention, which rounds every intermediate result; the formulas round less.
    """
    tensors = [*qkv(1, 40, 200, 2, 1, 16), *qkv(1, 40, 200, 2, 1, 16, seed=10)]
    inputs = [t + 10 * (i in which) for i, t in enumerate(tensors)]

    def plain(*given: Tensor) -> tuple[Tensor, ...]:
        return torch.func.jvp(lambda *x: dense(*x, window=150), given[:3], given[3:])

    own = lambda *x: sliding_window_attention_jvp(*x, window=150, backend="cpu")  # noqa: E731
    slack = 3.0 if dtype == torch.float32 else 2.0
    assert_within_budget(
        lambda name: own if name == "cpu" else plain, inputs, dtype, "cpu", highest=1, slack=slack
    )


@pytest.mark.skipif(not KERNELS, reason="needs the C++ kernels")
@pytest.mark.parametrize("dtype", [t for t in DTYPES if t != torch.float64], ids=str)
@pytest.mark.parametrize("huge", [slice(0, 96), slice(95, 96), slice(96, 192)])
def test_within_budget_with_keys_of_huge_scores_and_no_weight(dtype: torch.dtype, huge: slice) -> None:
    """Their S', huge too, has no part in any result."""
    q, k, v = qkv(1, 3, 192, 1, 1, 16)
    q[..., 0], k[..., 0] = 4, 0.1 * k[..., 0]
    k[:, huge, :, 0] = -300
    own = on("cpu", window=97)
    function = lambda name: own if name == "cpu" else lambda *x: dense(*x, window=97)  # noqa: E731
    assert_within_budget(function, [q, k, v], dtype, "cpu")


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set(name: str, dtype: torch.dtype) -> None:
    before = extension.instruction_set()
    extension.choose_instruction_set(name)
    try:
        for d in (1, 40, 64, 80, 96, 128):
            inputs = qkv(1, 110, 210, 2, 1, d)
            # Where a score is one product, plain softmax has hardly an error of its own, and that of the saved
            # log-sum-exp, which it does not have, shows.
            slack = 4.0 if d == 1 else 2.0
            assert_accurate(lambda b: on(b, window=130), inputs, dtype, highest=2, slack=slack)
        assert_accurate(on, qkv(1, 3, 200, 1, 1, 40), dtype, highest=1)
    finally:
        extension.choose_instruction_set(before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_derivatives_in_float64(backend: str) -> None:
    inputs = [t.requires_grad_() for t in qkv(2, 3, 4, 2, 1, 2)]
    options = {"window": 3, "key_lengths": torch.tensor([4, 2])}
    assert gradcheck(on(backend, **options), inputs)
    assert gradgradcheck(on(backend, **options), inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=10)
@given(data=st.data())
def test_a_window_of_one_copies_the_values(backend: str, data: st.DataObject) -> None:
    """No budget says anything here: derivatives of queries and keys are zero."""
    pick = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
    b, tq, prefix, kv_heads, group, d = (
        pick(1, 2),
        pick(1, 5, 130),
        pick(0, 70),
        pick(1, 2),
        pick(1, 2),
        pick(1, 8),
    )
    q, k, v = (t.float().requires_grad_() for t in qkv(b, tq, tq + prefix, kv_heads * group, kv_heads, d))
    o = sliding_window_attention(q, k, v, window=1, backend=backend)
    torch.testing.assert_close(o, v[:, prefix:].repeat_interleave(group, 2))
    d_o = torch.ones_like(o, requires_grad=True)
    dq, dk, dv = torch.autograd.grad(o, (q, k, v), d_o, create_graph=True)
    torch.testing.assert_close(dv[:, prefix:], torch.full_like(dv[:, prefix:], group))
    assert dv[:, :prefix].abs().sum() == 0
    assert max(float(t.detach().abs().max()) for t in (dq, dk)) < 1e-5
    cotangents = [draw(*t.shape, seed=3 + i).float() for i, t in enumerate((q, k, v))]
    *bars, d_o_bar = torch.autograd.grad((dq, dk, dv), (q, k, v, d_o), cotangents)
    expected = cotangents[2][:, prefix:].repeat_interleave(group, 2)
    torch.testing.assert_close(d_o_bar, expected, rtol=1e-5, atol=1e-5)
    assert max(float(t.abs().max()) for t in bars) < 1e-4


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("tq", "heads"), [(130, 2), (3, 1)])
def test_queries_without_keys_and_what_lies_there(backend: str, tq: int, heads: int) -> None:
    """Invalid keys may hold anything; a query that sees no other has an output and gradients of zero."""
    q, k, v = (t.float() for t in qkv(2, tq, 150, heads, 1, 8))
    lengths = torch.tensor([tq - 1, 0])
    for t in (k, v):
        t[0, : 150 - tq + 1] = float("nan")
        t[1] = float("inf")
    leaves = [t.requires_grad_() for t in (q, k, v)]
    o = sliding_window_attention(*leaves, key_lengths=lengths, backend=backend)
    d_o = draw(*o.shape, seed=3).float().requires_grad_()
    first = torch.autograd.grad(o, leaves, d_o, create_graph=True)
    second = torch.autograd.grad(first, [*leaves, d_o], [torch.ones_like(t) for t in first])
    assert o[0, 0].abs().max() == 0
    assert o[1].abs().max() == 0
    assert o[0, 1:].abs().min() > 0
    for t in (*first, *second):
        assert t.isfinite().all()
        assert t[1].abs().max() == 0
        assert t[0].abs().max() > 0
    for t in (first[0], second[0], second[3]):
        assert t[0, 0].abs().max() == 0
    for t in (*first[1:], *second[1:3]):
        assert t[0, : 150 - tq + 1].abs().max() == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_do_not_overflow(backend: str) -> None:
    q, k, v = (t.float().requires_grad_() for t in qkv(1, 120, 120, 1, 1, 8))
    found = sliding_window_attention(q, k, v, scale=1000.0, backend=backend)
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]
    expected = sliding_window_attention(*wide, scale=1000.0, backend="reference")
    assert relative_error(found.detach(), expected.detach()) < 1e-4
    expected_dv = torch.autograd.grad(expected.sum(), wide[2])[0]
    # The log-sum-exp is of the order of 10^4, with an absolute error of 10^-3.
    assert relative_error(torch.autograd.grad(found.sum(), v)[0], expected_dv) < 3e-3


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("queries", [130, 3])
def test_weights_are_at_most_one_however_large_the_scores(backend: str, queries: int) -> None:
    """The float32 score of a query's only key differs from its lse by their rounding, which grows with them.

    Few queries have products of their own in the forward.
    """
    q, k, v = (t.float() for t in qkv(1, queries, 130, 2, 2, 8))
    leaves = [t.requires_grad_() for t in (1e9 * q, k, v)]
    d_o = torch.ones_like(q).requires_grad_()
    o = sliding_window_attention(*leaves, window=1, backend=backend)
    first = torch.autograd.grad(o, leaves, d_o, create_graph=True)
    assert first[2].detach().abs().max() <= 1
    second = torch.autograd.grad(first, d_o, [torch.zeros_like(t) for t in leaves[:2]] + [torch.ones_like(v)])
    assert second[0].abs().max() <= 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_cotangents_and_inputs(backend: str) -> None:
    leaves = [t.requires_grad_() for t in qkv(1, 7, 9, 2, 1, 6)]
    many = [t.expand(3, *t.shape[1:]) for t in leaves]
    found = torch.autograd.grad(sliding_window_attention(*many, backend=backend).sum(), leaves)
    expected = torch.autograd.grad(3 * dense(*leaves).sum(), leaves)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [(0, 3, 5, 2, 1, 4), (2, 0, 5, 2, 1, 4)])
def test_empty(backend: str, sizes: tuple[int, ...]) -> None:
    leaves = [t.requires_grad_() for t in qkv(*sizes)]
    o = sliding_window_attention(*leaves, backend=backend)
    assert o.shape == leaves[0].shape
    assert all(g.sum() == 0 for g in torch.autograd.grad(o.sum(), leaves))


@pytest.mark.skipif(extension is None, reason="needs the C++ kernels")
@pytest.mark.parametrize("sizes", [(1, 900, 1000, 2, 1, 16), (1, 1, 3000, 2, 1, 16), (1, 20, 3000, 1, 1, 16)])
def test_same_bits_for_any_number_of_threads(sizes: tuple[int, ...]) -> None:
    inputs = [t.float().requires_grad_() for t in qkv(*sizes)]
    threads, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 7):
            torch.set_num_threads(n)
            o = sliding_window_attention(*inputs, window=1500, backend="cpu")
            first = torch.autograd.grad(o.square().sum(), inputs, create_graph=True)
            second = torch.autograd.grad([g.square().sum() for g in first], inputs)
            results.append([o, *first, *second])
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.skipif(extension is None, reason="needs the C++ kernels")
def test_a_sequence_does_not_depend_on_its_neighbours() -> None:
    q, k, v = (t.float() for t in qkv(3, 100, 200, 2, 1, 16))
    whole = sliding_window_attention(q, k, v, window=70, backend="cpu")
    others = [torch.where(torch.arange(3)[:, None, None, None] == 1, t, 7 * t) for t in (q, k, v)]
    assert torch.equal(sliding_window_attention(*others, window=70, backend="cpu")[1], whole[1])


def backward_arguments(key_start: int, dtype: torch.dtype = torch.float64) -> list:
    q, k, v = (t.to(dtype) for t in qkv(2, 130, 400, 4, 2, 8))
    lengths = torch.tensor([400, 250])
    kept = operator.forward(q, k, v, lengths, None, 150, 0.4, 0, True, backend="reference")
    return [draw(*q.shape, seed=9).to(dtype), q, k, v, lengths, None, *kept, 150, 0.4, key_start, True]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
def test_backward_in_every_dtype(backend: str, dtype: torch.dtype) -> None:
    """The written backward, whose reference automatic differentiation never reaches."""
    arguments = backward_arguments(0, dtype)
    wide = [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in arguments[:6]]
    wide += [*operator.forward(*wide[1:], 150, 0.4, 0, True, backend="reference"), *arguments[9:]]
    expected = operator.backward(*wide, needs=[True] * 3, backend="reference")
    for f, e in zip(operator.backward(*arguments, needs=[True] * 3, backend=backend), expected, strict=True):
        assert f.dtype == dtype
        assert relative_error(f, e) < 8 * torch.finfo(dtype).eps


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("key_start", [0, 1, 100, 270, 399])
def test_gradients_of_the_last_keys_only(backend: str, key_start: int) -> None:
    everything = backward_arguments(0)
    dq, dk, dv = operator.backward(*everything, needs=[True] * 3, backend="reference")
    part = backward_arguments(key_start)
    found = operator.backward(*part, needs=[True] * 3, backend=backend)
    for f, e in zip(found, (dq, dk[:, key_start:], dv[:, key_start:]), strict=True):
        torch.testing.assert_close(f, e, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("needs", [(1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 1, 1), (1, 0, 1)])
def test_only_what_is_needed(backend: str, needs: tuple[int, ...]) -> None:
    arguments = backward_arguments(200, torch.float32)
    everything = operator.backward(*arguments, needs=[True] * 3, backend=backend)
    found = operator.backward(*arguments, needs=[bool(n) for n in needs], backend=backend)
    for need, f, e in zip(needs, found, everything, strict=True):
        assert (f is None) if not need else torch.equal(f, e)


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_from_a_key_on_differentiates(backend: str) -> None:
    """The engine's inner step is such a call: its derivatives pad the short cotangents of dk and dv."""
    results = []
    for name, key_start in ((backend, 270), ("reference", 0)):
        q, k, v = (t.requires_grad_() for t in qkv(1, 130, 400, 4, 2, 8))
        d_o = draw(*q.shape, seed=9).requires_grad_()
        kept = operator.forward(q, k, v, None, None, 150, 0.4, 0, True, backend=name)
        arguments = (d_o, q, k, v, None, None, *kept, 150, 0.4, key_start, True)
        grads = operator.backward(*arguments, needs=[True] * 3, backend=name)
        grads = [grads[0], *(g[:, 270 - key_start :] for g in grads[1:])]
        seconds = [draw(*g.shape, seed=20 + i) for i, g in enumerate(grads)]
        results.append(torch.autograd.grad(grads, [q, k, v, d_o], seconds))
    for f, e in zip(*results, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-9, atol=1e-10)


def test_orders_that_the_kernels_serve() -> None:
    if extension is None:
        pytest.skip("needs the C++ kernels")
    assert backends()["cpu"]["operators"]["swa"] == ("forward", "backward", "double_backward")
