"""Attention's Triton kernels with tangents against float64: interpreted, or on a GPU where there is one."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from dense_attention import dense
from harness import assert_within_budget, draw, relative_error
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_here import DEVICE, needs_triton

from ttt_kernels import triton_launch
from ttt_kernels.swa import jvp_operator, triton_configs

pytestmark = needs_triton
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Sizes = tuple[int, int, int, int, int, int]
"""B, Tq, Tk, Hq, Hk, D."""


def numbers(*values: int) -> Tensor:
    return torch.tensor(values, device=DEVICE)


def tensors(sizes: Sizes, key_start: int) -> list[Tensor]:
    """q, k, v and their tangents, those of keys and values from key_start on."""
    b, tq, tk, heads, kv_heads, d = sizes
    queries, keys, own = (b, tq, heads, d), (b, tk, kv_heads, d), (b, tk - key_start, kv_heads, d)
    shapes = (queries, keys, keys, queries, own, own)
    return [draw(*shape, seed=i).to(DEVICE) for i, shape in enumerate(shapes)]


def on(
    backend: str,
    *,
    key_start: int = 0,
    window: int | None = None,
    scale: float = 0.4,
    key_lengths: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> Callable[..., tuple[Any, ...]]:
    """Output and tangent as a function of q, k, v and their tangents."""

    def call(*given: Tensor) -> tuple[Any, ...]:
        arguments = (*given[:3], key_lengths, cu_seqlens, *given[3:], window, scale, key_start)
        return jvp_operator.forward(*arguments, backend=backend)[:2]

    return call


def within_budget(sizes: Sizes, dtype: torch.dtype, **options: Any) -> None:
    inputs = tensors(sizes, options.get("key_start", 0))
    assert_within_budget(lambda b: on(b, **options), inputs, dtype, "triton", highest=1)


# Tiles are 16 queries by 32 keys when interpreted, so that these have tiles of every kind before and from key_start on.
CASES: dict[str, tuple[Sizes, dict[str, Any]]] = {
    "causal": ((1, 40, 40, 1, 1, 8), {}),
    "groups": ((2, 18, 18, 4, 2, 5), {"window": 9}),
    "negative scale": ((1, 20, 20, 1, 1, 8), {"scale": -0.4}),
    "scale of zero": ((1, 20, 20, 1, 1, 8), {"scale": 0.0, "window": 9}),
    "the last keys": ((1, 40, 110, 1, 1, 8), {"window": 70, "key_start": 70}),
    "the last key": ((1, 20, 40, 2, 1, 8), {"key_start": 39}),
    "from the first tile on": ((1, 20, 70, 1, 1, 8), {"key_start": 5}),
    "from a tile on": ((1, 20, 100, 1, 1, 8), {"key_start": 64, "window": 60}),
    "small and everything": (
        (1, 19, 50, 2, 1, 20),
        {"window": 25, "key_lengths": (39,), "key_start": 30},
    ),
    "tangents before what is valid": ((2, 20, 40, 1, 1, 8), {"key_lengths": (9, 40), "key_start": 16}),
    "packed": ((1, 34, 34, 1, 1, 8), {"cu_seqlens": (0, 3, 3, 20, 33, 34), "window": 12}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_within_budget_in_float32(name: str) -> None:
    sizes, given_options = CASES[name]
    options = {k: numbers(*v) if isinstance(v, tuple) else v for k, v in given_options.items()}
    within_budget(sizes, torch.float32, **options)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_within_budget_in_16_bits(dtype: torch.dtype) -> None:
    within_budget((1, 18, 75, 1, 1, 24), dtype, window=50, key_lengths=numbers(71), key_start=45)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_heads_too_wide_for_one_launch(dtype: torch.dtype) -> None:
    """Results are summed in several launches, and by parts; 144 = 64 + 64 + 16."""
    within_budget((1, 9, 9, 1, 1, 144), dtype, key_start=4, scale=1 / 12)


@pytest.mark.slow
@pytest.mark.parametrize(("queries", "keys"), [(32, 16), (16, 16)])
def test_tiles_of_other_sizes(monkeypatch: pytest.MonkeyPatch, queries: int, keys: int) -> None:
    config = (triton_configs.config(queries, keys, 4, 1),)
    monkeypatch.setattr("ttt_kernels.swa.triton_launch.configs", lambda *_: config)
    within_budget((1, 19, 50, 2, 1, 8), torch.float32, window=25, key_start=30)


@pytest.mark.slow
@settings(max_examples=3, phases=[Phase.explicit, Phase.generate])
@given(data=st.data())
def test_within_budget_of_anything(data: st.DataObject) -> None:
    pick = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
    heads, kv_heads = pick((1, 1), (2, 1))
    b, tq, prefix, d = pick(1, 2), pick(1, 17, 33), pick(0, 1, 40), pick(2, 5, 16, 40)
    # All but the values' is zero where no query sees two keys.
    assume(tq + prefix // 2 > 1)
    options: dict[str, Any] = {"window": pick(None, 2, 31, 50), "key_start": pick(0, prefix // 2, prefix)}
    packing = pick("none", "lengths", "packed")
    if packing == "lengths":
        options["key_lengths"] = numbers(*[tq + prefix // 2, tq + prefix][:b])
    if packing == "packed":
        assume(b == 1 and prefix == 0)
        options["cu_seqlens"] = numbers(0, tq // 3, tq)
    within_budget((b, tq, tq + prefix, heads, kv_heads, d), pick(*DTYPES), **options)


def within_dense_budget(
    inputs: list[Tensor], dtype: torch.dtype, key_start: int, window: int | None, slack: float
) -> None:
    """Beside plain attention, which rounds every intermediate result; the formulas round less."""

    def plain(q: Tensor, k: Tensor, v: Tensor, q_dot: Tensor, *own: Tensor) -> tuple[Any, ...]:
        dots = (q_dot, *(torch.nn.functional.pad(t, (0, 0, 0, 0, key_start, 0)) for t in own))
        return torch.func.jvp(lambda *x: dense(*x, window=window, scale=0.4), (q, k, v), dots)

    options = {"key_start": key_start, "window": window}
    function = lambda name: plain if name == "reference" else on(name, **options)  # noqa: E731
    assert_within_budget(function, inputs, dtype, "triton", highest=1, slack=slack)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("which", [(1,), (1, 4), (2, 5)], ids=str)
def test_within_budget_where_tensors_have_a_mean(dtype: torch.dtype, which: tuple[int, ...]) -> None:
    """Then S' of a row have much in common, or O' is a small difference of large numbers."""
    inputs = [t + 10 * (i in which) for i, t in enumerate(tensors((1, 20, 110, 1, 1, 16), 70))]
    within_dense_budget(inputs, dtype, 70, 90, slack=3.0 if dtype == torch.float32 else 2.0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_within_budget_with_keys_of_huge_scores_and_no_weight(dtype: torch.dtype) -> None:
    """Their S', huge too, has no part in any result, though they are the first that are seen."""
    inputs = tensors((1, 2, 70, 1, 1, 16), 30)
    q, k, *_ = inputs
    q[..., 0], k[..., 0] = 4, 0.1 * k[..., 0]
    k[:, :35, :, 0] = -300
    within_dense_budget(inputs, dtype, 30, None, slack=2.0)


