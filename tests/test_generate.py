"""Generation: the loop around prefill and decode, with a model of a few lines in place of the real one."""

from types import SimpleNamespace

import pytest
import torch

from engine.generate import generate, stream

VOCAB = 11


class Recorder:
    """A model whose logits depend on all that its state, a list of tokens per sequence, has read."""

    config = SimpleNamespace(vocab_size=VOCAB)
    final_norm = torch.ones(1)

    def init_state(self, batch_size: int = 1) -> list[list[int]]:
        return [[] for _ in range(batch_size)]

    def logits(self, state: list[list[int]]) -> torch.Tensor:
        rows = []
        for read in state:
            generator = torch.Generator().manual_seed(hash(tuple(read)) % 2**31)
            rows.append(torch.randn(VOCAB, generator=generator))
        return torch.stack(rows)

    def prefill(
        self, tokens: torch.Tensor, state: list[list[int]], *, backend: str | None = None
    ) -> SimpleNamespace:
        for read, row in zip(state, tokens.tolist(), strict=True):
            read += row
        return SimpleNamespace(logits=self.logits(state))

    def decode(
        self, token: torch.Tensor, state: list[list[int]], *, backend: str | None = None
    ) -> torch.Tensor:
        return self.prefill(token[:, None], state).logits


def test_greedy_takes_the_likeliest_token_after_all_that_was_read() -> None:
    model = Recorder()
    ids = generate(model, [1, 2, 3], max_new_tokens=5, temperature=0)
    read = [1, 2, 3]
    for token in ids.tolist():
        assert token == int(model.logits([read]).argmax())
        read.append(token)
    assert ids.shape == (5,)
    assert ids.dtype == torch.int64


def test_shapes_follow_the_prompt() -> None:
    model = Recorder()
    assert generate(model, torch.tensor([1, 2]), max_new_tokens=3).shape == (3,)
    assert generate(model, torch.tensor([[1, 2]]), max_new_tokens=3).shape == (1, 3)
    assert generate(model, torch.tensor([[1, 2], [3, 4]]), max_new_tokens=3).shape == (2, 3)
    assert generate(model, [1], max_new_tokens=0).shape == (0,)
    assert generate(model, torch.tensor([[1], [2]]), max_new_tokens=0).shape == (2, 0)


def test_a_seed_repeats_and_others_differ() -> None:
    def tokens(seed: int | None) -> list[int]:
        return generate(Recorder(), [1], max_new_tokens=40, temperature=2.0, seed=seed).tolist()

    assert tokens(3) == tokens(3)
    assert tokens(3) != tokens(4)
    assert tokens(None) != tokens(None)


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    generate(Recorder(), [1], max_new_tokens=4, seed=0)
    assert torch.equal(before, torch.get_rng_state())


def test_a_given_state_has_read_all_and_goes_on() -> None:
    model = Recorder()
    state = model.init_state()
    first = generate(model, [1, 2], max_new_tokens=3, temperature=0, state=state)
    assert state == [[1, 2, *first.tolist()]]
    second = generate(model, [5], max_new_tokens=2, temperature=0, state=state)
    fresh = generate(model, [1, 2, *first.tolist(), 5], max_new_tokens=2, temperature=0)
    assert second.tolist() == fresh.tolist()


def test_every_sequence_stops_at_its_stop_token_and_all_stop_together() -> None:
    model = Recorder()
    prompts = torch.tensor([[1], [2], [3]])
    free = generate(model, prompts, max_new_tokens=60, seed=5, temperature=1.0)
    stop = 7
    lengths = [row.index(stop) + 1 for row in free.tolist()]
    assert len(set(lengths)) > 1
    ids = generate(model, prompts, max_new_tokens=60, seed=5, temperature=1.0, stop_token=stop)
    first = lengths.index(min(lengths))
    assert ids.shape[1] < 60
    assert ids[first].tolist() == free[first, : lengths[first]].tolist() + [stop] * (
        ids.shape[1] - lengths[first]
    )
    assert (ids == stop).any(dim=1).all()


def test_stream_yields_what_generate_returns() -> None:
    steps = list(stream(Recorder(), torch.tensor([[1], [2]]), max_new_tokens=6, seed=0))
    assert torch.equal(
        torch.stack(steps, 1), generate(Recorder(), torch.tensor([[1], [2]]), max_new_tokens=6, seed=0)
    )


@pytest.mark.parametrize(
    ("prompt", "settings", "named"),
    [
        ([], {}, "prompt.*empty"),
        (torch.empty(2, 0, dtype=torch.int64), {}, "prompt.*empty"),
        ([1.0], {}, "prompt.*int64"),
        (torch.ones(1, 1, 1, dtype=torch.int64), {}, "prompt.*int64"),
        ([VOCAB], {}, f"token {VOCAB} is outside the vocabulary"),
        ([3, -1], {}, "token -1 is outside the vocabulary"),
        ([1], {"max_new_tokens": -1}, "max_new_tokens=-1"),
        ([1], {"stop_token": VOCAB}, "stop_token"),
        ([1], {"temperature": -1.0}, "temperature"),
        ([1], {"top_k": 0}, "top_k"),
        ([1], {"top_p": 2.0}, "top_p"),
    ],
)
def test_bad_input_is_refused_before_anything_is_read(
    prompt: object, settings: dict[str, float], named: str
) -> None:
    model = Recorder()
    state = model.init_state()
    with pytest.raises(ValueError, match=named):
        generate(model, prompt, state=state, **settings)
    assert state == [[]]
