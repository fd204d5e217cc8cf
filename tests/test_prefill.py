"""Reading: pieces equal the whole, decode equals prefill, sequences do not influence each other."""

import pytest
import torch
from harness import BACKENDS
from hypothesis import given
from hypothesis import strategies as st
from small_model import model, stream

from engine.loss import loss
from engine.prefill import PrefillOutput
from engine.state import State
from engine.weights import Fast

backends = pytest.mark.parametrize("backend", BACKENDS)


def assert_same_fast(a: Fast, b: Fast, tolerance: float = 5e-6) -> None:
    for x, y in zip([t for block in a for t in block], [t for block in b for t in block], strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=tolerance)


def read(state: State, tokens: torch.Tensor, cuts: list[int], backend: str) -> PrefillOutput:
    """Prefill in pieces that end at `cuts`."""
    ends = [*sorted(set(cuts)), tokens.shape[1]]
    outs = [
        state.model.prefill(tokens[:, a:b], state, backend=backend)
        for a, b in zip([0, *ends], ends, strict=False)
        if b > a
    ]
    return PrefillOutput(torch.cat([o.nll for o in outs], 1), outs[-1].logits)


@backends
@given(
    length=st.integers(1, 60),
    batch=st.integers(1, 3),
    cuts=st.lists(st.integers(1, 59), max_size=5),
    window=st.sampled_from([1, 5, 8, 13, 100, None]),
    suffix=st.integers(0, 3),
)
def test_pieces_equal_the_whole(
    backend: str, length: int, batch: int, cuts: list[int], window: int | None, suffix: int
) -> None:
    m = model(window=window, suffix_layers=suffix)
    tokens = stream(length, batch=batch)
    whole_state, state = m.init_state(batch), m.init_state(batch)
    whole = m.prefill(tokens, whole_state, backend=backend)
    pieces = read(state, tokens, [c for c in cuts if c < length], backend)
    assert torch.isnan(whole.nll[:, 0]).all()
    torch.testing.assert_close(pieces.nll, whole.nll, rtol=0, atol=2e-5, equal_nan=True)
    # Inner steps at a rate of 1 amplify rounding: single logits of 46 tokens cut at 8 differ by 2.8e-5, while 99 of 100
    # examples stay below 8e-6.
    torch.testing.assert_close(pieces.logits, whole.logits, rtol=0, atol=4e-5)
    assert_same_fast(state.fast_weights(), whole_state.fast_weights())
    assert state.position.tolist() == [length] * batch


