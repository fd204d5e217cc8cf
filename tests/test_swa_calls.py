"""Sliding-window attention under transforms and compilation, its forward-mode twin, and what it refuses."""

import re
from collections.abc import Callable

import pytest
import torch
from harness import BACKENDS, assert_within_budget, draw, relative_error
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck

from ttt_kernels import sliding_window_attention, sliding_window_attention_jvp
from ttt_kernels.matmul import has_native
from ttt_kernels.swa import operator

KERNELS = tuple(name for name in BACKENDS if name != "reference")


def qkv(seed: int = 0) -> list[Tensor]:
    shapes = ((2, 5, 4, 3), (2, 7, 2, 3), (2, 7, 2, 3))
    return [draw(*shape, seed=seed + i) for i, shape in enumerate(shapes)]


LENGTHS = torch.tensor([7, 4])
OPTIONS = {"window": 4, "scale": 0.7, "key_lengths": LENGTHS}


@pytest.mark.slow
@pytest.mark.parametrize("backend", KERNELS)
def test_opcheck_of_the_last_keys(backend: str) -> None:
    q, k, v = (t.requires_grad_() for t in qkv())
    first = 3
    given, params = (q, k, v, LENGTHS.int(), None), (4, 0.7, first, True)
    kept = (t.detach() for t in operator.forward(*given, *params, backend="reference"))
    backward = (draw(*q.shape, seed=3).requires_grad_(), *given, *kept, *params)
    opcheck(torch.ops.ttt_kernels.swa_backward.default, (*backward, [True] * 3, backend))
    g_q, g_k, g_v = (draw(*t.shape, seed=4 + i) for i, t in enumerate((q, k, v)))
    detached = (a.detach() if isinstance(a, Tensor) else a for a in backward)
    arguments = (g_q, g_k[:, first:], g_v[:, first:], *detached, [True] * 4, backend)
    opcheck(torch.ops.ttt_kernels.swa_double_backward.default, arguments)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("keep_rest", [False, True])
def test_opcheck_in_16_bits(backend: str, keep_rest: bool) -> None:
    inputs, params = [t.bfloat16() for t in qkv()], (4, 0.7, 0, keep_rest)
    given = (*inputs, LENGTHS, None)
    opcheck(torch.ops.ttt_kernels.swa.default, (*given, *params, backend))
    o, lse, o_rest = operator.forward(*given, *params, backend=backend)
    assert o_rest.shape == (o.shape if keep_rest else (0,))
    backward = (draw(*o.shape, seed=3).bfloat16(), *given, o, lse, o_rest, *params)
    opcheck(torch.ops.ttt_kernels.swa_backward.default, (*backward, [True] * 3, backend))
    opcheck(torch.ops.ttt_kernels.swa_double_backward.default, (*inputs, *backward, [True] * 4, backend))
    opcheck(torch.ops.ttt_kernels.swa_jvp.default, (*inputs, LENGTHS, None, *inputs, 4, 0.7, 0, backend))
    wide = operator.forward(*(t.double() for t in inputs), *given[3:], *params, backend="reference")[0]
    if backend == "reference" and has_native(torch.bfloat16):
        # Their products have 16 bits, and nothing is lost after that.
        assert not o_rest.any()
    elif keep_rest:
        # The formulas round P for its product with V.
        share = 0.8 if backend == "reference" else 0.01
        assert relative_error(o.double() + o_rest, wide) < share * relative_error(o, wide)


