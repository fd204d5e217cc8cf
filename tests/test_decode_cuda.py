"""Decoding on CUDA: the kernel against float64, and that its bits depend on nothing but a sequence.

It runs on the processor (tests/cuda_here.py), and on a GPU too where there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
import torch
from cuda_here import ORDERS, OnHost
from decode_stacks import (
    Token,
    assert_agrees,
    cast,
    make_stack,
    make_token,
    map_stack,
    map_token,
    seen,
)
from harness import relative_error
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ttt_kernels import extension
from ttt_kernels.backends import available, backends
from ttt_kernels.decode import Stack, cuda, step
from ttt_kernels.decode.plan import tensors

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BARRIER = 128
"""Bytes of scratch that must be kept between steps; what is behind them must be written before it is read."""
PER_SEQUENCE = ("k_cache", "v_cache", "fast_gate", "fast_up", "fast_down")
Result = tuple[Tensor, Tensor, Tensor]


class Device:
    """Where the kernel runs, and how to change what must not matter there."""

    def __init__(self, name: str, arrange: Callable[..., None]) -> None:
        self.name, self.arrange = name, arrange

    def step(self, stack: Stack, x: Tensor, cos: Tensor, sin: Tensor, visible: Tensor) -> Result:
        """A step of a stack on the CPU, with its caches and to results there."""
        there = stack if self.name == "cpu" else map_stack(stack, lambda name, t: t.to(self.name))
        arguments = tuple(t.to(self.name) for t in (x, cos, sin, visible))
        cuda._plans.current(there).scratch[BARRIER:] = 255
        prefix, hidden, logits = (t.cpu() for t in cuda.step(there, *arguments))
        if there is not stack:
            for here, own in zip(stack.layers, there.layers, strict=True):
                here.k_cache.copy_(own.k_cache)
                here.v_cache.copy_(own.v_cache)
        return prefix, hidden, logits


@pytest.fixture(scope="module", params=["host", "gpu"])
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    if request.param == "gpu":
        if "cuda" not in available():
            pytest.skip(str(backends()["cuda"]["reason"]))
        yield Device("cuda", lambda order, processors, in_bulk=True: None)
        return
    on_host: OnHost = request.getfixturevalue("built_cuda_on_host")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extension, "load_cuda", lambda: (on_host.kernels, ""))
        yield Device("cpu", on_host.arrange)
    on_host.arrange()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("shape", "counts"),
    [
        ((1, 2, 64, 104), (70, 33)),
        ((3, 2, 40, 56), (1, 8)),
        ((2, 1, 80, 136), (205, 2)),
        ((5, 3, 8, 8), (3, 1)),
    ],
    ids=str,
)
def test_within_budget(
    device: Device, dtype: torch.dtype, shape: tuple[int, int, int, int], counts: tuple[int, int]
) -> None:
    """`shape`: sequences, heads, their width and the intermediate size."""
    device.arrange(0, 3)
    stack = make_stack(*shape, capacities=(210, 40))
    assert_agrees(device.step, stack, dtype, (counts[0] + 2, counts[1] - 1), counts)


@given(
    shape=st.tuples(st.integers(1, 8), st.integers(1, 4), st.integers(1, 8).map(lambda n: 8 * n)),
    sizes=st.tuples(st.integers(1, 20).map(lambda n: 8 * n), st.integers(1, 90)),
    dtype=st.sampled_from(DTYPES),
    spread=st.booleans(),
    fast=st.integers(0, 2),
    counts=st.tuples(st.integers(1, 250), st.integers(1, 40)),
    order=st.sampled_from(ORDERS),
    processors=st.integers(1, 4),
    in_bulk=st.booleans(),
)
def test_any_shape(
    device: Device, shape: tuple[int, int, int], sizes: tuple[int, int], dtype: torch.dtype, spread: bool,
    fast: int, counts: tuple[int, int], order: int, processors: int, in_bulk: bool,
) -> None:  # fmt: skip
    """`shape`: sequences, heads and their width; `sizes`: intermediate and vocabulary."""
    device.arrange(order, processors, in_bulk=in_bulk)
    stack = make_stack(*shape, *sizes, capacities=(252, 40), fast_layers=fast, spread=spread)
    assert_agrees(device.step, stack, dtype, (counts[0] + 1, counts[1] - 1), counts)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_keys(device: Device, dtype: torch.dtype) -> None:
    """As many pieces as there can be, of several turns; and one key more than a piece takes."""
    device.arrange(2, 3)
    stack = make_stack(batch=2, heads=1, head_dim=16, capacities=(6300, 200), fast_layers=0)
    assert_agrees(device.step, stack, dtype, (6299, 195), (6295, 193))


@pytest.mark.parametrize("head_dim", [128, 256])
def test_wide_heads(device: Device, head_dim: int) -> None:
    device.arrange(0, 2)
    stack = make_stack(heads=1, head_dim=head_dim, capacities=(40, 40))
    assert_agrees(device.step, stack, torch.bfloat16, (38, 6), (33, 7))


@pytest.mark.parametrize("order", ORDERS)
def test_rows_of_several_warps(device: Device, order: int) -> None:
    """Threads of two warps have elements of a row, and of its sum of squares."""
    device.arrange(order, 2)
    stack = make_stack(heads=2, head_dim=136, capacities=(9, 9), fast_layers=0)
    assert_agrees(device.step, stack, torch.float32, (8, 3), (5, 4))


@pytest.mark.parametrize("in_bulk", [True, False])
@pytest.mark.parametrize("order", ORDERS)
def test_rows_of_several_segments(device: Device, order: int, in_bulk: bool) -> None:
    """Rows are copied in parts, more than a ring has slots for, and the last is short."""
    device.arrange(order, 1, in_bulk=in_bulk)
    stack = make_stack(heads=1, head_dim=8, intermediate=2600, capacities=(5,), fast_layers=0)
    assert_agrees(device.step, stack, torch.float32, (4,), (3,))


@pytest.mark.parametrize("device", ["host"], indirect=True)
@pytest.mark.parametrize("in_bulk", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
def test_every_weight_is_copied_once_and_nothing_behind_it(
    built_cuda_on_host: OnHost, device: Device, batch: int, in_bulk: bool
) -> None:
    """What lies behind a row's last segment may belong to nobody. Here rows are in whole units."""
    device.arrange(2, 2, in_bulk=in_bulk)
    stack = cast(make_stack(batch, vocab=32, intermediate=1080), torch.float32)
    device.step(stack, *make_token(stack, torch.float32), seen((3, 3), (1, 1)))
    sizes = [
        t.nbytes for layer in stack.layers for t in tensors(layer) if t is not None and t.dim() in (2, 3)
    ]
    assert built_cuda_on_host.library.copied_bytes() == sum(sizes) + stack.head.nbytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_rounds_where_separate_operators_would(device: Device, dtype: torch.dtype) -> None:
    """Mostly the bits of the plain formulas at the same dtype: a sum in another order seldom rounds to another number,
    but where one does all that follows differs, so that this is of the median of five tokens.
    """
    device.arrange(0, 3)
    stack = cast(make_stack(heads=3, head_dim=32, intermediate=200, vocab=90, capacities=(20, 20)), dtype)
    x, cos, sin = make_token(stack, dtype)
    visible = seen((15, 15), (12, 12))
    distances, errors = [], []
    for turn in range(5):
        exact, plain, own = (cast(stack, t) for t in (torch.float64, dtype, dtype))
        token = x.roll(turn, -1), cos, sin
        truth = step(exact, *map_token(token, Tensor.double), visible, backend="reference")
        honest = step(plain, *token, visible, backend="reference")
        found = device.step(own, *token, visible)
        distances.append([relative_error(o, p.double()) for p, o in zip(honest, found, strict=True)])
        errors.append([relative_error(p, e) for e, p in zip(truth, honest, strict=True)])
    distance, error = (torch.tensor(values).median(0).values for values in (distances, errors))
    assert (distance < 0.2 * error).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_any_grid_order_and_neighbours(device: Device, dtype: torch.dtype) -> None:
    """And for copies of weights in bulk and by threads."""
    stack = cast(make_stack(batch=5, heads=2, head_dim=8, intermediate=24, capacities=(500, 20)), dtype)
    token, visible = make_token(stack, dtype), seen((480, 11), (400, 12))

    def run(sequences: Sequence[int], order: int, processors: int) -> Result:
        device.arrange(order, processors, in_bulk=processors % 2 == 1)
        own = map_stack(stack, lambda name, t: t[list(sequences)] if name in PER_SEQUENCE else t.clone())
        return device.step(own, *map_token(token, lambda t: t[list(sequences)]), visible)

    whole = run(range(5), 0, 3)
    for sequences, order, processors in (
        (range(5), 1, 2), (range(5), 3, 5), ((4, 2, 0, 3, 1), 0, 1), ((3,), 2, 4), ((2, 4), 1, 5), ((0, 1, 4), 0, 2),
    ):  # fmt: skip
        for all_of_them, some in zip(whole, run(sequences, order, processors), strict=True):
            assert torch.equal(all_of_them[list(sequences)], some)


