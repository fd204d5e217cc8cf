"""The next token from its logits."""

import pytest
import torch

from engine.sampling import FEW, sample


def draws(logits: torch.Tensor, count: int = 4000, **settings: object) -> torch.Tensor:
    """How often each token is drawn, as a share."""
    generator = torch.Generator().manual_seed(1)
    rows = logits.expand(count, -1)
    tokens = sample(rows, generator=generator, **settings)
    return torch.bincount(tokens, minlength=logits.shape[-1]) / count


def test_temperature_zero_takes_the_likeliest_token() -> None:
    logits = torch.tensor([[0.1, 3.0, 2.9], [5.0, -1.0, 4.9]], dtype=torch.bfloat16)
    token = sample(logits, temperature=0)
    assert token.tolist() == [1, 0]
    assert token.dtype == torch.int64


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax_at_the_temperature(temperature: float) -> None:
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    expected = (logits / temperature).softmax(-1)
    # Five standard deviations of a share of 4000 draws.
    assert (draws(logits, temperature=temperature) - expected).abs().max() < 5 * 0.5 / 4000**0.5


def test_a_tiny_temperature_is_greedy_and_finite() -> None:
    logits = torch.tensor([[80.0, 79.0, -80.0]])
    assert sample(logits, temperature=1e-30).tolist() == [0]


def test_top_k_keeps_the_k_likeliest_in_proportion() -> None:
    logits = torch.tensor([0.0, 3.0, 1.0, 2.0])
    shares = draws(logits, top_k=2)
    expected = torch.tensor([3.0, 2.0]).softmax(-1)
    assert shares[[0, 2]].sum() == 0
    assert (shares[[1, 3]] - expected).abs().max() < 0.04


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.1, {0}), (0.5, {0}), (0.51, {0, 1}), (0.75, {0, 1}), (0.8, {0, 1, 2}), (1.0, set(range(4)))],
)
def test_top_p_keeps_the_smallest_set_that_holds_the_mass(top_p: float, kept: set[int]) -> None:
    logits = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()
    shares = draws(logits, top_p=top_p)
    assert set(shares.nonzero().flatten().tolist()) == kept


def test_top_p_is_of_what_top_k_kept() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    # Of the first two, the first holds 4/7.
    assert set(draws(logits, top_k=2, top_p=0.55).nonzero().flatten().tolist()) == {0}
    assert set(draws(logits, top_k=2, top_p=0.6).nonzero().flatten().tolist()) == {0, 1}


def test_a_nucleus_wider_than_the_shortcut_is_whole() -> None:
    logits = torch.zeros(4 * FEW)
    # 3000 draws of nine tenths of 4096 tokens meet about 2050 of them.
    assert (draws(logits, count=3000, top_p=0.9) > 0).sum() > 1.5 * FEW
    logits[7] = 30.0
    assert draws(logits, count=10, top_p=0.9)[7] == 1


def test_rows_are_drawn_each_from_its_own() -> None:
    logits = torch.full((3, 5), -100.0)
    logits[[0, 1, 2], [4, 0, 2]] = 0.0
    assert sample(logits, top_k=3, top_p=0.9).tolist() == [4, 0, 2]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        sample(torch.zeros(1, 4), **settings)


def test_logits_of_a_wrong_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"logits of shape \(4,\)"):
        sample(torch.zeros(4))