@backends
def test_pieces_equal_the_whole_over_several_slabs(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = stream(120, batch=2)
    m = model()
    whole = m.prefill(tokens, m.init_state(2), backend=backend)
    monkeypatch.setattr("engine.state.SLAB", 32)
    state = m.init_state(2)
    assert state.slab == 16
    slabs = read(state, tokens, [3, 70], backend)
    torch.testing.assert_close(slabs.nll, whole.nll, rtol=0, atol=2e-5, equal_nan=True)


@backends
def test_decode_equals_prefill_teacher_forced(backend: str) -> None:
    m = model()
    tokens = stream(45, batch=2)
    whole = m.prefill(tokens, m.init_state(2), backend=backend)
    state = m.init_state(2)
    for i in range(45):
        logits = m.decode(tokens[:, i], state, backend=backend)
        if i + 1 < 45:
            nll = torch.nn.functional.cross_entropy(logits, tokens[:, i + 1], reduction="none")
            torch.testing.assert_close(nll, whole.nll[:, i + 1], rtol=0, atol=3e-5)
    torch.testing.assert_close(logits, whole.logits, rtol=0, atol=3e-5)


@backends
def test_prefill_after_decode_and_back(backend: str) -> None:
    m = model()
    tokens = stream(40)
    whole = m.prefill(tokens, m.init_state(), backend=backend)
    state = m.init_state()
    m.prefill(tokens[:, :5], state, backend=backend)
    for i in range(5, 18):
        m.decode(tokens[:, i], state, backend=backend)
    out = m.prefill(tokens[:, 18:], state, backend=backend)
    torch.testing.assert_close(out.nll, whole.nll[:, 18:], rtol=0, atol=2e-5)


@backends
def test_prefill_gives_the_losses_of_the_meta_objective(backend: str) -> None:
    m = model()
    tokens = stream(41, batch=2)
    state = m.init_state(2)
    out = m.prefill(tokens, state, backend=backend)
    expected = loss(m, tokens, backend=backend)
    torch.testing.assert_close(out.nll[:, 1:], expected.nll, rtol=0, atol=2e-5)
    assert_same_fast(state.fast_weights(), expected.fast)


@backends
def test_inner_steps_change_what_is_predicted(backend: str) -> None:
    m, frozen = model(), model(inner_lr=0.0)
    tokens = stream(30)
    a, b = (x.prefill(tokens, x.init_state(), backend=backend).nll for x in (m, frozen))
    torch.testing.assert_close(a[:, 1:9], b[:, 1:9], rtol=0, atol=1e-6)
    assert (a[:, 10:] - b[:, 10:]).abs().max() > 1e-3


@backends
def test_a_sequence_does_not_depend_on_its_neighbours(backend: str) -> None:
    m = model()
    tokens = stream(45, batch=3)
    other = tokens.clone()
    other[[0, 2]] = stream(45, batch=2, seed=9)
    first_state, second_state = m.init_state(3), m.init_state(3)
    first = m.prefill(tokens, first_state, backend=backend)
    second = m.prefill(other, second_state, backend=backend)
    assert torch.equal(first.nll[1, 1:], second.nll[1, 1:])
    assert torch.equal(first.logits[1], second.logits[1])
    for a, b in zip(first_state.fast_weights(), second_state.fast_weights(), strict=True):
        assert all(torch.equal(x[1], y[1]) and not torch.equal(x[0], y[0]) for x, y in zip(a, b, strict=True))
    alone = m.prefill(tokens[1:2], m.init_state(), backend=backend)
    torch.testing.assert_close(alone.nll[0], first.nll[1], rtol=0, atol=2e-5, equal_nan=True)


@backends
def test_a_mini_batch_without_a_counted_target_takes_no_step(backend: str) -> None:
    m = model()
    tokens = stream(25, batch=2)
    tokens[0, 1:9] = 1
    state = m.init_state(2)
    m.prefill(tokens[:, :9], state, backend=backend)
    initial = m.init_state(2).fast_weights()
    for now, then in zip(state.fast_weights(), initial, strict=True):
        assert all(torch.equal(a[0], b[0]) for a, b in zip(now, then, strict=True))
        assert not any(torch.equal(a[1], b[1]) for a, b in zip(now, then, strict=True))


@backends
def test_masked_targets_are_still_reported(backend: str) -> None:
    m = model()
    tokens = stream(20)
    tokens[0, 5] = 1
    out = m.prefill(tokens, m.init_state(), backend=backend)
    assert torch.isfinite(out.nll[0, 5])
    assert out.nll[0, 5] > 0


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
@backends
def test_other_dtypes_follow_fp32(backend: str, dtype: str) -> None:
    tokens = stream(41, batch=2)
    exact = model(), model(compute_dtype=dtype)
    nll, other = (m.prefill(tokens, m.init_state(2), backend=backend).nll[:, 1:] for m in exact)
    tolerance = {"bfloat16": 0.25, "float16": 0.03, "float64": 1e-4}[dtype]
    assert (nll - other).abs().mean() < tolerance


def test_refuses_bad_input() -> None:
    m = model()
    state = m.init_state()
    with pytest.raises(ValueError, match=r"tokens contains 61; accepted are 0 to 60"):
        m.prefill(torch.tensor([[3, 61]]), state)
    with pytest.raises(ValueError, match="tokens contains -1"):
        m.prefill(torch.tensor([[3, -1]]), state)
    with pytest.raises(ValueError, match=r"tokens has shape \(1, 0\)"):
        m.prefill(torch.zeros(1, 0, dtype=torch.int64), state)
    with pytest.raises(ValueError, match=r"tokens has shape \(4,\)"):
        m.prefill(torch.zeros(4, dtype=torch.int64), state)
    with pytest.raises(ValueError, match=r"dtype torch\.float32"):
        m.prefill(torch.zeros(1, 4), state)
    with pytest.raises(ValueError, match="2 sequences of tokens for a state of 1"):
        m.prefill(stream(4, batch=2), state)
    with pytest.raises(ValueError, match="must come from this model"):
        m.prefill(stream(4), model(seed=1).init_state())
    with pytest.raises(ValueError, match="backend"):
        m.prefill(stream(4), state, backend="cuda")
    with pytest.raises(ValueError, match="backend"):
        m.prefill(stream(4), state, backend="nonsense")
    with pytest.raises(ValueError, match=r"token has shape \(1, 1\)"):
        m.decode(torch.zeros(1, 1, dtype=torch.int64), state)
    with pytest.raises(ValueError, match="batch_size is 0"):
        m.init_state(0)
    with pytest.raises(ValueError, match="multiple of"):
        m.loss(stream(12))
    with pytest.raises(ValueError, match="step is -1"):
        m.loss(stream(9), step=-1)
    assert state.tokens_read == 0
