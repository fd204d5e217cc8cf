"""The rotation's Triton kernel, every order against float64: interpreted, or on a GPU where there is one."""

import math
from functools import partial

import pytest
import torch
from harness import assert_within_budget, draw
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from triton_here import DEVICE, needs_triton

from ttt_kernels import rope
from ttt_kernels.rope import operator
from ttt_kernels.rope.triton_configs import LARGEST

# test_every_operator.py has a fast test of every order.
pytestmark = [needs_triton, pytest.mark.slow]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = {
    "contiguous": lambda x: x,
    "heads of a product": lambda x: torch.cat([x, x], 2)[:, :, : x.shape[2]],
    "heads first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "strided elements": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "expanded": lambda x: x[:1].expand(x.shape),
}


def positions_for(x: Tensor, per_sequence: bool) -> Tensor:
    shape = x.shape[:2] if per_sequence else x.shape[1:2]
    generator = torch.Generator().manual_seed(x.shape[1])
    return torch.randint(0, 5_000_000, shape, generator=generator).to(DEVICE)


def on(backend: str, layout: str = "contiguous", per_sequence: bool = True, interleaved: bool = True):
    def turn(x: Tensor) -> Tensor:
        x = LAYOUTS[layout](x)
        return rope(x, positions_for(x, per_sequence), interleaved=interleaved, backend=backend)

    return turn


def inputs(*shape: int) -> list[Tensor]:
    return [draw(*shape, seed=1).to(DEVICE)]


# Interpreted tiles have 4 positions, and programs 2 heads.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("shape", [(2, 5, 3, 6), (1, 1, 1, 2), (1, 2, 2, 64)])
def test_within_budget(dtype: torch.dtype, interleaved: bool, shape: tuple[int, ...]) -> None:
    function = partial(on, per_sequence=shape[0] > 1, interleaved=interleaved)
    assert_within_budget(function, inputs(*shape), dtype, "triton")


# To find a smaller failing example takes minutes.
@settings(max_examples=8, phases=[Phase.explicit, Phase.generate])
@given(data=st.data())
def test_within_budget_of_anything(data: st.DataObject) -> None:
    pick = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
    dtype, layout = pick(*DTYPES), pick(*sorted(LAYOUTS))
    shape = (pick(1, 2), pick(1, 3, 9), pick(1, 2, 5), pick(2, 10, 16, 66))
    function = partial(on, layout=layout, per_sequence=pick(True, False), interleaved=pick(True, False))
    assert_within_budget(function, inputs(*shape), dtype, "triton")


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("position", [0, 1, 1000, 16_777_217, 90_000_001, 10_000_000_019])
def test_angles_far_out(position: int, sign: int) -> None:
    """(1, 0) turns to (cos, sin) of the exact angle, rounded to float32 and little more."""
    head_dim, theta = 64, 500_000.0
    x = torch.tensor([1.0, 0.0], device=DEVICE).repeat(head_dim // 2).reshape(1, 1, 1, head_dim)
    y = rope(x, torch.tensor([sign * position], device=DEVICE), theta=theta, backend="triton").flatten().cpu()
    bound = 1.2e-7 + 1e-15 * position
    for i in range(head_dim // 2):
        angle = sign * position * theta ** (-2 * i / head_dim)
        assert y[2 * i].item() == pytest.approx(math.cos(angle), abs=bound)
        assert y[2 * i + 1].item() == pytest.approx(math.sin(angle), abs=bound)


def test_every_quarter_of_a_turn() -> None:
    x = torch.tensor([1.0, 0.0], device=DEVICE).reshape(1, 1, 1, 2).expand(1, 64, 1, 2)
    positions = torch.arange(-32, 32, device=DEVICE)
    y = rope(x, positions, theta=1.0, backend="triton")[0, :, 0]
    exact = torch.stack([positions.double().cos(), positions.double().sin()], 1)
    assert (y.double() - exact).abs().max() < 1.2e-7


def test_positions_of_any_integer_type_and_layout() -> None:
    x = draw(2, 4, 1, 8, seed=0).float().to(DEVICE)
    expected = rope(x, torch.arange(4, device=DEVICE), backend="triton")
    for positions in (
        torch.arange(4, dtype=torch.int32),
        torch.arange(4, dtype=torch.uint8),
        torch.arange(8)[::2] // 2,
        torch.arange(0, 8)[::2].div(2, rounding_mode="floor").expand(2, 4),
        torch.arange(4)[:, None].expand(4, 2).T,
        torch.stack([torch.arange(4)] * 2, 1).T,
    ):
        assert torch.equal(rope(x, positions.to(DEVICE), backend="triton"), expected)
        assert torch.equal(rope(x, positions, backend="triton"), expected)


def arguments(dtype: torch.dtype = torch.float32) -> list:
    """Arguments of the backward."""
    x = draw(1, 3, 3, 6, seed=2).to(DEVICE, dtype)
    return [draw(*x.shape, seed=3).to(DEVICE, dtype), x, positions_for(x, False), 1e4, True]


def test_the_backward_turns_back() -> None:
    _, x, *rest = arguments()
    turned = operator.kernels["triton"]["forward"](x, *rest)[0]
    back = operator.kernels["triton"]["backward"](turned, x, *rest, [True])[0]
    torch.testing.assert_close(back, x)
    assert (turned - x).abs().max() > 0.1


@pytest.mark.parametrize("shape", [(0, 2, 1, 4), (1, 0, 1, 4), (1, 2, 0, 4)])
def test_empty(shape: tuple[int, ...]) -> None:
    x = torch.zeros(shape, device=DEVICE).requires_grad_()
    y = rope(x, torch.arange(shape[1], device=DEVICE), backend="triton")
    assert y.shape == shape
    assert torch.autograd.grad(y.sum(), x)[0].shape == shape


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(1, 1, 1, LARGEST + 2), f"head_dim is {LARGEST + 2}; accepted are up to {LARGEST}"),
        (torch.zeros(1, 1, 1, 4).double(), "dtype torch.float64; accepted are "),
    ],
)
def test_refuses(x: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=f"backend 'triton' cannot serve this call: .*{message}"):
        rope(x.to(DEVICE), torch.arange(1), backend="triton")
