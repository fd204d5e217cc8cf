"""The outer optimizer does what optax does: its formulas, written out in float64 numpy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from small_model import TINIER

from engine import TTTConfig, TTTModel
from engine.training.optimizer import EPS, OptimizerOptions, clip_, learning_rate, make_optimizer

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = OptimizerOptions(lr=3e-3, warmup_steps=2, decay_steps=5, init_lr=1e-3)

Array = NDArray[np.float64]


def optax_rate(o: OptimizerOptions, step: int) -> float:
    """join_schedules of linear_schedule and cosine_decay_schedule at the boundary `warmup_steps`."""
    fraction = 1 - min(step, o.warmup_steps) / o.warmup_steps if o.warmup_steps else 1.0
    linear = (o.init_lr - o.lr) * fraction + o.lr
    length = o.decay_steps - o.warmup_steps
    cosine = 0.5 * (1 + np.cos(np.pi * min(step - o.warmup_steps, length) / length))
    alpha = o.end_lr / o.lr
    return linear if step < o.warmup_steps else float(o.lr * ((1 - alpha) * cosine + alpha))


@given(
    warmup=st.integers(0, 50),
    length=st.integers(1, 100),
    step=st.integers(0, 200),
    init=st.sampled_from([0.0, 1e-4]),
    end=st.sampled_from([0.0, 1e-5]),
)
def test_learning_rate_is_that_of_optax(warmup: int, length: int, step: int, init: float, end: float) -> None:
    options = OptimizerOptions(
        lr=3e-3, warmup_steps=warmup, decay_steps=warmup + length, init_lr=init, end_lr=end
    )
    assert learning_rate(options, step) == pytest.approx(optax_rate(options, step), rel=1e-12, abs=1e-18)


def test_learning_rate_at_its_corners() -> None:
    options = OptimizerOptions(lr=1.0, warmup_steps=10, decay_steps=30, end_lr=0.5)
    assert [learning_rate(options, step) for step in (0, 5, 10, 20, 30, 1000)] == [0, 0.5, 1, 0.75, 0.5, 0.5]
    with pytest.raises(ValueError, match="step=-1"):
        learning_rate(options, -1)


@pytest.mark.parametrize("norm", [0.0, 0.5, 1.0, 40.0, math.inf, math.nan])
def test_clipping_is_that_of_optax(norm: float) -> None:
    parameters = [torch.nn.Parameter(torch.zeros(3, dtype=torch.float64)) for _ in range(3)]
    parameters[0].grad = torch.tensor([0.6 * norm, 0, 0], dtype=torch.float64)
    parameters[1].grad = torch.tensor([0, 0.8 * norm, 0], dtype=torch.float64)
    before = [p.grad.numpy().copy() for p in parameters[:2] if p.grad is not None]
    found = clip_(parameters, 1.0)
    assert found.shape == ()
    assert found.item() == pytest.approx(norm, nan_ok=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        expected = [g if norm < 1.0 else g / norm * 1.0 for g in before]
    for parameter, want in zip(parameters, expected, strict=False):
        assert parameter.grad is not None
        np.testing.assert_allclose(parameter.grad.numpy(), want, rtol=1e-15)
    assert parameters[2].grad is None


def test_clipped_gradients_have_the_bound_as_norm() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    parameter.grad = torch.tensor([3e-6, 4e-6], dtype=torch.float64)
    assert clip_([parameter], 1e-6).item() == pytest.approx(5e-6)
    # Dividing by the norm plus 1e-6, as torch does, would leave five sixths of this.
    assert parameter.grad.norm().item() == pytest.approx(1e-6, rel=1e-12)


def optax_adamw(
    p: Array, gradients: list[Array], rates: list[float], options: OptimizerOptions, decay: float
) -> Array:
    mu, nu = np.zeros_like(p), np.zeros_like(p)
    for count, (g, rate) in enumerate(zip(gradients, rates, strict=True), 1):
        mu = options.b1 * mu + (1 - options.b1) * g
        nu = options.b2 * nu + (1 - options.b2) * g**2
        update = mu / (1 - options.b1**count) / (np.sqrt(nu / (1 - options.b2**count)) + EPS)
        p = p - rate * (update + decay * p)
    return p


@pytest.mark.parametrize(("decay_embeddings", "tie"), [(True, True), (False, True), (False, False)])
def test_updates_are_those_of_optax(decay_embeddings: bool, tie: bool) -> None:
    options = OptimizerOptions(
        lr=3e-3, warmup_steps=2, decay_steps=5, init_lr=1e-3, decay_embeddings=decay_embeddings
    )
    model = TTTModel(
        TTTConfig.from_dict(TINIER.to_dict() | {"tie_embeddings": tie}), dtype=torch.float64, seed=1
    )
    optimizer = make_optimizer(model, options)
    start = {name: parameter.detach().numpy().copy() for name, parameter in model.named_parameters()}
    generator = torch.Generator().manual_seed(2)
    gradients: dict[str, list[Array]] = {name: [] for name in start}
    for step in range(4):
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
            gradients[name].append(parameter.grad.numpy().copy())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(options, step)
        optimizer.step()
    rates = [optax_rate(options, step) for step in range(4)]
    for name, parameter in model.named_parameters():
        decay = 0.1 if decay_embeddings or name != "embed.weight" else 0.0
        expected = optax_adamw(start[name], gradients[name], rates, options, decay)
        np.testing.assert_allclose(parameter.detach().numpy(), expected, rtol=1e-9, atol=1e-12, err_msg=name)


def test_starts_at_the_first_rate() -> None:
    optimizer = make_optimizer(TTTModel(TINIER), OPTIONS)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3]


def test_updates_are_seen_by_inference() -> None:
    model = TTTModel(TTTConfig.from_dict(TINIER.to_dict() | {"compute_dtype": "bfloat16"}))
    tokens = torch.arange(20)[None]
    first, before = model.fingerprint(), model.prefill(tokens, model.init_state()).logits
    optimizer = make_optimizer(model, OPTIONS)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert model.fingerprint() != first
    fresh = TTTModel(model.config)
    fresh.load_state_dict(model.state_dict())
    after = model.prefill(tokens, model.init_state()).logits
    assert torch.equal(after, fresh.prefill(tokens, fresh.init_state()).logits)
    assert not torch.equal(after, before)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("lr", 0.0),
        ("lr", "1e-3"),
        ("lr", math.nan),
        ("init_lr", -1e-3),
        ("end_lr", math.inf),
        ("b1", 1.0),
        ("b2", -0.1),
        ("clip", 0.0),
        ("weight_decay", -0.1),
        ("weight_decay", True),
        ("warmup_steps", -1),
        ("warmup_steps", 1.0),
        ("decay_steps", 2),
        ("decay_embeddings", 1),
    ],
)
def test_refuses_options(field: str, value: object) -> None:
    options: dict[str, Any] = {"lr": 1e-3, "warmup_steps": 2, "decay_steps": 5, field: value}
    with pytest.raises(ValueError, match=rf"{field}={value!r} is not accepted: it must be"):
        OptimizerOptions(**options)
