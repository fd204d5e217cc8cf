"""The gradient through the inner loop: the same by every method, and that of the loss itself."""

from typing import Any

import pytest
import torch
from harness import BACKENDS, draw, relative_error
from hypothesis import given
from hypothesis import strategies as st
from small_model import CONFIG, model, stream
from torch import Tensor

from engine import TTTModel
from engine.loss import loss

SIZE = CONFIG.mini_batch_size
SWEEPS: tuple[dict[str, Any], ...] = (
    {"method": "snapshots", "snapshot_every": 1},
    {"method": "snapshots", "snapshot_every": 2},
    {"method": "rollback"},
)
WAYS = ({"method": "graph"}, *SWEEPS)


def wide(**overrides: Any) -> TTTModel:
    """A small model in float64, whose gradients are clipped in some steps and not in others."""
    m = model(compute_dtype="float64", **{"inner_clip": 2.5, "inner_lr": 0.3} | overrides).double()
    assert m.blocks[-1].fast_gate.dtype == torch.float64
    return m


def gradients(m: TTTModel, tokens: Tensor, **options: Any) -> dict[str, Tensor]:
    """Of a loss in which every result has a weight of its own: the mean, each token's, the last fast weights."""
    m.zero_grad()
    out = loss(m, tokens, **options)
    total = out.loss + (out.nll * draw(*out.nll.shape, seed=1).to(out.nll.dtype)).mean()
    for i, t in enumerate(t for block in out.fast for t in block):
        total = total + (t * draw(*t.shape, seed=2 + i).to(t.dtype)).mean()
    total.backward()
    return {name: p.grad.clone() for name, p in m.named_parameters() if p.grad is not None}


def flattened(value: Any) -> Tensor:
    """All numbers of a tensor, or of tensors in tuples and lists."""
    return value.flatten() if isinstance(value, Tensor) else torch.cat([flattened(v) for v in value])


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert set(found) == set(expected)
    for name, g in expected.items():
        assert g.norm() > 0, f"{name}: nothing to compare with"
        assert relative_error(found[name], g.double()) < tolerance, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", SWEEPS, ids=str)
@pytest.mark.parametrize("clip", [0.0, 1e-3, 2.5])
def test_sweeps_equal_the_graph(options: dict[str, Any], backend: str, clip: float) -> None:
    m, tokens = wide(inner_clip=clip), stream(5 * SIZE + 1, batch=2)
    expected = gradients(m, tokens, backend="reference", method="graph")
    assert_same(gradients(m, tokens, backend=backend, **options), expected, 1e-9)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", SWEEPS, ids=str)
@pytest.mark.parametrize("clip", [0.0, 2.5])
def test_a_loss_of_one_fast_matrix(options: dict[str, Any], backend: str, clip: float) -> None:
    """The others, and all nll, then have no cotangent."""
    m, tokens = wide(inner_clip=clip, suffix_layers=2), stream(2 * SIZE + 1)

    def found(**given: Any) -> list[Tensor]:
        m.zero_grad()
        loss(m, tokens, **given).fast[0][1].square().sum().backward()
        return [b.fast_up.grad.clone() for b in m.blocks if b.has_fast]

    expected = found(backend="reference", method="graph")
    for g, e in zip(found(backend=backend, **options), expected, strict=True):
        assert relative_error(g, e) < 1e-9


def of_16_bit_weights() -> tuple[TTTModel, TTTModel]:
    """A model whose matrices are stored in bfloat16, and one of the same numbers in float32; both compute in that."""
    config = model(inner_clip=2.5, inner_lr=0.3).config
    short, long = TTTModel(config, dtype=torch.bfloat16), TTTModel(config)
    with torch.no_grad():
        for p, q in zip(short.parameters(), long.parameters(), strict=True):
            q.copy_(p.mul_(10) if p.ndim > 1 else p)
    return short, long


