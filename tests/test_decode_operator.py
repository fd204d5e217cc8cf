"""One decoding step through a whole stack: cpu against the plain formulas, those against dense attention."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from statistics import median

import pytest
import torch
from decode_stacks import assert_agrees, cast, make_stack, make_token, map_stack, map_token, seen
from harness import BACKENDS, draw, relative_error
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ttt_kernels.decode import Decoded, Stack, step
from ttt_kernels.extension import cpu

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SETS = cpu.instruction_sets() if cpu is not None else []
needs_cpu = pytest.mark.skipif("cpu" not in BACKENDS, reason="the C++ extension is not built")


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    assert cpu is not None
    before = cpu.instruction_set()
    cpu.choose_instruction_set(name)
    try:
        yield
    finally:
        cpu.choose_instruction_set(before)


@contextmanager
def threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def step_on_cpu(stack: Stack, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor) -> Decoded:
    return step(stack, x, cos, sin, visible, backend="cpu")


@needs_cpu
@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "counts"),
    [
        ((1, 2, 64, 99), (70, 33)),
        ((3, 2, 40, 56), (1, 8)),
        ((3, 1, 80, 131), (200, 2)),
        ((1, 5, 6, 7), (3, 1)),
    ],
    ids=str,
)
@pytest.mark.slow
def test_every_instruction_set(
    isa: str, dtype: torch.dtype, shape: tuple[int, int, int, int], counts: tuple[int, int]
) -> None:
    """`shape`: sequences, heads, their width and the intermediate size."""
    stack = make_stack(*shape, capacities=(210, 40))
    with instruction_set(isa):
        assert_agrees(step_on_cpu, stack, dtype, (counts[0] + 2, counts[1] - 1), counts)


@needs_cpu
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 4), st.integers(1, 20).map(lambda half: 2 * half)),
    sizes=st.tuples(st.integers(1, 70), st.integers(1, 90)),
    dtype=st.sampled_from(DTYPES),
    spread=st.booleans(),
    fast=st.integers(0, 2),
    counts=st.tuples(st.integers(1, 150), st.integers(1, 40)),
    n_threads=st.integers(1, 5),
)
def test_any_shape(
    shape: tuple[int, int, int], sizes: tuple[int, int], dtype: torch.dtype, spread: bool, fast: int,
    counts: tuple[int, int], n_threads: int,
) -> None:  # fmt: skip
    """`shape`: sequences, heads and their width; `sizes`: intermediate and vocabulary."""
    stack = make_stack(*shape, *sizes, capacities=(152, 40), fast_layers=fast, spread=spread)
    with threads(n_threads):
        assert_agrees(step_on_cpu, stack, dtype, (counts[0] + 1, counts[1] - 1), counts)


@needs_cpu
@pytest.mark.parametrize("isa", SETS)
def test_many_keys(isa: str) -> None:
    """As many pieces as there can be, of more than a tile of scores; one key more than short pieces take."""
    stack = make_stack(batch=2, heads=1, head_dim=16, capacities=(8300, 2100))
    with instruction_set(isa):
        assert_agrees(step_on_cpu, stack, torch.float32, (8299, 2090), (8295, 64 * 32 + 1))


@needs_cpu
@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounds_where_separate_operators_would(isa: str, dtype: torch.dtype) -> None:
    """Most sequences are far nearer to the plain formulas at the same dtype than these are to float64.

    In the others a sum that lies between two numbers was rounded to the other one, and with it all that comes after.
    """
    stack = make_stack(32, heads=3, head_dim=32, intermediate=200, vocab=90, capacities=(20, 20))
    exact, plain, own = cast(cast(stack, dtype), torch.float64), cast(stack, dtype), cast(stack, dtype)
    token, rows, counts = make_token(stack, dtype), (15, 15), (12, 12)
    truth = step(exact, *map_token(token, Tensor.double), seen(rows, counts), backend="reference")
    honest = step(plain, *token, seen(rows, counts), backend="reference")
    with instruction_set(isa):
        found = step(own, *token, seen(rows, counts), backend="cpu")
    for e, p, o in zip(truth, honest, found, strict=True):
        shares = [relative_error(o[i], p[i].double()) / relative_error(p[i], e[i]) for i in range(32)]
        assert median(shares) < 0.4


@needs_cpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_any_threads_and_neighbours(dtype: torch.dtype) -> None:
    stack = cast(make_stack(batch=5, heads=3, head_dim=16, intermediate=70, capacities=(300, 20)), dtype)
    token = make_token(stack, dtype)
    rows, counts = (280, 11), (200, 12)

    def run(order: Sequence[int], n_threads: int) -> Decoded:
        names = ("k_cache", "v_cache", "fast_gate", "fast_up", "fast_down")
        chosen = map_stack(stack, lambda name, t: t[list(order)] if name in names else t)
        with threads(n_threads):
            return step(
                chosen, *map_token(token, lambda t: t[list(order)]), seen(rows, counts), backend="cpu"
            )

    whole = run(range(5), 1)
    for order, n_threads in ((range(5), 2), (range(5), 7), ((4, 2, 0, 3, 1), 2), ((3,), 3), ((2, 4), 1)):
        for all_of_them, some in zip(whole, run(order, n_threads), strict=True):
            assert torch.equal(all_of_them[list(order)], some)


@pytest.mark.parametrize("backend", BACKENDS)
def test_token_by_token_is_causal_attention(backend: str) -> None:
    """A few steps give what dense attention with a window, written out below, gives for all at once."""
    dtype = torch.float64 if backend == "reference" else torch.float32
    length, window, batch = 7, 3, 2
    stack = cast(make_stack(batch, capacities=(length, length, length), fast_layers=1), dtype)
    tokens = draw(length, batch, stack.hidden_size, seed=5).to(dtype)
    angles = torch.arange(length)[:, None] * draw(1, stack.head_dim // 2, seed=6).abs()
    cos, sin = (t.to(dtype)[:, None].expand(-1, batch, -1) for t in (angles.cos(), angles.sin()))
    found = [
        step(stack, tokens[t], cos[t], sin[t], seen([t] * 3, [min(t + 1, window)] * 3), backend=backend)
        for t in range(length)
    ]
    expected = dense(stack, tokens.transpose(0, 1), angles.to(dtype), window)
    for index, want in enumerate(expected):
        have = torch.stack([f[index] for f in found], 1)
        assert relative_error(have, want.double()) < 50 * torch.finfo(dtype).eps


def dense(stack: Stack, x: Tensor, angles: Tensor, window: int) -> tuple[Tensor, Tensor, Tensor]:
    """Prefix output, hidden and logits for x (B, T, d), rotations being products with complex numbers."""

    def norm(t: Tensor, weight: Tensor | None) -> Tensor:
        assert weight is not None
        return torch.nn.functional.rms_norm(t, weight.shape, weight, stack.eps)

    def rotated(t: Tensor) -> Tensor:
        pairs = torch.view_as_complex(t.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)[:, None]).flatten(-2)

    def mlp(t: Tensor, gate: Tensor | None, up: Tensor | None, down: Tensor | None) -> Tensor:
        assert gate is not None
        assert up is not None
        assert down is not None
        return (torch.nn.functional.silu(t @ gate.mT) * (t @ up.mT)) @ down.mT

    distance = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
    visible = (distance >= 0) & (distance < window)
    prefix = x
    for layer in stack.layers:
        q, k, v = (norm(x, layer.seq_norm) @ layer.w_qkv.T).unflatten(-1, (3, stack.n_heads, -1)).unbind(2)
        q, k, v = (
            t.transpose(1, 2) for t in (rotated(norm(q, layer.q_norm)), rotated(norm(k, layer.k_norm)), v)
        )
        attended = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        x = x + norm(attended.transpose(1, 2).flatten(2) @ layer.w_o.T, layer.seq_post_norm)
        if layer.has_fast:
            fast = mlp(norm(x, layer.fast_norm), layer.fast_gate, layer.fast_up, layer.fast_down)
            x = x + norm(fast, layer.fast_post_norm)
        x = x + norm(
            mlp(norm(x, layer.mlp_norm), layer.w_gate, layer.w_up, layer.w_down), layer.mlp_post_norm
        )
        if not layer.has_fast:
            prefix = x
    hidden = norm(x, stack.final_norm)
    return prefix, hidden, hidden @ stack.head.T


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_fast_layers_the_prefix_is_everything(backend: str) -> None:
    stack = cast(make_stack(fast_layers=0), torch.float32)
    out = step(stack, *make_token(stack, torch.float32), seen((2, 2), (3, 1)), backend=backend)
    rms = (out.prefix_output.square().mean(-1, keepdim=True) + stack.eps).sqrt()
    assert torch.allclose(out.hidden, out.prefix_output / rms * stack.final_norm, rtol=1e-5, atol=1e-6)


@needs_cpu
def test_a_tensor_that_moved_is_found_again() -> None:
    stack = cast(make_stack(), torch.float32)
    token = make_token(stack, torch.float32)
    visible = seen((3, 3), (1, 1))
    first = step(stack, *token, visible, backend="cpu")
    old = stack.layers[0].w_o.data
    stack.layers[0].w_o.data = old * 2 + 1
    old.fill_(torch.nan)
    second = step(stack, *token, visible, backend="cpu")
    assert not torch.allclose(first.logits, second.logits)
    expected = step(stack, *token, visible, backend="reference")
    assert torch.allclose(second.logits, expected.logits, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_builds_no_graph_and_leaves_its_arguments_alone(backend: str) -> None:
    stack = cast(make_stack(), torch.float32)
    stack.head.requires_grad_()
    token = map_token(make_token(stack, torch.float32), Tensor.requires_grad_)
    copies = map_token(token, Tensor.clone)
    out = step(stack, *token, seen((2, 2), (3, 1)), backend=backend)
    assert not any(t.requires_grad for t in out)
    assert all(torch.equal(a, b) for a, b in zip(token, copies, strict=True))


@needs_cpu
def test_what_the_kernel_cannot_take() -> None:
    wide = cast(make_stack(), torch.float64)
    plain = cast(make_stack(), torch.bfloat16)
    turned = replace(plain.layers[0], w_o=plain.layers[0].w_o.T.contiguous().T)
    narrow = replace(plain.layers[1], fast_norm=plain.layers[1].seq_norm.bfloat16())
    for stack, message in (
        (wide, "computes in float32"),
        (replace(plain, layers=(turned, plain.layers[1])), r"layers\[0\].w_o .* strides"),
        (replace(plain, layers=(plain.layers[0], narrow)), r"layers\[1\].fast_norm has dtype torch.bfloat16"),
    ):
        token = make_token(stack, stack.head.dtype)
        with pytest.raises(ValueError, match=message):
            step(stack, *token, seen((2, 2), (3, 1)), backend="cpu")
        chosen = step(stack, *token, seen((2, 2), (3, 1)))
        assert torch.equal(
            chosen.logits, step(stack, *token, seen((2, 2), (3, 1)), backend="reference").logits
        )


def test_arguments_that_do_not_fit() -> None:
    stack = cast(make_stack(), torch.float32)
    x, cos, sin = make_token(stack, torch.float32)
    visible = seen((1, 1), (1, 1))
    for arguments, message in (
        ((x[:, 1:], cos, sin, visible), r"x has shape \(1, 15\)"),
        ((x.double(), cos, sin, visible), "x has .* dtype torch.float64"),
        ((x, cos[:, :2], sin, visible), r"cos has shape \(1, 2\)"),
        ((x, cos, sin.bfloat16(), visible), "sin has .* dtype torch.bfloat16"),
        ((x, cos, sin, visible[:1]), r"visible has shape \(1, 2\)"),
        ((x, cos, sin, visible.int()), "visible has .* dtype torch.int32"),
        ((x, cos, sin, visible.to("meta")), "visible has .* on meta"),
        ((x, cos, sin, seen((1, 9), (1, 1))), "row 9 and count 1 are given for a cache of 9 rows"),
        ((x, cos, sin, seen((1, -1), (1, 1))), "row -1"),
        ((x, cos, sin, seen((1, 1), (1, 3))), "count 3"),
        ((x, cos, sin, seen((1, 1), (1, 0))), "count 0"),
    ):
        with pytest.raises(ValueError, match=message):
            step(stack, *arguments)


def test_stacks_that_do_not_fit() -> None:
    stack = make_stack()
    layer, last = stack.layers
    for change, message in (
        ({"layers": ()}, "layers is empty"),
        ({"n_heads": 3}, "n_heads=3"),
        ({"final_norm": stack.final_norm[1:]}, r"final_norm has shape \(15,\)"),
        ({"layers": (replace(layer, w_up=layer.w_up.T),)}, r"layers\[0\].w_up has shape \(16, 24\)"),
        ({"layers": (replace(layer, k_norm=layer.seq_norm),)}, r"k_norm has shape \(16,\)"),
        ({"layers": (replace(layer, v_cache=layer.v_cache[:, 1:]),)}, "v_cache has shape"),
        ({"layers": (layer, replace(last, fast_down=None))}, r"layers\[1\].* some of fast_norm"),
        ({"layers": (layer, replace(last, fast_up=torch.zeros(2, 24, 16)))}, "fast_up has shape"),
    ):
        with pytest.raises(ValueError, match=message):
            replace(stack, **change)
