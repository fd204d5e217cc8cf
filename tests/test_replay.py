"""Reading by graphs: the same results as without, whatever was recorded before, and no race between streams."""

import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
from emulated_graphs import Emulation, interpreted_kernels
from harness import EVERY_BACKEND
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_model import model, stream
from test_prefill import assert_same_fast

from engine import TTTModel, graphs
from engine.ops import Ops
from engine.prefill import PrefillOutput
from engine.recordings import Recordings
from engine.state import State
from engine.weights import for_inference
from engine.workspace import workspace

pytestmark = pytest.mark.usefixtures("one_thread")
several = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=12)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Emulation:
    """An emulated GPU, on which slabs have two mini-batches where a batch has one sequence."""
    emulation = Emulation()
    monkeypatch.setattr(graphs, "available", lambda device: True)
    monkeypatch.setattr(graphs, "lanes", emulation.lanes)
    monkeypatch.setattr(Ops, "recordable", property(lambda self: True))
    monkeypatch.setattr("engine.state.SLAB", 16)
    reset = State.reset

    def made(state: State) -> None:
        reset(state)
        emulation.on_host(state.position)

    monkeypatch.setattr(State, "reset", made)
    return emulation


def read(
    m: TTTModel, tokens: torch.Tensor, state: State, cuts: list[int], device: Emulation | None = None
) -> PrefillOutput:
    """Prefill in pieces that end at `cuts`, by graphs on a device."""
    ends = [*sorted({c for c in cuts if c < tokens.shape[1]}), tokens.shape[1]]
    outs = []
    with pytest.MonkeyPatch.context() as patch, device or nullcontext():
        patch.setattr(graphs, "available", lambda _: device is not None)
        for a, b in zip([0, *ends], ends, strict=False):
            outs.append(m.prefill(tokens[:, a:b], state, backend="reference"))
    return PrefillOutput(torch.cat([o.nll for o in outs], 1), outs[-1].logits)


def assert_same(m: TTTModel, got: PrefillOutput, state: State, want: PrefillOutput, wanted: State) -> None:
    """All that the reading of the same tokens gives is the same, and so is what comes after it."""
    torch.testing.assert_close(got.nll, want.nll, rtol=0, atol=2e-5, equal_nan=True)
    torch.testing.assert_close(got.logits, want.logits, rtol=0, atol=4e-5)
    assert_same_fast(state.fast_weights(), wanted.fast_weights())
    assert state.position.tolist() == wanted.position.tolist()
    assert state.pending == wanted.pending
    token = torch.full((state.batch_size,), 7)
    for _ in range(3):
        logits = [m.decode(token, s, backend="reference") for s in (state, wanted)]
        torch.testing.assert_close(*logits, rtol=0, atol=4e-5)


@several
@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=3),
    batch=st.integers(1, 2),
    cuts=st.lists(st.integers(1, 89), max_size=2),
    window=st.sampled_from([1, 5, 8, 13, 24, 40]),
    suffix=st.integers(0, 3),
)
def test_replays_equal_plain_reading(
    device: Emulation, lengths: list[int], batch: int, cuts: list[int], window: int, suffix: int
) -> None:
    m = model(window=window, suffix_layers=suffix)
    for seed, length in enumerate(lengths):
        tokens = stream(length, batch=batch, seed=seed)
        state, plain = m.init_state(batch), m.init_state(batch)
        got = read(m, tokens, state, cuts, device)
        assert_same(m, got, state, read(m, tokens, plain, cuts), plain)


def test_a_second_reading_replays_everything(device: Emulation) -> None:
    m = model()
    tokens = stream(96)
    state, plain = m.init_state(), m.init_state()
    want = read(m, tokens, plain, [])
    read(m, tokens, m.init_state(), [], device)
    before = device.replays
    got = read(m, tokens, state, [], device)
    # Slabs of the prefix blocks, and mini-batches.
    assert device.replays - before == 96 // 16 + 96 // 8
    assert_same(m, got, state, want, plain)


@pytest.mark.parametrize("start", [0, 3, 8, 100])
def test_no_more_graphs_however_much_is_read(device: Emulation, start: int) -> None:
    m = model(window=24)
    state = m.init_state()
    tokens = stream(start + 400)
    if start:
        read(m, tokens[:, :start], state, [])
    read(m, tokens[:, start : start + 200], state, [], device)
    space = workspace(m, 1, for_inference(m), Ops(m, "reference"), 2)
    known = len(space._replays)
    read(m, tokens[:, start + 200 :], state, [30, 60, 90, 111], device)
    # Growing windows and full ones, whose places are a slab or a mini-batch apart, and the last mini-batch of a call.
    assert len(space._replays) <= known + 4


