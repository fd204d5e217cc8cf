"""Clipped SGD's CUDA kernels: the step in place against float64, and that its bits depend on nothing but its sequence.

They run on the processor (tests/cuda_here.py), and on a GPU too where there is one.
"""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from cuda_here import ORDERS, OnHost
from harness import draw, relative_error
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ttt_kernels import extension
from ttt_kernels.backends import available, backends
from ttt_kernels.clipped_sgd import cuda, reference
from ttt_kernels.clipped_sgd.update import update_

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PIECE = 4096
"""Elements that a block has at a time (kPiece in csrc/cuda/clipped_sgd.cu)."""
FILLER = 7.5

Arrange = Callable[[int, int], None]


class Device:
    """Where the kernels run, and how to change what must not matter there."""

    def __init__(self, name: str, arrange: Arrange) -> None:
        self.name, self.arrange = name, arrange


@pytest.fixture(scope="module", params=["host", "gpu"])
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    if request.param == "gpu":
        if "cuda" not in available():
            pytest.skip(str(backends()["cuda"]["reason"]))
        yield Device("cuda", lambda order, processors: None)
        return
    on_host: OnHost = request.getfixturevalue("built_cuda_on_host")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extension, "load_cuda", lambda: (on_host.kernels, ""))
        yield Device("cpu", on_host.arrange)
    on_host.arrange()


def placed(t: Tensor, layout: str, device: str) -> Tensor:
    """A copy of (B, ...) on a device, whose sequences are contiguous, inside memory filled with a number."""
    count = t[0].numel()
    gap, before = {"contiguous": (0, 0), "apart": (5, 0), "odd": (0, 1), "odd apart": (3, 2)}[layout]
    whole = torch.full((before + len(t) * (count + gap) + 9,), FILLER, dtype=t.dtype, device=device)
    strides = (count + gap, *torch.empty(t.shape[1:], device="meta").stride())
    return whole.as_strided(t.shape, strides, before).copy_(t)


def untouched(t: Tensor) -> bool:
    """Whether the memory around a tensor's elements still has its filling."""
    whole = torch.empty(0, dtype=t.dtype, device=t.device).set_(t.untyped_storage())
    around = torch.ones_like(whole, dtype=torch.bool)
    around.as_strided(t.shape, t.stride(), t.storage_offset()).fill_(False)
    return bool((whole[around] == FILLER).all())


def tuple_of(
    batch: int, sizes: list[tuple[int, ...]], dtype: torch.dtype, seed: int, scale: float = 1.0
) -> list:
    return [draw(batch, *size, seed=seed + i, scale=scale).to(dtype) for i, size in enumerate(sizes)]


def clones(tensors: list[Tensor]) -> list[Tensor]:
    return [t.double() for t in tensors]


SIZES = st.one_of(
    st.tuples(st.integers(0, 40), st.integers(1, 9)),
    st.sampled_from([(PIECE,), (PIECE - 1,), (PIECE + 3,), (3, PIECE), (2 * PIECE + 2045,), (64, 130)]),
)


@given(
    batch=st.integers(1, 3),
    sizes=st.lists(SIZES, min_size=1, max_size=4),
    dtype=st.sampled_from(DTYPES),
    copy_dtype=st.sampled_from([None, *DTYPES]),
    layout=st.sampled_from(["contiguous", "apart", "odd", "odd apart"]),
    max_norm=st.sampled_from([None, 0.5, 1e4]),
    active=st.lists(st.booleans(), min_size=3, max_size=3) | st.none(),
    order=st.sampled_from(ORDERS),
    processors=st.integers(1, 5),
    turned=st.booleans(),
)
def test_within_budget(
    device: Device,
    batch: int,
    sizes: list[tuple[int, ...]],
    dtype: torch.dtype,
    copy_dtype: torch.dtype | None,
    layout: str,
    max_norm: float | None,
    active: list[bool] | None,
    order: int,
    processors: int,
    turned: bool,
) -> None:
    """The new weights' error against float64 is at most twice that of the plain formulas at the same dtype."""
    device.arrange(order, processors)
    weights, grads = tuple_of(batch, sizes, dtype, 0), tuple_of(batch, sizes, dtype, 50)
    rate = torch.tensor(0.3, dtype=torch.float64)
    exact, plain = clones(weights), [w.clone() for w in weights]
    norm = reference.update_(exact, clones(grads), rate, max_norm, None, None)
    reference.update_(plain, grads, rate, max_norm, None, None)

    own = [placed(w, layout, device.name) for w in weights]
    given = [placed(g, layout, device.name) for g in grads]
    if turned:
        # Sequences whose elements are not in a row.
        given = [g.mT.contiguous().mT if g.dim() == 3 else g for g in given]
    copies = None
    if copy_dtype is not None:
        copies = [placed(torch.full(w.shape, -3.0, dtype=copy_dtype), layout, device.name) for w in weights]
    mask = None if active is None else torch.tensor(active[:batch])
    found = cuda.update_(
        own, given, rate, max_norm, copies, mask if mask is None else mask.to(device.name)
    ).cpu()

    assert found.dtype == torch.float32
    torch.testing.assert_close(found, norm.float(), rtol=1.3e-7, atol=0)
    assert all(untouched(t) for t in [*own, *(copies or [])])
    for i, weight in enumerate(weights):
        new = own[i].cpu()
        for b in range(batch):
            if mask is not None and not mask[b]:
                assert torch.equal(new[b], weight[b])
                assert copies is None or bool((copies[i][b] == -3).all())
                continue
            if weight[b].numel() and exact[i][b].norm() > 0:
                floor = 4.0 if dtype == torch.float32 else 0.5
                budget = 2 * relative_error(plain[i][b], exact[i][b]) + floor * torch.finfo(dtype).eps
                assert relative_error(new[b], exact[i][b]) <= budget
            if copies is not None:
                assert torch.equal(copies[i][b].cpu(), new[b].to(copy_dtype))


