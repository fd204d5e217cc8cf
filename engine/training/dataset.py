"""The sequences that a run reads."""

from __future__ import annotations

from engine.config import TTTConfig
from engine.data import Sequences, TokenStore, open_store
from engine.data.random_store import RandomStore
from engine.training.options import DatasetOptions

_TRAIN_TOKENS = 2**25
_HELD_OUT_SEQUENCES = 8


def open_sequences(options: DatasetOptions, split: str, config: TTTConfig, seq_length: int) -> Sequences:
    """The sequences of a split. Raises `ValueError` where there are none, or tokens of another vocabulary."""
    store: TokenStore
    if options.dummy:
        # A trial run is not to end with hours of evaluation.
        length = _TRAIN_TOKENS if split == options.split else _HELD_OUT_SEQUENCES * seq_length + 1
        store = RandomStore(config.vocab_size, split, length)
    else:
        path = None if options.path is None else str(options.path)
        store = open_store(options.name, path, split, options.tokenizer)
    vocabulary = store.vocabulary
    if vocabulary is not None and vocabulary.size > config.vocab_size:
        raise ValueError(
            f"{store.name} has tokens of a vocabulary of {vocabulary.size} ({vocabulary.tokenizer}); accepted is "
            f"model.vocab_size={config.vocab_size} at most"
        )
    if vocabulary is not None and vocabulary.bos_token_id not in (None, config.bos_token_id):
        raise ValueError(
            f"model.bos_token_id={config.bos_token_id} is not accepted: texts in {store.name} begin with token "
            f"{vocabulary.bos_token_id}"
        )
    return Sequences(store, seq_length)
