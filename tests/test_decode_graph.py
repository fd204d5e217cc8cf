"""Decoding by a graph: the same tokens' logits as without, on states of every age."""

from typing import Any

import pytest
import torch
from emulated_graphs import Emulation
from small_model import model, stream

from engine import TTTModel, decode, graphs
from engine.state import State
from ttt_kernels.decode import choose, cpu, step
from ttt_kernels.extension import cpu as extension
from ttt_kernels.rope import tables

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(extension is None, reason="without the C++ kernels nothing stands for the CUDA ones"),
]


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Emulation:
    """An emulated GPU, whose kernel for decoding is the processor's: it reads `visible` from memory like the other."""
    emulation = Emulation()
    monkeypatch.setattr(graphs, "lanes", emulation.lanes)
    monkeypatch.setattr(decode, "choose", lambda stack, backend: "cuda")

    def kernel(stack: Any, x: torch.Tensor, *numbers: torch.Tensor, backend: str) -> decode.Decoded:
        assert backend == "cuda"
        return decode.Decoded(*emulation.call(lambda *given: cpu.step(stack, *given), x, *numbers))

    monkeypatch.setattr(decode, "step", kernel)
    # That of the processor reads positions without the device.
    monkeypatch.setattr(decode, "angles", tables._on_device)
    return emulation


def replayed(device: Emulation, m: TTTModel, token: torch.Tensor, state: State) -> torch.Tensor:
    with pytest.MonkeyPatch.context() as patch, device:
        patch.setattr(graphs, "available", lambda _: True)
        return m.decode(token, state)


def plainly(m: TTTModel, token: torch.Tensor, state: State) -> torch.Tensor:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "choose", choose)
        patch.setattr(decode, "step", step)
        return m.decode(token, state, backend="cpu")


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("read", [0, 5, 40])
@pytest.mark.parametrize("window", [13, None])
def test_replays_equal_plain_decoding(device: Emulation, batch: int, read: int, window: int | None) -> None:
    m = model(window=window)
    tokens = stream(read + 30, batch=batch)
    state, plain = m.init_state(batch), m.init_state(batch)
    if read:
        for s in (state, plain):
            m.prefill(tokens[:, :read], s, backend="cpu")
    kept = []
    for i in range(read, read + 30):
        logits = replayed(device, m, tokens[:, i], state)
        kept.append((logits, logits.clone()))
        expected = plainly(m, tokens[:, i], plain)
        torch.testing.assert_close(logits, expected, rtol=0, atol=0)
    assert all(torch.equal(*pair) for pair in kept)
    assert torch.equal(state.pending_hidden, plain.pending_hidden)
    # The first token is read as it comes.
    assert device.replays == 29