def assert_rounded_once(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Every matrix' gradient but the embedding's, of which torch sums what its tokens have."""
    for name, e in expected.items():
        if ".w_" in name:
            assert found[name].dtype == torch.bfloat16
            error = (found[name].float() - e).abs()
            assert (error <= 2**-8 * e.abs() + 1e-5 * e.abs().max()).all(), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_cotangents_of_16_bit_weights(backend: str) -> None:
    """Are summed in float32 over all mini-batches and slabs."""
    short, long = of_16_bit_weights()
    tokens = stream(24 * SIZE + 1)
    found, expected = (gradients(m, tokens, backend=backend) for m in (short, long))
    assert_rounded_once(found, expected)


def test_some_steps_clip_and_some_do_not() -> None:
    norms = loss(wide(), stream(5 * SIZE + 1, batch=2)).inner_norms
    assert (norms > 2.5).any()
    assert (norms < 2.5).any()


@pytest.fixture(scope="module")
def differences() -> dict[str, Tensor]:
    """The slope of the loss along a random direction for every parameter, by central differences in float64."""
    m, tokens = wide(), stream(3 * SIZE + 1, batch=2)
    slopes = {}
    for name, p in m.named_parameters():
        direction = draw(*p.shape, seed=len(name))
        step = 1e-5 * p.norm() / direction.norm()
        ends = []
        for sign in (1, -2, 1):
            with torch.no_grad():
                p.add_(sign * step * direction)
                ends.append(m.loss(tokens).loss)
        slopes[name] = (ends[0] - ends[1]) / (2 * step)
    return slopes


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", WAYS, ids=str)
def test_finite_differences(options: dict[str, Any], backend: str, differences: dict[str, Tensor]) -> None:
    m = wide()
    m.loss(stream(3 * SIZE + 1, batch=2), backend=backend, **options).loss.backward()
    for name, p in m.named_parameters():
        direction = draw(*p.shape, seed=len(name))
        assert p.grad is not None
        scale = p.grad.norm() * direction.norm() / p.numel() ** 0.5
        assert abs((p.grad * direction).sum() - differences[name]) < 1e-5 * scale, name


@given(
    backend=st.sampled_from(BACKENDS),
    options=st.sampled_from(SWEEPS),
    truncate=st.none() | st.integers(1, 4),
    checkpoint_blocks=st.booleans(),
    steps=st.integers(1, 5),
    batch=st.integers(1, 3),
    window=st.none() | st.integers(1, 30),
    mini_batch=st.integers(1, 9),
    suffix=st.integers(1, 3),
    tied=st.booleans(),
)
def test_drawn_models(
    backend: str,
    options: dict[str, Any],
    truncate: int | None,
    checkpoint_blocks: bool,
    steps: int,
    batch: int,
    window: int | None,
    mini_batch: int,
    suffix: int,
    tied: bool,
) -> None:
    m = wide(window=window, mini_batch_size=mini_batch, suffix_layers=suffix, tie_embeddings=tied)
    tokens = stream(steps * mini_batch + 1, batch=batch)
    expected = gradients(m, tokens, backend="reference", method="graph", truncate_steps=truncate)
    found = gradients(
        m, tokens, backend=backend, truncate_steps=truncate, checkpoint_blocks=checkpoint_blocks, **options
    )
    assert set(found) == set(expected)
    total = torch.cat([g.flatten() for g in expected.values()])
    assert relative_error(torch.cat([found[n].flatten() for n in expected]), total) < 1e-9


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_truncation(options: dict[str, Any]) -> None:
    """From as many steps as there are it changes nothing; below, it does."""
    m, tokens = wide(), stream(4 * SIZE + 1)

    def fast_gradient(truncate: int | None) -> Tensor:
        m.zero_grad()
        m.loss(tokens, truncate_steps=truncate, **options).loss.backward()
        return m.blocks[-1].fast_down.grad.clone()

    full = fast_gradient(None)
    assert torch.equal(fast_gradient(4), full)
    assert torch.equal(fast_gradient(5), full)
    assert relative_error(fast_gradient(2), full) > 1e-2


def test_truncated_to_one_step_is_first_order() -> None:
    """The first fast weights are then seen by the first mini-batch only."""
    m, tokens = wide(), stream(3 * SIZE + 1)
    m.loss(tokens, truncate_steps=1).loss.backward()
    found = m.blocks[-1].fast_down.grad.clone()
    m.zero_grad()
    loss(m, tokens[:, : SIZE + 1]).loss.backward()
    assert relative_error(3 * found, m.blocks[-1].fast_down.grad) < 1e-9


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_a_second_derivative_raises(options: dict[str, Any]) -> None:
    """In all of them by default; without checkpoint_blocks the graph has one."""
    m = model()
    first = m.loss(stream(2 * SIZE + 1), **options).loss
    with pytest.raises(RuntimeError, match="create_graph"):
        torch.autograd.grad(first, m.blocks[0].w_qkv, create_graph=True)


@pytest.mark.parametrize("options", SWEEPS, ids=str)
def test_a_graph_goes_back_once(options: dict[str, Any]) -> None:
    first = model().loss(stream(2 * SIZE + 1), **options).loss
    first.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="only once"):
        first.backward()


@pytest.mark.parametrize("steps", [1, 2, 4, 5])
def test_what_is_reported_does_not_depend_on_stretches(steps: int) -> None:
    """Without gradients too, where none is read twice."""
    m, tokens = wide(), stream(5 * SIZE + 1, batch=2)
    whole = loss(m, tokens, keep_inner_grads=3)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            parts = loss(m, tokens, method="snapshots", snapshot_every=steps, keep_inner_grads=3)
        assert parts.inner_norms.shape == (2, 5)
        assert len(parts.inner_grads) == 3
        for name in ("loss", "nll", "fast", "inner_norms", "inner_grads", "prefix_output"):
            found, expected = (flattened(getattr(out, name)) for out in (parts, whole))
            assert relative_error(found, expected) < 1e-12, name


@pytest.mark.parametrize("options", SWEEPS, ids=str)
def test_the_prefix_output_is_differentiable(options: dict[str, Any]) -> None:
    m, tokens = wide(), stream(3 * SIZE + 1)

    def found(**given: Any) -> Tensor:
        out = loss(m, tokens, **given).prefix_output
        return torch.autograd.grad(out.square().sum(), m.blocks[0].w_qkv)[0]

    assert relative_error(found(**options), found(method="graph")) < 1e-9


@pytest.mark.parametrize("options", SWEEPS, ids=str)
def test_weights_that_change_before_the_sweep_back_are_noticed(options: dict[str, Any]) -> None:
    m = model()
    first = m.loss(stream(2 * SIZE + 1), **options).loss
    with torch.no_grad():
        m.final_norm.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        first.backward()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("options", SWEEPS, ids=str)
def test_16_bits(options: dict[str, Any], dtype: str) -> None:
    """As close to float64 as the graph of all steps is, whose gradients are rounded to 16 bits more often."""
    tokens = stream(4 * SIZE + 1)
    truth = gradients(wide(), tokens, backend="reference", method="graph")
    narrow = model(compute_dtype=dtype, inner_clip=2.5, inner_lr=0.3)
    assert narrow.blocks[0].w_qkv.dtype == torch.float32

    def error(**given: Any) -> float:
        found = gradients(narrow, tokens, **given)
        whole = torch.cat([truth[name].flatten() for name in truth])
        return relative_error(torch.cat([found[name].flatten() for name in truth]), whole)

    assert error(**options) < 1.5 * error(backend="reference", method="graph")


def test_wrong_options() -> None:
    m = model()
    for wrong, message in (
        ({"method": "magic"}, "method is 'magic'; accepted are rollback, snapshots, graph"),
        ({"snapshot_every": 0}, "snapshot_every is 0"),
        ({"truncate_steps": 0}, "truncate_steps is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            m.loss(stream(SIZE + 1), **wrong)
