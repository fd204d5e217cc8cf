"""A byte-pair encoding that is trained on the data itself, for vocabularies between bytes and Llama 3's."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from engine.files import atomic_write
from engine.tokenizers import Tokens, checked_ids

BOS = "<|begin_of_text|>"
FILE = "tokenizer.json"
SMALLEST = 257
"""Tokens: one for every byte, and one that begins a text."""


class BPETokenizer:
    """Byte-level byte-pair encoding with one special token, which begins a text and is never read from text.

    `encoding` is a `tokenizers.Tokenizer` as `train` makes it or `load` reads it; both need the package tokenizers.
    """

    eos_token_id: int | None = None

    def __init__(self, encoding: Any) -> None:
        self._encoding = encoding
        # Where text spells the special token it is text all the same.
        encoding.encode_special_tokens = True
        self.vocab_size: int = encoding.get_vocab_size()
        self.bos_token_id: int | None = encoding.token_to_id(BOS)
        byte_of = _byte_of_character()
        self._bytes = [b""] * self.vocab_size
        for token, number in encoding.get_vocab().items():
            self._bytes[number] = (
                BOS.encode() if token == BOS else bytes(byte_of[character] for character in token)
            )

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int) -> BPETokenizer:
        """One with a vocabulary of `vocab_size`, the begin-of-text token included, trained on `texts`.

        The same for the same texts. Raises `ValueError` for a vocabulary below 257, and where the texts have too
        few pairs to merge for it.
        """
        if vocab_size < SMALLEST:
            raise ValueError(f"vocab_size={vocab_size} is not accepted: it must be at least {SMALLEST}")
        encoding = _untrained()
        trainer = _tokenizers().trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[BOS],
            initial_alphabet=sorted(_byte_of_character()),
            show_progress=False,
        )
        encoding.train_from_iterator(texts, trainer)
        if encoding.get_vocab_size() != vocab_size:
            raise ValueError(
                f"vocab_size={vocab_size} is not accepted: the text has pairs for {encoding.get_vocab_size()} "
                "tokens only"
            )
        return cls(encoding)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> BPETokenizer:
        """The one that `save` wrote to `path`; a `ValueError` says what is wrong with the file."""
        from_str = _tokenizers().Tokenizer.from_str
        try:
            text = Path(path).read_text(encoding="utf-8")
        except OSError as error:
            raise ValueError(f"tokenizer: cannot read {str(path)!r} ({error.strerror})") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"tokenizer: {str(path)!r} is not UTF-8 ({error.reason})") from error
        try:
            encoding = from_str(text)
        except Exception as error:  # The library raises nothing more specific.
            raise ValueError(f"tokenizer: {str(path)!r} is damaged or not a tokenizer: {error}") from error
        _check(str(path), encoding)
        return cls(encoding)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes it to `path`, as JSON that the library tokenizers reads."""
        with atomic_write(path) as temporary:
            temporary.write_text(self._encoding.to_str(), encoding="utf-8")

    def encode(self, text: str) -> Tokens:
        # The library is given what is UTF-8: for lone surrogates, which are not, this raises a ValueError.
        text.encode("utf-8")
        return np.asarray(self._encoding.encode(text, add_special_tokens=False).ids, np.int64)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return b"".join(self._bytes[i] for i in checked_ids(ids, self.vocab_size))

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


def _untrained() -> Any:
    library = _tokenizers()
    encoding = library.Tokenizer(library.models.BPE())
    encoding.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    encoding.decoder = library.decoders.ByteLevel()
    encoding.add_special_tokens([BOS])
    return encoding


def _check(path: str, encoding: Any) -> None:
    """Raises `ValueError` unless every text has tokens and they give it back."""
    vocabulary = encoding.get_vocab()
    characters = set(_byte_of_character())
    if (
        _settings(encoding) != _settings(_untrained())
        or not characters <= set(vocabulary)
        or not set().union(*(set(token) for token in vocabulary if token != BOS)) <= characters
        or sorted(vocabulary.values()) != list(range(len(vocabulary)))
    ):
        raise ValueError(
            f"tokenizer: {path!r} is not accepted: it must be a byte-level BPE with {BOS} as its one special "
            "token, as `python -m engine data --train-bpe` writes it"
        )


def _settings(encoding: Any) -> Any:
    """All of an encoding but what training makes."""
    values = json.loads(encoding.to_str())
    del values["model"]["vocab"], values["model"]["merges"]
    return values


def _byte_of_character() -> dict[str, int]:
    """Byte-level BPE writes every byte as a character: itself where it prints, else one from U+0100 on."""
    alphabet = sorted(_tokenizers().pre_tokenizers.ByteLevel.alphabet())
    printed = {character: ord(character) for character in alphabet if ord(character) < 256}
    others = sorted(set(range(256)) - set(printed.values()))
    return printed | dict(zip(alphabet[len(printed) :], others, strict=True))


def _tokenizers() -> Any:
    try:
        return importlib.import_module("tokenizers")
    except ImportError as error:
        raise ValueError("a trained BPE needs the package tokenizers: pip install '.[data]'") from error