def test_step_after_step(device: Device) -> None:
    """The caches fill, and the barrier begins where it was left, whatever the number of blocks then was."""
    stacks = [cast(make_stack(batch=2, capacities=(9, 9)), torch.float32) for _ in range(2)]
    for t in range(9):
        device.arrange(t % 4, 1 + t % 3)
        token, visible = _token(stacks[0], t), seen((t, t), (t + 1, min(t + 1, 3)))
        found = device.step(stacks[0], *token, visible)
        expected = step(stacks[1], *token, visible, backend="reference")
        for have, want in zip(found, expected, strict=True):
            assert relative_error(have, want.double()) < 1e-5


def _token(stack: Stack, t: int) -> Token:
    x, cos, sin = make_token(stack, torch.float32)
    return x.roll(t, -1), cos.roll(t, -1), sin.roll(t, -1)


def test_a_tensor_that_moved_is_found_again(device: Device) -> None:
    device.arrange(0, 2)
    stack = cast(make_stack(), torch.float32)
    token, visible = make_token(stack, torch.float32), seen((3, 3), (1, 1))
    first = device.step(stack, *token, visible)
    old = stack.layers[0].w_o.data
    stack.layers[0].w_o.data = old * 2 + 1
    old.fill_(torch.nan)
    second = device.step(stack, *token, visible)
    assert not torch.allclose(first[2], second[2])
    expected = step(stack, *token, visible, backend="reference")
    assert torch.allclose(second[2], expected.logits, atol=1e-4)


