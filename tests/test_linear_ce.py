"""Linear cross-entropy: every order, dtype, layout and instruction set against the formulas in float64."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ttt_kernels import linear_cross_entropy, linear_cross_entropy_jvp
from ttt_kernels.linear_ce import blocks, operator

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def floor(dtype: torch.dtype) -> float | None:
    """In float64 the plain formulas are the truth, but a single row's gradients cancel."""
    return 32.0 if dtype == torch.float64 else None


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 7 classes, so that small vocabularies have many, the last one short."""
    in_blocks_of(monkeypatch, 7)


def in_blocks_of(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    for module in ("blocks", "blockwise"):
        name = f"ttt_kernels.linear_ce.{module}.block_size"
        monkeypatch.setattr(name, lambda rows, classes, device: min(size, classes))


def problem(
    rows: int, d: int, classes: int, *, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight with logits of order one, and targets, of which about a fifth is ignored (-100)."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(classes, (rows,), generator=generator)
    target[torch.rand(rows, generator=generator) < 0.2] = -100
    target[0] = classes - 1
    return (
        draw(rows, d, seed=seed).to(dtype),
        draw(classes, d, seed=seed + 1, scale=d**-0.5).to(dtype),
        target,
    )


def losses(backend: str, **options: Any) -> Callable[..., Tensor]:
    return lambda x, w, t: linear_cross_entropy(x, w, t, reduction="none", backend=backend, **options)


def plain(x: Tensor, weight: Tensor, target: Tensor, reduction: str = "none") -> Tensor:
    """What torch computes with all logits at once, in float64."""
    return torch.nn.functional.cross_entropy(x.double() @ weight.double().t(), target, reduction=reduction)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.usefixtures("small_blocks")
@settings(max_examples=12)
@given(rows=st.integers(1, 9), d=st.integers(3, 24), classes=st.integers(2, 40))
def test_every_order_within_budget(backend: str, dtype: torch.dtype, rows: int, d: int, classes: int) -> None:
    inputs = problem(rows, d, classes)
    assert_within_budget(losses, inputs, dtype, backend, slack=3.0, floor=floor(dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("classes", [1, 6, 7, 8, 30])
@pytest.mark.usefixtures("small_blocks")
def test_agrees_with_torch(backend: str, reduction: str, classes: int) -> None:
    x, weight, target = problem(11, 5, classes)
    leaves = [t.requires_grad_() for t in (x, weight)]
    own = linear_cross_entropy(*leaves, target, reduction=reduction, backend=backend)
    truth = plain(*leaves, target, reduction)
    torch.testing.assert_close(own, truth)
    d = draw(*own.shape, seed=5)
    for o, e in zip(torch.autograd.grad(own, leaves, d), torch.autograd.grad(truth, leaves, d), strict=True):
        torch.testing.assert_close(o, e)


@pytest.mark.parametrize("backend", BACKENDS)
def test_real_block_sizes(backend: str) -> None:
    """A vocabulary of several blocks of the size that is used, and one that is no multiple of it."""
    for rows, classes in ((3, 8192 * 2 + 5), (700, 9001)):
        assert classes > 2 * blocks.block_size(rows, classes, torch.device("cpu"))
        x, weight, target = problem(rows, 8, classes, dtype=torch.float32)
        leaves = [t.requires_grad_() for t in (x, weight)]
        own = linear_cross_entropy(*leaves, target, backend=backend)
        truth = plain(*leaves, target, "mean")
        assert own.dtype == torch.float32
        torch.testing.assert_close(own.double(), truth, rtol=1e-6, atol=0.0)
        exact = torch.autograd.grad(truth, leaves)
        for o, e in zip(torch.autograd.grad(own, leaves), exact, strict=True):
            assert relative_error(o, e.double()) < 1e-5


@pytest.mark.parametrize("backend", BACKENDS)
def test_shapes_and_integer_targets(backend: str) -> None:
    x, weight, target = problem(12, 4, 9)
    for lead in ((12,), (3, 4), (2, 3, 2)):
        nll = linear_cross_entropy(
            x.reshape(*lead, 4), weight, target.reshape(lead).int(), reduction="none", backend=backend
        )
        torch.testing.assert_close(nll, plain(x, weight, target).reshape(lead))
    single = linear_cross_entropy(x[0], weight, target[0], reduction="none", backend=backend)
    torch.testing.assert_close(single, plain(x, weight, target)[0])
    empty = linear_cross_entropy(x[:0], weight, target[:0], backend=backend)
    assert empty == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("small_blocks")
def test_strides(backend: str) -> None:
    x, weight, target = problem(10, 6, 17)
    odd_x = torch.cat([x, x], 1)[:, 6:]
    odd_weight = weight.t().contiguous().t()
    odd_target = torch.stack([target, target], 1)[:, 0]
    leaves = [t.detach().requires_grad_() for t in (odd_x, odd_weight)]
    own = losses(backend)(*leaves, odd_target)
    torch.testing.assert_close(own, plain(x, weight, target))
    # An expanded cotangent, of stride 0.
    own_grads = torch.autograd.grad(own.sum(), leaves)
    same = [t.requires_grad_() for t in (x, weight)]
    for o, e in zip(own_grads, torch.autograd.grad(plain(*same, target).sum(), same), strict=True):
        torch.testing.assert_close(o, e)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_all_targets_ignored(backend: str, reduction: str) -> None:
    x, weight, _ = problem(5, 4, 9)
    leaves = [t.requires_grad_() for t in (x, weight)]
    loss = linear_cross_entropy(
        *leaves, torch.full((5,), 3), ignore_index=3, reduction=reduction, backend=backend
    )
    assert torch.equal(loss, torch.zeros_like(loss))
    first = torch.autograd.grad(loss.sum(), leaves, create_graph=True)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in first)
    second = torch.autograd.grad(sum(g.sum() for g in first), leaves)
    assert all(torch.equal(g, torch.zeros_like(g)) for g in second)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ignore_index", [-100, -1, 0, 4, 1000])
def test_ignored_rows_count_for_nothing(backend: str, ignore_index: int) -> None:
    x, weight, target = problem(9, 4, 6)
    target = target.masked_fill(target == -100, ignore_index)
    kept = target != ignore_index
    leaves = [t.requires_grad_() for t in (x, weight)]
    own = linear_cross_entropy(*leaves, target, ignore_index=ignore_index, backend=backend)
    few = linear_cross_entropy(leaves[0][kept], leaves[1], target[kept], ignore_index=-7, backend="reference")
    torch.testing.assert_close(own, few)
    for o, e in zip(torch.autograd.grad(own, leaves), torch.autograd.grad(few, leaves), strict=True):
        torch.testing.assert_close(o, e)
    for which in (True, False):
        nll, _, slope = operator.forward(
            x.detach(), weight.detach(), target, ignore_index, which, backend=backend
        )
        assert torch.equal(nll[~kept], torch.zeros_like(nll[~kept]))
        assert slope.shape == (x.shape if which else (0,))
    slope = operator.forward(x.detach(), weight.detach(), target, ignore_index, True, backend=backend)[2]
    assert torch.equal(slope[~kept], torch.zeros_like(slope[~kept]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.usefixtures("small_blocks")
def test_huge_logits_do_not_overflow(backend: str, sign: float) -> None:
    """Logits of 1e4 whose maximum moves from block to block, or is in the first."""
    x = torch.full((2, 1), 100.0)
    weight = torch.linspace(90.0, 100.0, 25)[:, None] * sign
    target = torch.tensor([3, 24])
    leaves = [t.requires_grad_() for t in (x, weight)]
    own = losses(backend)(*leaves, target)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    truth = plain(*wide, target)
    torch.testing.assert_close(own.double(), truth, rtol=1e-5, atol=1e-3)
    for o, e in zip(
        torch.autograd.grad(own.sum(), leaves), torch.autograd.grad(truth.sum(), wide), strict=True
    ):
        torch.testing.assert_close(o.double(), e, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("small_blocks")
def test_float32_weight_beside_a_half_precision_x(
    backend: str, native: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ttt_kernels.matmul.has_native", lambda d: native or d == torch.float32)
    x, weight, target = problem(10, 12, 30, dtype=torch.float32)
    x, weight = x.to(dtype).requires_grad_(), weight.requires_grad_()
    loss = linear_cross_entropy(x, weight, target, backend=backend)
    grads = torch.autograd.grad(loss, [x, weight])
    assert loss.dtype == torch.float32
    assert [g.dtype for g in grads] == [dtype, torch.float32]
    rounded = [x.detach().double().requires_grad_(), weight.detach().to(dtype).double().requires_grad_()]
    logits = rounded[0] @ rounded[1].t()
    if native:
        # Products of 16 bits have results of 16 bits.
        logits = logits + (logits.to(dtype) - logits).detach()
    truth = torch.nn.functional.cross_entropy(logits, target)
    torch.testing.assert_close(loss.double(), truth, rtol=1e-5, atol=0.0)
    for grad, exact in zip(grads, torch.autograd.grad(truth, rounded), strict=True):
        assert relative_error(grad, exact) < 2 * torch.finfo(dtype).eps


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [
            t.untyped_storage().nbytes() // t.element_size()
            for t in tree_leaves(out)
            if isinstance(t, Tensor)
        ]
        self.elements = max([self.elements, *sizes])
        return out


@contextmanager
def largest_tensor() -> Iterator[Largest]:
    with Largest() as mode:
        yield mode


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_no_order_holds_all_logits(backend: str) -> None:
    rows, classes, d = 256, 50_000, 4
    x, weight, target = problem(rows, d, classes, dtype=torch.float32)
    leaves = [t.requires_grad_() for t in (x, weight)]
    with largest_tensor() as seen:
        loss = linear_cross_entropy(*leaves, target, backend=backend)
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        torch.autograd.grad(sum(g.square().sum() for g in first), leaves)
    assert classes * d <= seen.elements < rows * classes // 4


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.usefixtures("small_blocks")
def test_jvp_twin(reduction: str) -> None:
    x, weight, target = problem(6, 3, 17)
    tangents = (draw(6, 3, seed=5), draw(17, 3, seed=6))

    def function(x: Tensor, w: Tensor) -> Tensor:
        return plain(x, w, target, reduction)

    own = linear_cross_entropy_jvp(x, weight, target, *tangents, reduction=reduction)
    torch.testing.assert_close(own, torch.func.jvp(function, (x, weight), tangents))
    zeros = tuple(torch.zeros_like(t) for t in tangents)
    own = linear_cross_entropy_jvp(x, weight, target, tangents[0], reduction=reduction)
    torch.testing.assert_close(own, torch.func.jvp(function, (x, weight), (tangents[0], zeros[1])))
    own = linear_cross_entropy_jvp(x, weight, target, None, tangents[1], reduction=reduction)
    torch.testing.assert_close(own, torch.func.jvp(function, (x, weight), (zeros[0], tangents[1])))
    assert linear_cross_entropy_jvp(x, weight, target)[1] == 0


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    with instruction_set(name):
        for size in (1, 5, 16, 67):
            in_blocks_of(monkeypatch, size)
            assert_within_budget(losses, problem(9, 11, 150), dtype, "cpu", slack=3.0, floor=floor(dtype))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("small_blocks")
def test_products_in_half_precision(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of processors with such instructions, which torch emulates on others."""
    monkeypatch.setattr("ttt_kernels.matmul.has_native", lambda _: True)
    assert_within_budget(losses, problem(9, 11, 30), dtype, "cpu", slack=3.0)
    x, weight, target = problem(9, 11, 30, dtype=dtype)
    found = linear_cross_entropy(x, weight.float(), target, backend="cpu")
    assert torch.equal(found, linear_cross_entropy(x, weight, target, backend="cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.usefixtures("small_blocks")
def test_a_certain_class_has_an_exact_slope(dtype: torch.dtype) -> None:
    """Of 1 - P, which is far below an epsilon, no digit is lost."""
    x, weight = torch.tensor([[1.0], [2.0]], dtype=dtype), torch.zeros(9, 1, dtype=dtype)
    weight[8] = 30.0
    target = torch.tensor([8, 8])
    x.requires_grad_()
    loss = linear_cross_entropy(x, weight, target, reduction="none", backend="cpu")
    (dx,) = torch.autograd.grad(loss.sum(), x)
    others = 8 * torch.exp(-torch.tensor([30.0, 60.0], dtype=torch.float64))
    torch.testing.assert_close(dx[:, 0].double(), -30 * others, rtol=1e-5, atol=0.0)


def test_rows_beside_infinite_and_tiny_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """A last block that is not full, of logits far below zero: nothing behind its end counts."""
    in_blocks_of(monkeypatch, 5)
    x = torch.full((2, 1), -1000.0).requires_grad_()
    weight = torch.linspace(1.0, 1.1, 8)[:, None].requires_grad_()
    target = torch.tensor([0, 7])
    first = torch.autograd.grad(
        linear_cross_entropy(x, weight, target, reduction="none", backend="cpu"),
        (x, weight),
        torch.ones(2),
        create_graph=True,
    )
    second = torch.autograd.grad(first, (x, weight), (torch.ones_like(x), torch.ones_like(weight)))
    assert all(t.isfinite().all() for t in (*first, *second))


def good() -> dict[str, Any]:
    return dict(zip(("x", "weight", "target"), problem(4, 3, 6), strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(4, 3, dtype=torch.int64)}, "x of shape .4, 3. has dtype torch.int64"),
        ({"x": torch.tensor(1.0, dtype=torch.float64)}, r"weight has shape \(6, 3\)"),
        ({"x": torch.ones(4, 2, dtype=torch.float64)}, r"weight has shape \(6, 3\); accepted is \(V, d\)"),
        ({"weight": torch.ones(3, dtype=torch.float64)}, r"weight has shape \(3,\)"),
        ({"weight": torch.ones(0, 3, dtype=torch.float64)}, r"weight has shape \(0, 3\)"),
        ({"weight": torch.ones(6, 3)}, "weight of shape .6, 3. has dtype torch.float32"),
        ({"weight": None}, "weight must be a tensor, got NoneType"),
        ({"target": torch.zeros(4)}, "target has dtype torch.float32"),
        ({"target": [0, 1, 2, 3]}, "target has list"),
        ({"target": torch.zeros(5, dtype=torch.int64)}, r"target has shape \(5,\); accepted is .* \(4,\)"),
        ({"target": torch.zeros(4, dtype=torch.int64, device="meta")}, "target is on meta"),
        ({"reduction": "average"}, "reduction is 'average'"),
    ],
)
def test_unsuitable_arguments(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"linear_cross_entropy: {message}"):
        linear_cross_entropy(**{**good(), **change})
    with pytest.raises(ValueError, match=f"linear_cross_entropy_jvp: {message}"):
        linear_cross_entropy_jvp(**{**good(), **change})


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [6, -1, 10**12])
def test_a_target_outside_the_vocabulary(backend: str, bad: int) -> None:
    arguments = good()
    arguments["target"][2] = bad
    with pytest.raises(ValueError, match=f"target holds {bad}; accepted are the classes 0 to 5"):
        linear_cross_entropy(**arguments, backend=backend)
    compiled = torch.compile(losses(backend), fullgraph=True, backend="aot_eager")
    if backend == "cpu":
        with pytest.raises(ValueError, match=f"target holds {bad}"):
            compiled(*arguments.values())
    else:
        assert compiled(*arguments.values()).isnan().tolist() == [False, False, True, False]
    with pytest.raises(ValueError, match=f"target holds {bad}"):
        linear_cross_entropy_jvp(**arguments)


def test_unsuitable_tangents_and_backends() -> None:
    with pytest.raises(ValueError, match=r"x_dot has shape \(3, 3\)"):
        linear_cross_entropy_jvp(**good(), x_dot=torch.ones(3, 3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"weight_dot has shape \(6, 3\), torch.float32"):
        linear_cross_entropy_jvp(**good(), weight_dot=torch.ones(6, 3))
    with pytest.raises(ValueError, match="linear_ce_jvp: backend 'cuda' cannot serve this call"):
        linear_cross_entropy_jvp(**good(), backend="cuda")
    with pytest.raises(ValueError, match="backend 'cuda' cannot serve this call"):
        linear_cross_entropy(**good(), backend="cuda")
