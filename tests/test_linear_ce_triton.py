"""Cross-entropy's Triton kernels, every order against float64: interpreted, or on a GPU where there is one."""

from collections.abc import Callable

import pytest
import torch
from harness import assert_within_budget, draw, relative_error
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_here import DEVICE, needs_triton

from ttt_kernels import linear_cross_entropy, linear_cross_entropy_jvp
from ttt_kernels.linear_ce import operator, triton
from ttt_kernels.linear_ce.blockwise import Block

# test_every_operator.py has a fast test of every order.
pytestmark = [needs_triton, pytest.mark.slow]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
IGNORED = -100


def of_size(monkeypatch: pytest.MonkeyPatch, classes: int) -> None:
    """Blocks of so many classes; when interpreted, a piece of a row has 16 logits."""
    for module in ("blocks", "blockwise"):
        monkeypatch.setattr(
            f"ttt_kernels.linear_ce.{module}.block_size", lambda rows, all_, device: min(classes, all_)
        )


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    of_size(monkeypatch, 20)


def losses(backend: str) -> Callable[..., Tensor]:
    return lambda x, w, t: linear_cross_entropy(x, w, t, reduction="none", backend=backend)


def problem(rows: int, d: int, classes: int) -> list[Tensor]:
    """x, weight with logits of order one, and targets: the last class, the first, an ignored one, any others."""
    target = torch.arange(rows) * 7 % classes
    target[:3] = torch.tensor([classes - 1, 0, IGNORED])[:rows]
    x, weight = draw(rows, d, seed=1), draw(classes, d, seed=2, scale=d**-0.5)
    return [x.to(DEVICE), weight.to(DEVICE), target.to(DEVICE)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_within_budget(dtype: torch.dtype) -> None:
    """The second block, of 3 classes, is shorter than a piece of a row, the first longer."""
    assert_within_budget(losses, problem(4, 5, 23), dtype, "triton")


# To find a smaller failing example takes minutes.
@settings(max_examples=4, phases=[Phase.explicit, Phase.generate])
@given(data=st.data())
def test_within_budget_of_anything(data: st.DataObject) -> None:
    pick = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
    dtype, block = pick(*DTYPES), pick(7, 16, 33)
    with pytest.MonkeyPatch.context() as monkeypatch:
        of_size(monkeypatch, block)
        assert_within_budget(losses, problem(pick(1, 2, 5), pick(3, 17), pick(2, 16, 40)), dtype, "triton")


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_products_in_half_precision(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits, and what is written over them, have 16 bits on processors that multiply such."""
    monkeypatch.setattr("ttt_kernels.matmul.has_native", lambda _: True)
    # Where the formulas round a logit once, sums of rounded weights replace float32 ones.
    assert_within_budget(losses, problem(4, 5, 23), dtype, "triton", slack=3.0)


# -- Passes called for themselves ---------------------------------------------------------------------------


def block(factor: torch.dtype | None) -> tuple[Block, Tensor, Tensor]:
    """Classes 40 to 76 with float32 logits, as a GPU has them, and factors of their own or in their place.

    Beside it the targets and the lse; of the targets only the second is in the block.
    """
    logits = draw(3, 37, seed=1).float().to(DEVICE)
    own = torch.tensor([3, 58, -1], device=DEVICE)
    apart = logits if factor is None else torch.empty(3, 37, dtype=factor, device=DEVICE)
    return Block(slice(40, 77), logits, logits, apart), own, torch.logsumexp(logits.double(), 1) + 0.5


def one_hot() -> Tensor:
    y = torch.zeros(3, 37, dtype=torch.float64, device=DEVICE)
    y[1, 18] = 1
    return y


FACTORS = (None, torch.float32, torch.bfloat16)


@pytest.mark.parametrize("factor", FACTORS, ids=str)
def test_online(factor: torch.dtype | None) -> None:
    """The maximum of the first row grows, that of the second stays, the third has none yet."""
    some, own, _ = block(factor)
    logits = some.logits.double()
    before = torch.tensor([-1.0, 9.0, -torch.inf], device=DEVICE)
    sums, others = torch.tensor([[3.0, 2.0, 0.0], [2.5, 1.5, 0.0]], device=DEVICE)
    maximum, picked = before.clone(), torch.zeros(3, device=DEVICE)
    acc = draw(3, 21, seed=4).float().to(DEVICE)
    acc[2] = 0
    top = torch.maximum(before.double(), logits.amax(1))
    decay = (before - top).exp()
    p = (logits - top[:, None]).exp()
    expected = (
        top, sums * decay + p.sum(1), others * decay + (p * (1 - one_hot())).sum(1), acc * decay[:, None],
        (p * (1 - one_hot())), logits[1, 18],
    )  # fmt: skip
    triton._Passes().online(some, own, maximum, sums, others, picked, acc)
    found = (maximum, sums, others, acc, some.factor, picked[1])
    for f, e in zip(found, expected, strict=True):
        limit = 4e-3 if f is some.factor and factor == torch.bfloat16 else 1e-6
        assert relative_error(f, e) < limit
    assert some.factor[1, 18] == 0
    assert picked[0] == picked[2] == 0


def test_online_leaves_the_logits_where_nothing_is_summed() -> None:
    some, own, _ = block(None)
    before = some.logits.clone()
    statistics = [torch.zeros(3, device=DEVICE) for _ in range(4)]
    triton._Passes().online(some, own, *statistics, None)
    assert torch.equal(some.logits, before)


def test_logits_of_minus_infinity() -> None:
    """A row that has only those so far has no sum, and one that has some loses nothing."""
    some, own, _ = block(None)
    some.logits[0] = -torch.inf
    some.logits[1, :30] = -torch.inf
    maximum = torch.full((3,), -torch.inf, device=DEVICE)
    sums, others, picked = (torch.zeros(3, device=DEVICE) for _ in range(3))
    expected = torch.logsumexp(some.logits.double(), 1)
    triton._Passes().online(some, own, maximum, sums, others, picked, torch.zeros(3, 5, device=DEVICE))
    torch.testing.assert_close(maximum + sums.log(), expected.float())
    assert maximum[0] == -torch.inf
    assert picked[1] == -torch.inf


@pytest.mark.parametrize("factor", FACTORS, ids=str)
def test_d_logits(factor: torch.dtype | None) -> None:
    some, own, lse = block(factor)
    d = torch.tensor([0.5, -2.0, 3.0], device=DEVICE)
    expected = d[:, None] * ((some.logits.double() - lse[:, None]).exp() - one_hot())
    triton._Passes().d_logits(some, own, lse.float(), d)
    assert relative_error(some.factor, expected) < (4e-3 if factor == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("gap", [-30.0, -1.0, -0.36, -0.34, -0.1, -1e-3, -1e-6, 0.0, 1e-7])
def test_a_certain_target_does_not_cancel(gap: float) -> None:
    """P - 1 of a target that nearly has the whole probability, to the last bits."""
    some, own, _ = block(None)
    lse = torch.zeros(3, device=DEVICE)
    some.logits[1, 18] = gap
    exact = torch.expm1(some.logits[1, 18].double())
    triton._Passes().d_logits(some, own, lse, torch.ones(3, device=DEVICE))
    torch.testing.assert_close(some.factor[1, 18].double(), exact, rtol=4e-7, atol=0.0)


@pytest.mark.parametrize("factor", FACTORS, ids=str)
def test_second(factor: torch.dtype | None) -> None:
    some, own, lse = block(factor)
    along, _, _ = block(factor)
    along.logits.copy_(draw(3, 37, seed=8))
    mean = torch.tensor([1.0, 2.0, 3.0], device=DEVICE)
    p, tangent = (some.logits.double() - lse[:, None]).exp(), along.logits.double()
    d = torch.tensor([0.5, -2.0, 3.0], device=DEVICE)
    expected = (d[:, None] * (p - one_hot()), d[:, None] * p * (tangent - mean.double()[:, None]))
    triton._Passes().second(some, along, own, lse.float(), mean, d)
    for f, e in zip((some.factor, along.factor), expected, strict=True):
        assert relative_error(f, e) < (4e-3 if factor == torch.bfloat16 else 1e-6)


# -- Orders called for themselves ---------------------------------------------------------------------------


def assert_close(order: str, given: list, needs: list[bool]) -> None:
    wide = [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in given]
    own = operator.kernels["triton"][order](*given, needs)
    for o, e, need in zip(own, operator.kernels["reference"][order](*wide, needs), needs, strict=True):
        assert (o is not None) == need
        if need:
            assert e.norm() > 0
            assert relative_error(o, e) < 2e-6


def test_huge_logits_whose_maximum_moves() -> None:
    x = torch.full((2, 1), 100.0, device=DEVICE)
    weight = torch.linspace(90.0, 100.0, 25, device=DEVICE)[:, None]
    leaves = [x.requires_grad_(), weight.requires_grad_()]
    target = torch.tensor([3, 24], device=DEVICE)
    own = losses("triton")(*leaves, target)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    truth = torch.nn.functional.cross_entropy(wide[0] @ wide[1].t(), target, reduction="none")
    torch.testing.assert_close(own.double(), truth, rtol=1e-5, atol=1e-3)
    exact = torch.autograd.grad(truth.sum(), wide)
    for o, e in zip(torch.autograd.grad(own.sum(), leaves), exact, strict=True):
        torch.testing.assert_close(o.double(), e, rtol=1e-3, atol=1e-2)


def test_no_rows() -> None:
    x, weight, target = (t[:0] if i != 1 else t.float() for i, t in enumerate(problem(2, 4, 9)))
    leaves = [x.float().requires_grad_(), weight.requires_grad_()]
    loss = linear_cross_entropy(*leaves, target, backend="triton")
    assert loss == 0
    assert all(g.abs().sum() == 0 for g in torch.autograd.grad(loss, leaves))


# -- The registered operators and the choice of the backend -------------------------------------------------


@pytest.mark.parametrize("bad", [23, -1, 10**12])
def test_a_target_outside_the_vocabulary(bad: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Raises; and where nobody could look at it, its loss is NaN and the others are right."""
    x, weight, target = (t.float() if t.is_floating_point() else t for t in problem(3, 4, 23))
    expected = losses("triton")(x, weight, target)
    target[1] = bad
    for function in (linear_cross_entropy, linear_cross_entropy_jvp):
        with pytest.raises(ValueError, match=f"target holds {bad}; accepted are the classes 0 to 22"):
            function(x, weight, target, backend="triton")
    monkeypatch.setattr("ttt_kernels.linear_ce.targets.check", lambda *_: None)
    found = losses("triton")(x, weight, target)
    assert found.isnan().tolist() == [False, True, False]
    assert torch.equal(found[::2], expected[::2])


def test_refuses() -> None:
    with pytest.raises(ValueError, match=r"dtype torch.float64; accepted are .*; what can: .*'reference'"):
        linear_cross_entropy(*problem(2, 4, 9), backend="triton")