def stepped(
    device: Device,
    weights: list[Tensor],
    grads: list[Tensor],
    layout: str = "contiguous",
    max_norm: float = 1.0,
) -> list[Tensor]:
    """New weights and norm."""
    own = [placed(w, layout, device.name) for w in weights]
    given = [placed(g, layout, device.name) for g in grads]
    norm = cuda.update_(own, given, torch.tensor(0.3).double(), max_norm, None, None)
    return [*(w.cpu() for w in own), norm.cpu()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_depend_on_the_sequence_alone(device: Device, dtype: torch.dtype) -> None:
    """Not on the chip's size, the order of threads, where the sequence lies, or its neighbours."""
    sizes = [(3 * PIECE + 5,), (4, 33), (PIECE,)]
    weights, grads = tuple_of(3, sizes, dtype, 0), tuple_of(3, sizes, dtype, 9)
    device.arrange(0, 3)
    expected = stepped(device, weights, grads)
    for order, processors, layout in (
        (1, 1, "odd"),
        (2, 2, "apart"),
        (3, 64, "odd apart"),
        (0, 5, "contiguous"),
    ):
        device.arrange(order, processors)
        found = stepped(device, weights, grads, layout)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
        for b in range(3):
            alone = stepped(device, [w[b : b + 1] for w in weights], [g[b : b + 1] for g in grads], layout)
            assert all(torch.equal(a[0], e[b]) for a, e in zip(alone, expected, strict=True))


def test_many_tensors(device: Device) -> None:
    """More than one launch can be given."""
    device.arrange(2, 2)
    sizes = [(i % 7,) for i in range(100)]
    weights, grads = tuple_of(2, sizes, torch.float32, 0), tuple_of(2, sizes, torch.float32, 200)
    exact = clones(weights)
    norm = reference.update_(exact, clones(grads), torch.tensor(0.3).double(), 1.0, None, None)
    *new, found = stepped(device, weights, grads)
    torch.testing.assert_close(found, norm.float(), rtol=1.3e-7, atol=0)
    for w, e in zip(new, exact, strict=True):
        torch.testing.assert_close(w, e.float(), rtol=3e-7, atol=3e-7)


@pytest.mark.slow
def test_parts_of_several_pieces(device: Device) -> None:
    """So many elements that a part of the norm has two pieces of a tensor, the last of them not full."""
    device.arrange(0, 4)
    count = 2049 * PIECE + 77
    gradient = draw(1, count, seed=0).bfloat16()
    new, small, norm = stepped(device, [gradient, gradient[:, :3]], [gradient, gradient[:, :3]], max_norm=1e9)
    exact = torch.cat([gradient[0], gradient[0, :3]]).double().norm().float()
    torch.testing.assert_close(norm[0], exact, rtol=1.3e-7, atol=0)
    for own, g in ((new, gradient), (small, gradient[:, :3])):
        expected = (g.float() - torch.tensor(0.3) * g.float()).bfloat16()
        torch.testing.assert_close(own, expected, rtol=2**-7, atol=0)
        assert (own == expected).float().mean() > 0.99


@pytest.mark.parametrize("size", [1e30, 1e-30])
def test_squares_that_float32_cannot_hold(device: Device, size: float) -> None:
    gradient = torch.full((1, 9), size)
    new, norm = stepped(device, [torch.zeros(1, 9)], [gradient], max_norm=size)
    torch.testing.assert_close(norm, torch.tensor([3 * size]))
    torch.testing.assert_close(new, -0.3 * gradient / 3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_bad_gradients_show(device: Device, bad: float, max_norm: float | None) -> None:
    """As they do in the formulas: NaN in every weight of the sequence where it clips, and in no other sequence."""
    sizes = [(3,), (PIECE + 2,)]
    weights, grads = tuple_of(2, sizes, torch.float32, 0), tuple_of(2, sizes, torch.float32, 5)
    grads[0][0, 1] = bad
    expected, rate = [w.clone() for w in weights], torch.tensor(0.3).double()
    norm = reference.update_(expected, grads, rate, max_norm, None, None)
    own = [w.to(device.name) for w in weights]
    found = cuda.update_(own, [g.to(device.name) for g in grads], rate, max_norm, None, None)
    torch.testing.assert_close(found.cpu(), norm, equal_nan=True)
    for w, e in zip(own, expected, strict=True):
        torch.testing.assert_close(w.cpu(), e, equal_nan=True)
    assert own[1][1].isfinite().all()


def test_zero_gradients_and_nothing_at_all(device: Device) -> None:
    weights = [torch.ones(2, 5), torch.ones(2, 0)]
    *new, norm = stepped(device, weights, [torch.zeros_like(w) for w in weights])
    assert torch.equal(norm, torch.zeros(2))
    assert all(torch.equal(n, w) for n, w in zip(new, weights, strict=True))
    for shape, count in (((2, 0), 2), ((0, 3), 0)):
        empty = [torch.zeros(shape, device=device.name)]
        norm = cuda.update_(empty, empty, torch.tensor(0.3).double(), 1.0, None, None)
        assert torch.equal(norm.cpu(), torch.zeros(count))


def test_at_the_threshold_and_beside_it(device: Device) -> None:
    gradient = torch.tensor([[3.0, 4.0]])
    for max_norm, scale in ((5.0, 1.0), (5.0 + 1e-9, 1.0), (4.0, 0.8), (math.nextafter(5.0, 0.0), 1.0)):
        new, norm = stepped(device, [torch.zeros(1, 2)], [gradient], max_norm=max_norm)
        assert norm.item() == 5.0
        assert torch.equal(new, -(0.3 * torch.tensor(scale).double()).float() * gradient)


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES, torch.float8_e4m3fn], ids=str)
def test_lr_where_the_weights_are(
    device: Device, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is read there, not brought to the processor."""
    gradient, rate = draw(1, 20, seed=0).float(), torch.tensor(0.3).to(dtype)
    expected = -rate.double().float() * gradient
    weights = [torch.zeros(1, 20, device=device.name)]
    rate = rate.to(device.name)
    if device.name == "cpu":
        # A tensor that says it is elsewhere.
        rate = _Elsewhere(rate)
    cuda.update_(weights, [gradient.to(device.name)], rate, None, None, None)
    assert torch.equal(weights[0].cpu(), expected)


class _Elsewhere(Tensor):
    @staticmethod
    def __new__(cls, t: Tensor) -> "_Elsewhere":
        return torch.Tensor._make_subclass(cls, t)

    is_cpu = property(lambda self: False)

    def __float__(self) -> float:
        raise AssertionError("the device is waited for")


@pytest.mark.parametrize("stride", [1, 3])
def test_active_with_a_stride(device: Device, stride: int) -> None:
    mask = torch.ones(3, stride, dtype=torch.bool, device=device.name)
    mask[1, 0] = False
    weights = [torch.zeros(3, 4, device=device.name)]
    grads = [torch.ones(3, 4, device=device.name)]
    cuda.update_(weights, grads, torch.tensor(1.0).double(), None, None, mask[:, 0])
    assert torch.equal(weights[0].cpu(), torch.tensor([-1.0, 0.0, -1.0])[:, None].expand(3, 4))


def test_replayed_in_a_graph(device: Device) -> None:
    """With the weights and the rate that there are then; nothing waits or allocates while it is captured."""
    if device.name != "cuda":
        pytest.skip("CUDA graphs are a GPU's")
    weights, grads = [torch.zeros(2, PIECE + 1, device="cuda")], [torch.ones(2, PIECE + 1, device="cuda")]
    rate = torch.tensor(1.0, device="cuda")
    cuda.update_(weights, grads, rate, None, None, None)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        norm = cuda.update_(weights, grads, rate, None, None, None)
    grads[0].mul_(2)
    rate.fill_(0.5)
    for step in (2, 3):
        graph.replay()
        assert torch.equal(weights[0].cpu(), torch.full((2, PIECE + 1), -float(step)))
    torch.testing.assert_close(norm.cpu(), torch.full((2,), 2 * (PIECE + 1) ** 0.5))


def test_what_the_kernels_refuse() -> None:
    with pytest.raises(
        ValueError, match=r"update_: backend 'cuda' cannot serve this call: .*; what can: .*'cpu'"
    ):
        update_([torch.ones(1, 2)], [torch.ones(1, 2)], lr=1.0, backend="cuda")
    assert "is on cpu, and its kernels run on a GPU" in str(cuda.refuse((torch.ones(2),)))


def test_not_for_float64(device: Device) -> None:
    weights = [torch.ones(1, 2, dtype=torch.float64, device=device.name)]
    with pytest.raises(ValueError, match="clipped_sgd_update is not for double"):
        cuda.update_(weights, weights, torch.tensor(1.0).double(), None, None, None)