@pytest.mark.parametrize(
    ("backend", "compiler"),
    [(b, "aot_eager") for b in BACKENDS]
    + [pytest.param(b, "inductor", marks=pytest.mark.slow) for b in KERNELS],
)
@pytest.mark.parametrize("packed", [False, True])
def test_compiles_without_a_break(backend: str, packed: bool, compiler: str) -> None:
    options: dict = {"window": 4, "backend": backend}
    if packed:
        inputs, extra = [draw(1, 7, 2, 3, seed=i) for i in range(3)], {"cu_seqlens": torch.tensor([0, 3, 7])}
    else:
        inputs, extra = qkv(), {"key_lengths": LENGTHS}
    leaves = [t.requires_grad_() for t in inputs]

    def call(q: Tensor, k: Tensor, v: Tensor, extra: dict) -> Tensor:
        return sliding_window_attention(q, k, v, **options, **extra)

    compiled = torch.compile(call, fullgraph=True, backend=compiler)
    results = [f(*leaves, extra) for f in (call, compiled)]
    torch.testing.assert_close(results[1], results[0])
    grads = [torch.autograd.grad(o.square().sum(), leaves) for o in results]
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize("name", KERNELS)
def test_bad_boundaries_are_found_in_compiled_code_too(name: str) -> None:
    q, k, v = (draw(1, 6, 2, 3, seed=i) for i in range(3))
    compiled = torch.compile(
        lambda ends: sliding_window_attention(q, k, v, cu_seqlens=ends, backend=name), backend="aot_eager"
    )
    compiled(torch.tensor([0, 2, 6]))
    with pytest.raises(ValueError, match=re.escape("cu_seqlens is [0, 2, 100]; accepted")):
        compiled(torch.tensor([0, 2, 100]))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*torch.jit.trace.*")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_trace_computes_anew(backend: str) -> None:
    call = lambda q, k, v: sliding_window_attention(q, k, v, window=4, backend=backend)  # noqa: E731
    traced = torch.jit.trace(call, tuple(qkv()), check_trace=False)
    torch.testing.assert_close(traced(*qkv(5)), call(*qkv(5)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_that_memory_holds_with_the_other_sign(backend: str) -> None:
    q, k, v = qkv()
    found = sliding_window_attention(q, k, torch._neg_view(v), **OPTIONS, backend=backend)
    torch.testing.assert_close(found, -sliding_window_attention(q, k, v, **OPTIONS, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths_that_lie_apart(backend: str) -> None:
    q, k, v = qkv()
    lengths = torch.stack([LENGTHS, LENGTHS - 1], 1)[:, 0]
    found = sliding_window_attention(q, k, v, key_lengths=lengths, backend=backend)
    expected = sliding_window_attention(q, k, v, key_lengths=LENGTHS, backend=backend)
    torch.testing.assert_close(found, expected)


def test_forward_mode_is_right_or_refused() -> None:
    inputs, tangents = qkv(), tuple(qkv(seed=10))
    expected = sliding_window_attention_jvp(*inputs, *tangents, **OPTIONS)
    found = torch.func.jvp(lambda *t: sliding_window_attention(*t, **OPTIONS), tuple(inputs), tangents)
    torch.testing.assert_close(found, expected)
    for backend in KERNELS:
        with pytest.raises(ValueError, match=r"swa: backend 'cpu' cannot .* forward mode"):
            torch.func.jvp(
                lambda *t, name=backend: sliding_window_attention(*t, **OPTIONS, backend=name),
                tuple(inputs),
                tangents,
            )


def test_vmap_is_right_or_refused() -> None:
    inputs = [torch.stack([t, 2 * t]) for t in qkv()]
    lengths = torch.stack([LENGTHS, LENGTHS - 1])

    def call(q: Tensor, k: Tensor, v: Tensor, key_lengths: Tensor, backend: str | None = None) -> Tensor:
        return sliding_window_attention(q, k, v, window=4, key_lengths=key_lengths, backend=backend)

    expected = torch.stack([call(*args) for args in zip(*inputs, lengths, strict=True)])
    torch.testing.assert_close(torch.func.vmap(call)(*inputs, lengths), expected)
    for backend in KERNELS:
        with pytest.raises(ValueError, match=r"swa: backend 'cpu' cannot .* transforms"):
            torch.func.vmap(lambda *t, name=backend: call(*t, name))(*inputs, lengths)


# -- The forward-mode twin ----------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("given", [(1, 1, 1), (0, 1, 0)])
def test_jvp_differentiates_in_reverse(backend: str, given: tuple[int, ...]) -> None:
    shapes = ((1, 2, 2, 2), (1, 3, 1, 2), (1, 3, 1, 2)) * 2
    wanted = (1, 1, 1, *given)
    inputs = [draw(*s, seed=i).requires_grad_() if wanted[i] else None for i, s in enumerate(shapes)]

    def call(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        present = iter(tensors)
        every = [next(present) if w else None for w in wanted]
        return sliding_window_attention_jvp(*every, window=2, backend=backend)

    leaves = [t for t in inputs if t is not None]
    assert gradcheck(call, leaves)
    if backend == "reference":
        assert gradgradcheck(call, leaves)
        return
    grads = torch.autograd.grad(call(*leaves)[1].square().sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match=r"swa_jvp_backward.*no autograd formula"):
        torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_jvp_within_budget(backend: str, dtype: torch.dtype) -> None:
    shapes = ((1, 130, 4, 40), (1, 200, 2, 40), (1, 200, 2, 40)) * 2
    inputs = [draw(*shape, seed=i) for i, shape in enumerate(shapes)]

    def on(name: str) -> Callable[..., tuple[Tensor, Tensor]]:
        return lambda *t: sliding_window_attention_jvp(*t, window=90, backend=name)

    assert_within_budget(on, inputs, dtype, backend, highest=1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_jvp_keeps_the_dtype_and_ignores_what_is_not_valid(backend: str) -> None:
    inputs, tangents = ([t.bfloat16() for t in qkv(seed)] for seed in (0, 10))
    for t in (*inputs[1:], *tangents[1:]):
        t[1, :3] = float("nan")
    options = {"key_lengths": torch.tensor([7, 4]), "backend": backend}
    o, tangent = sliding_window_attention_jvp(*inputs, *tangents, **options)
    assert (o.dtype, tangent.dtype) == (torch.bfloat16, torch.bfloat16)
    assert tangent.isfinite().all()
    assert o[1, 0].abs().max() == 0
    assert tangent[1, 0].abs().max() == 0


# -- What is refused ----------------------------------------------------------------------------------------


def zeros(*shape: int, **options) -> Tensor:
    return torch.zeros(shape, **options)


PACKED = {"q": zeros(1, 6, 4, 8), "k": zeros(1, 6, 2, 8), "v": zeros(1, 6, 2, 8)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": zeros(5, 4, 8)}, "q has shape (5, 4, 8); accepted is (batch, length, heads, head_dim)"),
        ({"v": zeros(2, 7, 2, 0)}, "v has shape (2, 7, 2, 0); accepted is (batch, length, heads, head_dim)"),
        ({"k": None}, "k must be a tensor, got NoneType"),
        ({"q": zeros(2, 5, 4, 8, dtype=torch.int64)}, "q of shape (2, 5, 4, 8) has dtype torch.int64"),
        ({"q": zeros(2, 5, 4, 8).to(torch.float8_e4m3fn)}, "q of shape (2, 5, 4, 8) has dtype torch.float8"),
        (
            {"k": zeros(2, 7, 2, 8).to_sparse()},
            "k of shape (2, 7, 2, 8) has layout torch.sparse_coo; accepted",
        ),
        ({"v": zeros(2, 7, 2, 8, dtype=torch.float64)}, "v has dtype torch.float64; accepted is q's dtype"),
        ({"k": zeros(2, 7, 2, 8, device="meta")}, "k is on meta but q is on cpu"),
        ({"v": zeros(2, 6, 2, 8)}, "v has shape (2, 6, 2, 8); accepted is k's shape (2, 7, 2, 8)"),
        ({"q": zeros(3, 5, 4, 8)}, "q has shape (3, 5, 4, 8) and k (2, 7, 2, 8); accepted are equal batch"),
        ({"q": zeros(2, 5, 4, 6)}, "q has shape (2, 5, 4, 6) and k (2, 7, 2, 8); accepted are equal batch"),
        ({"q": zeros(2, 5, 3, 8)}, "q has 3 heads and k 2; accepted are multiples"),
        ({"q": zeros(2, 8, 4, 8)}, "q has length 8 and k 7; accepted are at least as many keys"),
        ({"window": 0}, "window is 0; accepted are integers from 1"),
        ({"window": 2.0}, "window is 2.0; accepted"),
        ({"window": 10**30}, f"window is {10**30}; accepted"),
        ({"scale": torch.tensor(0.5)}, "scale is a tensor of shape (); accepted are a number"),
        ({"key_lengths": [7, 4]}, "key_lengths has type list; accepted is an int64 or int32 tensor"),
        ({"key_lengths": zeros(2)}, "key_lengths has dtype torch.float32 and shape (2,); accepted"),
        ({"key_lengths": torch.tensor(7)}, "key_lengths has dtype torch.int64 and shape (); accepted"),
        (
            {"key_lengths": torch.tensor([7])},
            "key_lengths has shape (1,); accepted is one number per sequence",
        ),
        (
            {"key_lengths": torch.tensor([7, 8])},
            "key_lengths is [7, 8]; accepted are numbers of keys from 0 to 7",
        ),
        ({"key_lengths": torch.tensor([-1, 7])}, "key_lengths is [-1, 7]; accepted"),
        (
            {"key_lengths": zeros(2, dtype=torch.int64, device="meta")},
            "key_lengths is on meta but q is on cpu",
        ),
        ({"cu_seqlens": torch.tensor([0, 7])}, "cu_seqlens is given with q of shape (2, 5, 4, 8)"),
        ({**PACKED, "cu_seqlens": torch.tensor([0])}, "cu_seqlens has shape (1,); accepted are at least two"),
        ({**PACKED, "cu_seqlens": torch.tensor([1, 6])}, "cu_seqlens is [1, 6]; accepted are boundaries"),
        ({**PACKED, "cu_seqlens": torch.tensor([0, 5])}, "cu_seqlens is [0, 5]; accepted are boundaries"),
        ({**PACKED, "cu_seqlens": torch.tensor([0, 4, 3, 6])}, "cu_seqlens is [0, 4, 3, 6]; accepted"),
        ({**PACKED, "cu_seqlens": torch.tensor([0.0, 6.0])}, "cu_seqlens has dtype torch.float32"),
    ],
)
def test_refuses(changes: dict, message: str) -> None:
    arguments = {"q": zeros(2, 5, 4, 8), "k": zeros(2, 7, 2, 8), "v": zeros(2, 7, 2, 8), **changes}
    with pytest.raises(ValueError, match=re.escape(f"sliding_window_attention: {message}")):
        sliding_window_attention(**arguments)
    with pytest.raises(ValueError, match=re.escape(f"sliding_window_attention_jvp: {message}")):
        sliding_window_attention_jvp(**arguments)


def test_jvp_refuses() -> None:
    q, k, v = qkv()
    with pytest.raises(ValueError, match=r"q_dot has shape \(2, 7, 2, 3\)"):
        sliding_window_attention_jvp(q, k, v, k)
    with pytest.raises(ValueError, match=r"v_dot has shape .* torch.float32"):
        sliding_window_attention_jvp(q, k, v, None, None, v.float())
    with pytest.raises(ValueError, match=r"'cuda' cannot serve this call: .*what can: .*'reference'"):
        sliding_window_attention_jvp(q, k, v, q, backend="cuda")