# -- Kernels called for themselves --------------------------------------------------------------------------


def arguments(key_start: int, missing: tuple[int, ...] = ()) -> tuple[list[Any], list[Any]]:
    """Inputs and parameters of the forward; the window and the length cut within tiles."""
    given = tensors((1, 19, 50, 2, 1, 8), key_start)
    dots = [None if i in missing else t.float() for i, t in enumerate(given[3:])]
    return [*(t.float() for t in given[:3]), numbers(39), None, *dots], [25, 0.4, key_start]


def results(backend: str, inputs: list[Any], params: list[Any], needs: Sequence[bool]) -> list[Tensor | None]:
    """Output, tangent and all gradients."""
    if backend == "reference":
        inputs = [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in inputs]
    kernels = jvp_operator.kernels[backend]
    found = kernels["forward"](*inputs, *params)
    d_outputs = [draw(*inputs[0].shape, seed=9 + i).to(inputs[0]) for i in range(2)]
    return [*found[:2], *kernels["backward"](*d_outputs, *inputs, *found, *params, needs)]


@pytest.mark.slow
@pytest.mark.parametrize("key_start", [0, 30])
@pytest.mark.parametrize("missing", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)])
def test_missing_tangents(missing: tuple[int, ...], key_start: int) -> None:
    given = arguments(key_start, missing)
    needs = [True] * 3 + [i not in missing for i in range(3)]
    for own, truth in zip(*(results(b, *given, needs) for b in ("triton", "reference")), strict=True):
        if truth is None:
            assert own is None
        elif truth.norm() > 0:
            assert relative_error(own, truth) < 2e-6
        else:
            assert own.abs().max() == 0


@pytest.mark.slow
def test_what_is_lost_to_rounding_is_kept_and_read() -> None:
    """Output and tangent are nearer with it, and count in the backward as they do with it."""
    given, params = arguments(30)
    given = [t.bfloat16() if isinstance(t, Tensor) and t.is_floating_point() else t for t in given]
    wide = [t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for t in given]
    kernels = jvp_operator.kernels["triton"]
    o, tangent, lse, o_rest, r, tangent_rest = kernels["forward"](*given, *params)
    truths = jvp_operator.kernels["reference"]["forward"](*wide, *params)
    for value, lost, truth in ((o, o_rest, truths[0]), (tangent, tangent_rest, truths[1])):
        # The products round P and P * S'.
        assert relative_error(value.double() + lost, truth) < 0.8 * relative_error(value, truth)
    d_outputs = [draw(*o.shape, seed=9 + i).to(o) for i in range(2)]
    zero = torch.zeros_like(o)
    found = [
        kernels["backward"](*d_outputs, *given, *saved, *params, [True] * 6)
        for saved in ((o, tangent, lse, zero, r, zero), (zero, zero, lse, o, r, tangent))
    ]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.slow
