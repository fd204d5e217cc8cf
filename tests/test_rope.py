"""Rotary positions: every order on every backend, exactness far out, and the fused form with RMSNorm."""

import math

import pytest
import torch
from harness import BACKENDS, assert_within_budget, draw
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from ttt_kernels import rms_norm, rope, use_backend
from ttt_kernels.extension import cpu as extension
from ttt_kernels.rope import tables
from ttt_kernels.rope.fused import norm_rope_

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INSTRUCTION_SETS = extension.instruction_sets() if extension else []
LAYOUTS = {
    "contiguous": lambda x: x,
    "heads first": lambda x: x.transpose(1, 2),
    "sliced": lambda x: x[:, ::2, 1:],
    "batch last": lambda x: x.permute(1, 2, 0, 3),
    "strided elements": lambda x: x.repeat_interleave(2, dim=3)[..., ::2],
    "expanded": lambda x: x[:1].expand(3, *x.shape[1:]),
}


def positions_for(x: Tensor, per_sequence: bool) -> Tensor:
    shape = x.shape[:2] if per_sequence else x.shape[1:2]
    generator = torch.Generator().manual_seed(x.shape[1])
    return torch.randint(0, 5_000_000, shape, generator=generator)


def on(backend: str, layout: str = "contiguous", per_sequence: bool = True, interleaved: bool = True):
    def turn(x: Tensor) -> Tensor:
        x = LAYOUTS[layout](x)
        return rope(x, positions_for(x, per_sequence), interleaved=interleaved, backend=backend)

    return turn


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(2, 3)),
    head_dim=st.sampled_from([2, 4, 6, 16, 20, 40, 64, 66]),
    layout=st.sampled_from(sorted(LAYOUTS)),
    per_sequence=st.booleans(),
    interleaved=st.booleans(),
)
def test_within_budget(
    backend: str,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    head_dim: int,
    layout: str,
    per_sequence: bool,
    interleaved: bool,
) -> None:
    inputs = [draw(*shape, head_dim, seed=head_dim)]
    assert_within_budget(lambda name: on(name, layout, per_sequence, interleaved), inputs, dtype, backend)


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set(name: str, dtype: torch.dtype, interleaved: bool) -> None:
    before = extension.instruction_set()
    extension.choose_instruction_set(name)
    try:
        for head_dim in (2, 36, 64):
            inputs = [draw(2, 3, 2, head_dim, seed=head_dim)]
            assert_within_budget(lambda b: on(b, interleaved=interleaved), inputs, dtype, "cpu")
            x = inputs[0].to(dtype)
            found, expected = fused(x, "cpu", interleaved), fused(x.double(), "reference", interleaved)
            bound = 4 * torch.finfo(dtype).eps * float(expected.abs().max())
            torch.testing.assert_close(found.double(), expected, rtol=0, atol=bound)
    finally:
        extension.choose_instruction_set(before)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interleaved", [True, False])
