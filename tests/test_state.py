"""A state is cloned, reset, saved and loaded without a difference, and never grows."""

import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_model import model, stream

from engine import TTTConfig, TTTModel

LENGTHS = pytest.mark.parametrize("length", [1, 7, 8, 9, 16, 37])


@LENGTHS
def test_a_clone_goes_on_alike_and_alone(length: int) -> None:
    m = model()
    tokens = stream(60, batch=2)
    state = m.init_state(2)
    m.prefill(tokens[:, :length], state)
    copy = state.clone()
    a = m.prefill(tokens[:, length:], state)
    b = m.prefill(tokens[:, length:], copy)
    torch.testing.assert_close(a.nll, b.nll, rtol=0, atol=2e-5)
    torch.testing.assert_close(a.logits, b.logits, rtol=0, atol=2e-5)


def test_a_clone_shares_nothing() -> None:
    m = model()
    tokens = stream(60, batch=2)
    state = m.init_state(2)
    m.prefill(tokens[:, :16], state)
    copy, expected = state.clone(), state.clone()
    m.prefill(tokens[:, 20:], state)
    a = m.prefill(tokens[:, 16:], copy)
    b = m.prefill(tokens[:, 16:], expected)
    assert torch.equal(a.nll, b.nll)
    assert torch.equal(a.logits, b.logits)


@LENGTHS
def test_a_saved_state_goes_on_alike(length: int, tmp_path: Path) -> None:
    m = model()
    tokens = stream(60, batch=2)
    state = m.init_state(2)
    m.prefill(tokens[:, :length], state)
    state.save(tmp_path / "state.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]
    loaded = m.load_state(tmp_path / "state.safetensors")
    assert loaded.position.tolist() == [length] * 2
    a = m.prefill(tokens[:, length:], state)
    b = m.prefill(tokens[:, length:], loaded)
    torch.testing.assert_close(a.nll, b.nll, rtol=0, atol=2e-5)
    torch.testing.assert_close(a.logits, b.logits, rtol=0, atol=2e-5)


def test_an_unread_state_is_saved_too(tmp_path: Path) -> None:
    m = model()
    m.init_state().save(tmp_path / "s")
    assert m.load_state(tmp_path / "s").tokens_read == 0


def test_reset_forgets_everything() -> None:
    m = model()
    tokens = stream(30)
    state = m.init_state()
    first = m.prefill(tokens, state)
    state.reset()
    assert state.tokens_read == 0
    again = m.prefill(tokens, state)
    assert torch.equal(first.nll[:, 1:], again.nll[:, 1:])


def test_initial_weights_are_not_touched() -> None:
    m = model()
    before = {name: p.clone() for name, p in m.named_parameters()}
    m.prefill(stream(40), m.init_state())
    assert all(torch.equal(before[name], p) for name, p in m.named_parameters())


def test_refuses_what_is_no_state_of_this_model(tmp_path: Path) -> None:
    m = model()
    state = m.init_state()
    m.prefill(stream(20), state)
    path = tmp_path / "s"
    state.save(path)
    with pytest.raises(ValueError, match="other weights or configuration"):
        model(seed=1).load_state(path)
    with pytest.raises(ValueError, match="other weights or configuration"):
        model(window=9).load_state(path)
    with pytest.raises(ValueError, match="is not a file"):
        m.load_state(tmp_path / "nothing")
    content = path.read_bytes()
    for damaged in (content[: len(content) // 2], content[:4], b"", b"garbage" * 100):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="damaged or no safetensors file"):
            m.load_state(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="holds no state"):
        m.load_state(path)
    metadata = {"format": "ttt-state-1", "fingerprint": m.fingerprint(), "batch_size": "1"}
    save_file({"position": torch.zeros(1, dtype=torch.int64)}, path, metadata)
    with pytest.raises(ValueError, match="does not fit"):
        m.load_state(path)


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    m = model()
    state = m.init_state()
    m.prefill(stream(20), state)
    path = tmp_path / "s"
    state.save(path)
    content = path.read_bytes()

    def fails(tensors: object, filename: Path, metadata: object) -> None:
        Path(filename).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("engine.state.save_file", fails)
    with pytest.raises(OSError, match="disk full"):
        state.save(path)
    assert path.read_bytes() == content
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.slow
def test_neither_state_nor_peak_grows_with_the_context() -> None:
    m = TTTModel(TTTConfig.preset("tiny"))
    tokens = stream(1 << 16, vocab=256)
    state = m.init_state()
    empty = state.num_bytes()
    m.prefill(tokens[:, : 1 << 14], state)
    size = state.num_bytes()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for start in range(1 << 14, 1 << 16, 1 << 14):
        m.prefill(tokens[:, start : start + (1 << 14)], state)
    assert state.tokens_read == 1 << 16
    assert state.num_bytes() == size
    assert size - empty <= m.config.hidden_size * 4
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    assert grown <= 8 * 1024, f"peak memory grew by {grown} KiB"