def test_states_take_turns(device: Emulation) -> None:
    m = model()
    streams = [stream(80, seed=seed) for seed in range(2)]
    states, plain = ([m.init_state() for _ in range(2)] for _ in range(2))
    for part in (slice(0, 40), slice(40, 80)):
        for tokens, state, other in zip(streams, states, plain, strict=True):
            got = read(m, tokens[:, part], state, [], device)
            want = read(m, tokens[:, part], other, [])
    for state, other in zip(states, plain, strict=True):
        assert_same_fast(state.fast_weights(), other.fast_weights())
    assert_same(m, got, states[1], want, plain[1])


def test_changed_weights_are_recorded_anew(device: Emulation) -> None:
    m = model()
    tokens = stream(48)
    read(m, tokens, m.init_state(), [], device)
    with torch.no_grad():
        m.blocks[0].w_qkv.mul_(0.5)
    state, plain = m.init_state(), m.init_state()
    assert_same(m, read(m, tokens, state, [], device), state, read(m, tokens, plain, []), plain)


def test_a_model_that_replays_is_freed(device: Emulation) -> None:
    m = model()
    read(m, stream(48), m.init_state(), [], device)
    found = weakref.ref(m)
    del m
    gc.collect()
    assert found() is None


@pytest.mark.parametrize("first", [True, False])
def test_memory_serves_in_and_out_of_inference_mode(device: Emulation, first: bool) -> None:
    m = model()
    tokens = stream(48)
    states, plain = [m.init_state() for _ in range(2)], m.init_state()
    for inside, state in zip((first, not first), states, strict=True):
        with torch.inference_mode(inside):
            got = read(m, tokens, state, [], device)
    with torch.inference_mode():
        assert_same(m, got, states[1], read(m, tokens, plain, []), plain)


def test_a_failed_call_leaves_the_state_as_it_was(device: Emulation, monkeypatch: pytest.MonkeyPatch) -> None:
    m = model()
    tokens = stream(80)
    state, plain = m.init_state(), m.init_state()
    for s in (state, plain):
        read(m, tokens[:, :20], s, [])
    with monkeypatch.context() as patch:
        patch.setattr("engine.replay.inner_update_", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            read(m, tokens[:, 20:], state, [], device)
    got, want = read(m, tokens[:, 20:], state, [], device), read(m, tokens[:, 20:], plain, [])
    assert_same(m, got, state, want, plain)


def test_the_next_user_waits(device: Emulation) -> None:
    with device:
        space, x = Recordings(torch.device("cpu")), torch.ones(3)
        with space.in_turn():
            x.add_(1)
        # One whose own stream is another.
        other = space.lanes.first
        space.lanes = space.lanes._replace(main=other)
        with other.active(), space.in_turn():
            x.add_(1)
    assert x.tolist() == [3] * 3


def test_without_a_window_nothing_is_recorded(device: Emulation) -> None:
    m = model(window=None)
    read(m, stream(64), m.init_state(), [], device)
    read(m, stream(64), m.init_state(), [], device)
    assert device.replays == 0


@pytest.mark.slow
@pytest.mark.skipif("triton" not in EVERY_BACKEND, reason="Triton's interpreter does not run here")
def test_triton_kernels_are_replayed(device: Emulation) -> None:
    """Their launches too have nothing in them that changes from mini-batch to mini-batch."""
    m = model(num_layers=2, suffix_layers=1)
    with interpreted_kernels(device), device:
        m.prefill(stream(32, seed=1), m.init_state(), backend="triton")
        before, state = device.replays, m.init_state()
        found = m.prefill(stream(32), state, backend="triton")
    assert device.replays - before == 32 // 16 + 32 // 8
    plain = m.init_state()
    expected = read(m, stream(32), plain, [])
    assert_same(m, found, state, expected, plain)


def test_numbers_are_those_of_the_recording(device: Emulation) -> None:
    """The emulation itself: Python is not run again, memory is used again, nothing is changed by being recorded."""
    x, out = torch.ones(3), torch.zeros(3)
    factor = 2.0

    def work() -> None:
        out.copy_(x * factor)
        x.add_(1)

    with device:
        replay = device.record(work)
        assert x.tolist() == [1] * 3
        assert out.tolist() == [0] * 3
        factor = 5.0
        replay()
        replay()
        assert out.tolist() == [4] * 3
        assert x.tolist() == [3] * 3
        with pytest.raises(AssertionError, match="waits for the device"):
            device.record(lambda: print(x.sum().item()))


def test_races_are_found(device: Emulation) -> None:
    main, beside, _ = device.lanes(torch.device("cpu"))
    with device:
        x = torch.ones(3)
        with pytest.raises(AssertionError, match="race"), beside.active():
            x + 1
        beside.wait(main.mark())
        with beside.active():
            y = x + 1
        with pytest.raises(AssertionError, match="race"):
            x.add_(1)
        with pytest.raises(AssertionError, match="race"):
            y + 1
        main.wait(beside.mark())
        x.add_(y)