def test_derivatives_in_float64(backend: str, interleaved: bool) -> None:
    x = draw(2, 3, 2, 6, seed=0).requires_grad_()
    assert gradcheck(on(backend, interleaved=interleaved), x)
    assert gradgradcheck(on(backend, interleaved=interleaved), x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("position", [1, 1000, 16_777_217, 90_000_001])
def test_angles_far_out(backend: str, position: int) -> None:
    """(1, 0) turns to (cos, sin) of the exact angle, which float32 misses by far."""
    head_dim, theta = 8, 500_000.0
    x = torch.tensor([1.0, 0.0]).repeat(head_dim // 2).reshape(1, 1, 1, head_dim)
    y = rope(x, torch.tensor([position]), theta=theta, backend=backend)
    for i in range(head_dim // 2):
        angle = position * theta ** (-2 * i / head_dim)
        assert y[0, 0, 0, 2 * i].item() == pytest.approx(math.cos(angle), abs=1e-6)
        assert y[0, 0, 0, 2 * i + 1].item() == pytest.approx(math.sin(angle), abs=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interleaved", [True, False])
def test_scores_depend_on_distance_only(backend: str, interleaved: bool) -> None:
    q, k = draw(1, 1, 1, 32, seed=0), draw(1, 1, 1, 32, seed=1)

    def score(at_q: int, at_k: int) -> Tensor:
        turned = [
            rope(x, torch.tensor([p]), interleaved=interleaved, backend=backend)
            for x, p in ((q, at_q), (k, at_k))
        ]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(107, 100), score(7, 0))
    torch.testing.assert_close(score(4_000_107, 4_000_100), score(7, 0), rtol=1e-6, atol=1e-6)
    assert (score(8, 0) - score(7, 0)).abs() > 1e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_halves_are_interleaved_pairs_reordered(backend: str) -> None:
    x = draw(2, 5, 3, 20, seed=0)
    order = torch.arange(20).reshape(2, 10).T.flatten()
    inverse = torch.argsort(order)
    halves = rope(x, torch.arange(5), interleaved=False, backend=backend)
    pairs = rope(x[..., order], torch.arange(5), interleaved=True, backend=backend)
    torch.testing.assert_close(halves, pairs[..., inverse])


@pytest.mark.parametrize("backend", BACKENDS)
def test_positions_of_any_integer_type(backend: str) -> None:
    x = draw(2, 4, 1, 8, seed=0)
    expected = rope(x, torch.arange(4), backend=backend)
    for dtype in (torch.int32, torch.int16, torch.uint8):
        assert torch.equal(rope(x, torch.arange(4, dtype=dtype), backend=backend), expected)
    strided = torch.arange(0, 8)[::2] // 2
    assert torch.equal(rope(x, strided, backend=backend), expected)
    assert torch.equal(rope(x, torch.arange(4).expand(2, 4), backend=backend), expected)


def test_tables_are_kept_by_content(monkeypatch: pytest.MonkeyPatch) -> None:
    positions = torch.arange(16)
    first = tables.tables(positions, 8, 1e4, torch.float32)
    assert tables.tables(positions.clone(), 8, 1e4, torch.float32) is first
    positions += 1
    moved = tables.tables(positions, 8, 1e4, torch.float32)
    torch.testing.assert_close(moved[0][0], first[0][1], rtol=0, atol=0)
    for other in ((4, 1e4, torch.float32), (8, 2e4, torch.float32), (8, 1e4, torch.float64)):
        assert tables.tables(positions, *other) is not moved
    monkeypatch.setattr(tables, "_LARGEST", 15)
    assert tables.tables(positions, 8, 1e4, torch.float32) is not moved


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-7), (torch.float64, 1e-8)], ids=str)
def test_angles_made_on_a_device_are_the_tables(dtype: torch.dtype, error: float) -> None:
    """Within the rounding of `dtype`, or of an angle of 10 million in float64."""
    positions = torch.tensor([0, 1, 1023, 10_000_019])
    expected = tables.tables(positions, 80, 500_000.0, dtype)
    for have, want in zip(tables._on_device(positions, 80, 500_000.0, dtype), expected, strict=True):
        assert have.dtype == dtype
        torch.testing.assert_close(have, want, atol=error, rtol=0)
    for have, want in zip(tables.angles(positions, 80, 500_000.0, dtype), expected, strict=True):
        assert torch.equal(have, want)


