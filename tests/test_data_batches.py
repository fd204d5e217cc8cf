"""Sequences and batches: which tokens step n trains on."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from engine.data import Batches, Sequences, Vocabulary, in_order


class Counting:
    """A store whose token i is i, and that remembers what was read."""

    name = "counting"
    vocabulary: Vocabulary | None = None

    def __init__(self, length: int) -> None:
        self.length = length
        self.read_from: list[int] = []

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        assert 0 <= start <= stop <= self.length
        self.read_from.append(start)
        return np.arange(start, stop)

    def fingerprint(self) -> str:
        return "0"


def batches(count: int, batch_size: int, seed: int = 0) -> Batches:
    return Batches(Sequences(Counting(count * 4 + 1), 4), batch_size, seed)


@given(st.integers(2, 60), st.integers(1, 20))
def test_sequences_share_one_token_and_lose_only_an_end(length: int, seq_length: int) -> None:
    if length <= seq_length:
        with pytest.raises(ValueError, match=f"needs {seq_length + 1} tokens and counting has {length}"):
            Sequences(Counting(length), seq_length)
        return
    sequences = Sequences(Counting(length), seq_length)
    tokens = sequences.read(range(len(sequences)))
    assert tokens.shape == (len(sequences), seq_length + 1)
    assert tokens.dtype == torch.int64
    assert tokens[:, 1:].flatten().tolist() == list(range(1, len(sequences) * seq_length + 1))
    assert torch.equal(tokens[1:, 0], tokens[:-1, -1])
    assert length - 1 - len(sequences) * seq_length < seq_length


@given(st.integers(1, 40), st.data())
def test_no_sequence_comes_twice_in_an_epoch(count: int, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, count))
    shuffled = batches(count, size, seed=data.draw(st.integers(0, 2**40)))
    assert shuffled.steps_per_epoch == count // size
    for epoch in range(2):
        steps = range(epoch * shuffled.steps_per_epoch, (epoch + 1) * shuffled.steps_per_epoch)
        seen = [index for step in steps for index in shuffled.indices(step)]
        assert len(seen) == len(set(seen)) == count // size * size
        assert set(seen) <= set(range(count))


def test_a_step_is_the_same_whatever_was_read_before() -> None:
    forward, backward = batches(17, 5, seed=3), batches(17, 5, seed=3)
    steps = {step: forward.indices(step) for step in range(12)}
    assert {step: backward.indices(step) for step in reversed(range(12))} == steps


def test_orders_differ_by_epoch_and_by_seed() -> None:
    first, other = batches(50, 50, seed=1), batches(50, 50, seed=2)
    orders = [first.indices(0), first.indices(1), other.indices(0), list(range(50))]
    assert len({tuple(order) for order in orders}) == 4


def test_the_order_is_what_it_was() -> None:
    # By value: a run that is resumed with another version must read on where it stopped.
    shuffled = batches(10, 5, seed=0)
    assert [shuffled.indices(step) for step in range(3)] == [
        [4, 6, 2, 7, 3],
        [5, 9, 0, 8, 1],
        [9, 1, 3, 8, 7],
    ]


def test_a_batch_is_its_sequences() -> None:
    shuffled = batches(20, 6)
    batch = shuffled.batch(4)
    assert batch.dtype == torch.int64
    assert batch.tolist() == [list(range(4 * i, 4 * i + 5)) for i in shuffled.indices(4)]


@given(st.integers(1, 6))
def test_processes_read_their_own_rows_only(processes: int) -> None:
    size = 6
    whole = batches(20, size).batch(2)
    rows = [slice(r * size // processes, (r + 1) * size // processes) for r in range(processes)]
    mine = [batches(20, size) for _ in rows]
    read = [each.batch(2, part) for each, part in zip(mine, rows, strict=True)]
    assert torch.equal(torch.cat(read), whole)
    for each, part in zip(mine, rows, strict=True):
        store = each.sequences.store
        assert isinstance(store, Counting)
        assert store.read_from == [4 * i for i in each.indices(2)[part]]


@given(st.integers(1, 30), st.integers(1, 12))
def test_in_order_is_everything_once(count: int, batch_size: int) -> None:
    sequences = Sequences(Counting(count * 3 + 1), 3)
    found = list(in_order(sequences, batch_size))
    assert [len(batch) for batch in found[:-1]] == [batch_size] * (len(found) - 1)
    assert torch.equal(torch.cat(found), sequences.read(range(count)))


def test_arguments_that_are_refused() -> None:
    with pytest.raises(ValueError, match="seq_length=0 is not accepted"):
        Sequences(Counting(10), 0)
    sequences = Sequences(Counting(10), 3)
    for size in (0, 4):
        with pytest.raises(ValueError, match=f"batch_size={size} is not accepted: .* 1 to 3, .*counting"):
            Batches(sequences, size, 0)
    with pytest.raises(ValueError, match="seed=-1 is not accepted"):
        Batches(sequences, 1, -1)
    with pytest.raises(ValueError, match="step=-1 is not accepted"):
        Batches(sequences, 1, 0).indices(-1)
    with pytest.raises(ValueError, match=r"rows=slice.* nothing of a batch of 2"):
        Batches(sequences, 2, 0).batch(0, slice(2, 4))
    for index in (-1, 3):
        with pytest.raises(ValueError, match=f"index={index} is not accepted: counting has 3"):
            sequences.read([index])
    with pytest.raises(ValueError, match="batch_size=0 is not accepted"):
        next(in_order(sequences, 0))