@pytest.mark.parametrize("name", ["head", "final_norm"])
def test_a_tensor_that_moved_to_where_no_vector_begins_is_refused(device: Device, name: str) -> None:
    device.arrange(0, 2)
    stack = cast(make_stack(), torch.bfloat16)
    there = stack if device.name == "cpu" else map_stack(stack, lambda _, t: t.to(device.name))
    token = map_token(make_token(stack, torch.bfloat16), lambda t: t.to(device.name))
    cuda.step(there, *token, seen((3, 3), (1, 1)))
    moved = getattr(there, name)
    moved.data = torch.cat((moved.flatten()[:1], moved.flatten()))[1:].view(moved.shape)
    with pytest.raises(ValueError, match=f"{name} begins at"):
        cuda.step(there, *token, seen((3, 3), (1, 1)))


def test_rows_anywhere_and_tables_apart(device: Device) -> None:
    """Of x a row that begins where no vector does, of cos and sin every second column."""
    device.arrange(0, 2)
    stack = cast(make_stack(), torch.bfloat16)
    (x, cos, sin), visible = make_token(stack, torch.bfloat16), seen((3, 3), (1, 1))
    expected = device.step(stack, x, cos, sin, visible)
    shifted = torch.cat((x.flatten()[:1], x.flatten()))[1:].view(x.shape)
    apart = [t.repeat_interleave(2, -1)[:, ::2] for t in (cos, sin)]
    found = cuda.step(stack, shifted, *apart, visible) if device.name == "cpu" else expected
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_what_the_kernel_cannot_take(device: Device) -> None:
    if device.name != "cpu":
        pytest.skip("what is refused does not depend on where it is")
    bf16 = torch.bfloat16
    plain = cast(make_stack(), bf16)
    narrow = replace(plain.layers[1], fast_norm=plain.layers[1].seq_norm.bfloat16())
    flat = torch.zeros(plain.layers[0].w_o.numel() + 1, dtype=bf16)
    odd = replace(plain.layers[0], w_o=flat[1:].view(plain.layers[0].w_o.shape))
    cache = torch.zeros(1, 6, 20, dtype=bf16)[:, :, :16].view(1, 6, 2, 8)
    for stack, message in (
        (cast(make_stack(), torch.float64), "computes in float32"),
        (replace(plain, layers=(plain.layers[0], narrow)), r"layers\[1\].fast_norm has dtype torch.bfloat16"),
        (cast(make_stack(head_dim=12), bf16), "width of a head is 12"),
        (cast(make_stack(intermediate=20), bf16), "intermediate size is 20"),
        (replace(plain, layers=(odd, plain.layers[1])), r"layers\[0\].w_o begins at"),
        (
            replace(plain, layers=(replace(plain.layers[0], k_cache=cache), plain.layers[1])),
            r"layers\[0\].k_cache .* strides \(120, 20, 8, 1\)",
        ),
        (cast(make_stack(batch=9), bf16), "9 sequences of width 16"),
        (cast(make_stack(heads=1, head_dim=264), bf16), "264 a head"),
        (cast(make_stack(heads=193, head_dim=16, fast_layers=0, capacities=(1,)), bf16), "width 3088"),
    ):
        assert message.replace("\\", "").split(" .*")[0] in str(cuda.refusal(stack))
        with pytest.raises(ValueError, match=message):
            cuda.step(
                stack,
                *make_token(stack, stack.head.dtype),
                seen(*zip(*[(0, 1)] * len(stack.layers), strict=True)),
            )


@pytest.mark.skipif("cuda" not in available(), reason="a GPU captures graphs")
def test_a_graph_reads_what_is_visible_at_each_replay() -> None:
    stack = map_stack(cast(make_stack(capacities=(9, 9)), torch.bfloat16), lambda name, t: t.cuda())
    same = map_stack(stack, lambda name, t: t.clone())
    token = map_token(make_token(stack, torch.bfloat16), Tensor.cuda)
    visible = seen((0, 0), (1, 1)).cuda()
    step(stack, *token, visible, backend="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = step(stack, *token, visible, backend="cuda")
    for t in range(9):
        now = seen((t, t), (t + 1, min(t + 1, 3)))
        visible.copy_(now)
        graph.replay()
        for have, want in zip(found, step(same, *token, now, backend="cuda"), strict=True):
            assert torch.equal(have, want)