def fused(x: Tensor, backend: str, interleaved: bool = True) -> Tensor:
    weight = draw(x.shape[-1], seed=9).to(x.dtype)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    norm_rope_(x, weight, positions_for(x, True), interleaved=interleaved, out=out, backend=backend)
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(2, 3)),
    head_dim=st.sampled_from([2, 6, 16, 40, 66]),
    layout=st.sampled_from(sorted(LAYOUTS)),
    interleaved=st.booleans(),
    wide_weight=st.booleans(),
)
def test_fused_is_the_two_operators(
    backend: str,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    head_dim: int,
    layout: str,
    interleaved: bool,
    wide_weight: bool,
) -> None:
    """Into a slice of a larger cache, which stays as it was elsewhere."""
    x = LAYOUTS[layout](draw(*shape, head_dim, seed=1).to(dtype))
    weight = draw(head_dim, seed=2).to(dtype)
    weight = weight.float() if wide_weight and dtype in (torch.bfloat16, torch.float16) else weight
    positions = positions_for(x, True)
    b, t, h, d = x.shape
    cache = torch.full((b, h, t + 3, d), 7.0, dtype=dtype)
    out = cache[:, :, 1 : t + 1].transpose(1, 2)
    rstd = norm_rope_(
        x, weight, positions, eps=0.01, theta=1e4, interleaved=interleaved, out=out, backend=backend
    )
    exact = rms_norm(x.double(), weight.double(), eps=0.01)
    expected = rope(exact, positions, theta=1e4, interleaved=interleaved)
    bound = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), expected, rtol=bound, atol=bound * float(exact.abs().max()))
    exact_rstd = (x.double().square().mean(-1) + 0.01).rsqrt()
    assert rstd.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(rstd.double(), exact_rstd, rtol=1e-6, atol=0)
    assert (cache[:, :, 0] == 7).all()
    assert (cache[:, :, t + 1 :] == 7).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("interleaved", [True, False])
def test_fused_in_place(backend: str, interleaved: bool) -> None:
    x = draw(2, 3, 2, 20, seed=0).float()
    expected = fused(x, backend, interleaved)
    weight = draw(20, seed=9).float()
    norm_rope_(x, weight, positions_for(x, True), interleaved=interleaved, out=x, backend=backend)
    assert torch.equal(x, expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.ones(2, 3, 8)}, r"x has shape \(2, 3, 8\); accepted are \(B, T, H, D\)"),
        ({"x": torch.ones(2, 3, 1, 7)}, "x has shape .*even D"),
        ({"x": torch.ones(2, 3, 1, 8).int()}, "x .* torch.int32"),
        ({"positions": torch.arange(4)}, r"positions has shape \(4,\)"),
        ({"positions": torch.ones(3)}, "positions has dtype torch.float32"),
        ({"positions": torch.ones(3, dtype=torch.bool)}, "positions has dtype torch.bool"),
        ({"positions": [0, 1, 2]}, "positions must be an integer tensor, got list"),
        ({"theta": 0.0}, "theta is 0.0"),
        ({"theta": float("inf")}, "theta is inf"),
    ],
)
def test_refuses(changes: dict, message: str) -> None:
    arguments = {"x": torch.ones(2, 3, 1, 8), "positions": torch.arange(3), **changes}
    with pytest.raises(ValueError, match=f"rope: {message}"):
        rope(**arguments)
    out = torch.ones(arguments["x"].shape)
    with pytest.raises(ValueError, match=f"norm_rope_: {message}"):
        norm_rope_(weight=torch.ones(8), out=out, **arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight": torch.ones(6)}, r"weight has shape \(6,\)"),
        ({"weight": torch.ones(8).half()}, "weight .* torch.float16"),
        ({"out": torch.ones(2, 3, 1, 6)}, "out has shape"),
        ({"out": torch.ones(2, 3, 1, 8).double()}, "out has .* torch.float64"),
        ({"out": torch.ones(2, 3, 1, 16)[..., ::2]}, "out has .* stride 2"),
        ({"eps": -0.1}, "eps is -0.1"),
        ({"x": torch.ones(2, 3, 1, 8, requires_grad=True)}, "no gradient is recorded"),
        ({"backend": "triton"}, "'triton' cannot serve this call"),
    ],
)
def test_fused_refuses(changes: dict, message: str) -> None:
    arguments = {
        "x": torch.ones(2, 3, 1, 8),
        "weight": torch.ones(8),
        "positions": torch.arange(3),
        "out": torch.ones(2, 3, 1, 8),
        **changes,
    }
    with pytest.raises(ValueError, match=f"norm_rope_: .*{message}"):
        norm_rope_(**arguments)


def test_fused_follows_use_backend() -> None:
    x = draw(1, 2, 1, 4, seed=0).bfloat16()
    for backend in BACKENDS:
        with use_backend(backend):
            assert torch.equal(fused(x, None), fused(x, backend))
