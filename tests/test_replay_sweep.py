"""Training by graphs: the same losses and meta-gradients as without, whatever was recorded before."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from emulated_graphs import Emulation, interpreted_kernels
from harness import EVERY_BACKEND
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_model import CONFIG, model, stream
from test_meta_gradient import assert_rounded_once, assert_same, gradients, of_16_bit_weights, wide
from torch import Tensor

from engine import TTTModel, graphs
from engine.loss import loss
from engine.ops import Ops
from ttt_kernels.clipped_sgd import triton
from ttt_kernels.clipped_sgd.triton_call import number

pytestmark = pytest.mark.usefixtures("one_thread")
several = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=6)
SIZE = CONFIG.mini_batch_size


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Emulation:
    """An emulated GPU."""
    emulation = Emulation()
    monkeypatch.setattr(graphs, "lanes", emulation.lanes)
    monkeypatch.setattr(Ops, "recordable", property(lambda self: True))
    return emulation


def differentiated(
    m: TTTModel, tokens: Tensor, device: Emulation | None = None, **options: Any
) -> dict[str, Tensor]:
    """`gradients`, by graphs on a device."""
    with pytest.MonkeyPatch.context() as patch, device or nullcontext():
        patch.setattr(graphs, "available", lambda _: device is not None)
        return gradients(m, tokens, backend="reference", **options)


@several
@given(
    steps=st.lists(st.integers(1, 5), min_size=2, max_size=3),
    batch=st.integers(1, 2),
    window=st.sampled_from([3, 5, 8, 13, 24]),
    suffix=st.integers(1, 3),
    method=st.sampled_from(["rollback", "snapshots"]),
    truncate=st.sampled_from([None, 2]),
)
def test_replays_equal_plain_sweeps(
    device: Emulation,
    steps: list[int],
    batch: int,
    window: int,
    suffix: int,
    method: str,
    truncate: int | None,
) -> None:
    m = wide(window=window, suffix_layers=suffix)
    options = {"method": method, "snapshot_every": 2, "truncate_steps": truncate}
    for seed, count in enumerate(steps):
        tokens = stream(count * SIZE + 1, batch=batch, seed=seed)
        assert_same(differentiated(m, tokens, device, **options), differentiated(m, tokens, **options), 1e-9)


def test_a_second_sweep_replays_everything(device: Emulation) -> None:
    m, tokens = wide(), stream(6 * SIZE + 1)
    expected = differentiated(m, tokens)
    differentiated(m, tokens, device)
    before = device.replays
    assert_same(differentiated(m, tokens, device), expected, 1e-9)
    assert device.replays - before == 2 * 6


def test_another_inner_rate_is_not_recorded(device: Emulation) -> None:
    """It changes with every outer step of a warm-up."""
    m, tokens = wide(ilr_warmup_steps=10, ilr_init=0.1), stream(3 * SIZE + 1)
    for step in (0, 1, 5, None):
        found = differentiated(m, tokens, device, step=step)
        assert_same(found, differentiated(m, tokens, step=step), 1e-9)


def test_changed_weights_are_read(device: Emulation) -> None:
    m, tokens = wide(), stream(3 * SIZE + 1)
    differentiated(m, tokens, device)
    with torch.no_grad():
        for parameter in m.parameters():
            parameter.mul_(0.9)
    assert_same(differentiated(m, tokens, device), differentiated(m, tokens), 1e-9)


def test_cotangents_of_16_bit_weights(device: Emulation) -> None:
    short, long = of_16_bit_weights()
    tokens = stream(24 * SIZE + 1)
    assert_rounded_once(differentiated(short, tokens, device), differentiated(long, tokens))


def test_two_losses_before_their_gradients(device: Emulation, monkeypatch: pytest.MonkeyPatch) -> None:
    m = wide()
    streams = [stream(3 * SIZE + 1, seed=seed) for seed in range(2)]
    with device:
        monkeypatch.setattr(graphs, "available", lambda _: True)
        for _ in range(2):
            outs = [loss(m, tokens, backend="reference") for tokens in streams]
            found = [torch.autograd.grad(out.loss, m.blocks[-1].fast_gate)[0] for out in outs]
    monkeypatch.setattr(graphs, "available", lambda _: False)
    for tokens, g in zip(streams, found, strict=True):
        out = loss(m, tokens, backend="reference")
        expected = torch.autograd.grad(out.loss, m.blocks[-1].fast_gate)[0]
        torch.testing.assert_close(g, expected, rtol=1e-9, atol=1e-12)


def test_results_outlive_the_next_sweep(device: Emulation, monkeypatch: pytest.MonkeyPatch) -> None:
    m = wide()
    monkeypatch.setattr(graphs, "available", lambda _: True)
    with device:
        out = loss(m, stream(3 * SIZE + 1), backend="reference")
        grads = torch.autograd.grad(out.loss, list(m.parameters()))
        results = [out.nll, *(t for block in out.fast for t in block), out.inner_norms, *grads]
        kept = [t.detach().clone() for t in results]
        loss(m, stream(4 * SIZE + 1, seed=1), backend="reference").loss.backward()
    for result, value in zip(results, kept, strict=True):
        torch.testing.assert_close(result.detach(), value, rtol=0, atol=0)


def test_evaluation_replays_too(device: Emulation, monkeypatch: pytest.MonkeyPatch) -> None:
    m, tokens = wide(), stream(4 * SIZE + 1)
    with torch.no_grad():
        expected = loss(m, tokens, backend="reference")
        monkeypatch.setattr(graphs, "available", lambda _: True)
        with device:
            for _ in range(2):
                found = loss(m, tokens, backend="reference")
    # The fourth mini-batch sees as much as the third.
    assert device.replays == 1 + 4
    torch.testing.assert_close(found.nll, expected.nll, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.inner_norms, expected.inner_norms, rtol=1e-9, atol=0)


@pytest.mark.slow
@pytest.mark.skipif("triton" not in EVERY_BACKEND, reason="Triton's interpreter does not run here")
def test_triton_kernels_are_replayed(device: Emulation, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their launches too have nothing in them that changes from step to step."""
    m, tokens = model(num_layers=1, suffix_layers=1), stream(2 * SIZE + 1)
    expected = gradients(m, tokens, backend="reference")
    monkeypatch.setattr(graphs, "available", lambda _: True)
    # Kernels read the rate on the device; what is on the processor is brought to them as a number.
    monkeypatch.setattr(triton, "number", lambda value: value if isinstance(value, Tensor) else number(value))
    with device, interpreted_kernels(device):
        for seed in (1, 0):
            found = gradients(m, stream(2 * SIZE + 1, seed=seed), backend="triton")
    assert device.replays == 2 * 2
    assert_same(found, expected, 1e-4)