def test_without_tangents() -> None:
    inputs, params = arguments(0, (0, 1, 2))
    o, tangent, *_ = jvp_operator.kernels["triton"]["forward"](*inputs, *params)
    assert tangent.abs().max() == 0
    assert o.abs().max() > 0


@pytest.mark.slow
@pytest.mark.parametrize("key_start", [0, 30])
def test_only_what_is_needed(key_start: int) -> None:
    given = arguments(key_start)
    everything = results("triton", *given, [True] * 6)
    for i in range(6):
        one = results("triton", *given, [i == j for j in range(6)])[2:]
        assert [t is None for t in one] == [i != j for j in range(6)]
        assert torch.equal(one[i], everything[2 + i])


@pytest.mark.slow
def test_what_lies_before_the_tangents_is_not_read() -> None:
    given, params = arguments(30)
    expected = results("triton", given, params, [True] * 6)
    for i in (6, 7):
        before = torch.full_like(given[1][:, :30], float("nan"))
        given[i] = torch.cat([before, given[i]], 1)[:, 30:]
    found = results("triton", given, params, [True] * 6)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_queries_without_keys_and_what_lies_there(dtype: torch.dtype) -> None:
    """Invalid keys and their tangents may hold anything; a query that sees no other has results of zero."""
    inputs = [t.to(dtype) for t in tensors((2, 20, 40, 1, 1, 8), 10)]
    for i in (1, 2, 4, 5):
        invalid = 21 if i < 3 else 11
        inputs[i][0, :invalid] = float("nan")
        inputs[i][1] = float("inf")
    given = [*inputs[:3], numbers(19, 0), None, *inputs[3:]]
    found = results("triton", given, [None, 0.4, 10], [True] * 6)
    for t in found:
        assert t.isfinite().all()
        assert t[1].abs().max() == 0
        assert t[0].abs().max() > 0
    for i in (0, 1, 2, 5):
        assert found[i][0, 0].abs().max() == 0
    assert max(found[i][0, :21].abs().max() for i in (3, 4)) == 0
    assert max(found[i][0, :11].abs().max() for i in (6, 7)) == 0


@pytest.mark.parametrize("sizes", [(0, 3, 5, 2, 1, 4), (2, 0, 5, 2, 1, 4)])
def test_empty(sizes: Sizes) -> None:
    given = [t.float() for t in tensors(sizes, 2)]
    found = results("triton", [*given[:3], None, None, *given[3:]], [None, 0.4, 2], [True] * 6)
    assert [t.shape for t in found] == [given[i].shape for i in (0, 0, *range(6))]
    assert all(t.sum() == 0 for t in found)


# -- How much work is made ----------------------------------------------------------------------------------

ALL = ("t_kbar", "t_vbar", "t_dk", "t_dv")


@pytest.mark.parametrize(
    ("head_dim", "dtype", "key_start", "needs", "by_keys"),
    [
        (64, torch.bfloat16, 0, "111111", [ALL]),
        (64, torch.bfloat16, 3, "111111", [ALL[:2], ALL]),
        (80, torch.bfloat16, 3, "111111", [ALL[:2], ALL[::2], ALL[1::2]]),
        (64, torch.bfloat16, 3, "100100", []),
        (64, torch.bfloat16, 3, "000011", [ALL[2:]]),
        (64, torch.bfloat16, 3, "011000", [ALL[:2], ALL[:2]]),
        (128, torch.bfloat16, 3, "111111", [ALL[:2], ALL[:1], ALL[1:2], ALL[2:]]),
        (64, torch.float32, 3, "111111", [ALL[:1], ALL[1:2], *((name,) for name in ALL)]),
    ],
)
def test_launches(
    monkeypatch: pytest.MonkeyPatch,
    head_dim: int,
    dtype: torch.dtype,
    key_start: int,
    needs: str,
    by_keys: list[tuple[str, ...]],
) -> None:
    """One forward; backward one by queries, and by keys as few as registers allow, without tangents where none are."""
    made: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(
        triton_launch, "launch", lambda name, *rest: made.append((name.removeprefix("swa.jvp_"), rest[-1]))
    )
    given = [t.to(dtype) for t in tensors((1, 4, 7, 1, 1, head_dim), key_start)]
    results(
        "triton",
        [*given[:3], None, None, *given[3:]],
        [None, 0.4, key_start],
        [need == "1" for need in needs],
    )
    names = [name for name, _ in made]
    launches = [sizes for name, sizes in made if "keys" in name]
    before = ["keys_before" if sizes["t_b"] is None else "backward_keys" for sizes in launches]
    assert names == ["forward", "backward_queries", *before]
    assert [tuple(r for r in ALL if sizes[r] is not None) for sizes in launches] == by_keys
    for sizes in launches:
        assert (sizes["t_b"] is None) == (sizes["t_c"] is None) == (sizes["first"] < key_start)
        assert (sizes["first"], sizes["end"]) == ((0, key_start) if sizes["t_b"] is None else (key_start, 7))
