"""Text as training data: every file a document, held out or not by its name."""

from __future__ import annotations

import fnmatch
import hashlib
import os
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.data.store import Vocabulary, check_range, fingerprint_of, token_dtype
from engine.text import library_sources, read_text
from engine.tokenizers import Tokenizer

SPLITS = ("train", "val")
HELD_OUT = 0.05


@dataclass(frozen=True)
class Document:
    """A file that is not empty, and its path relative to the folder that it was found in, with slashes."""

    name: str
    path: Path


def text_documents(folder: str | os.PathLike[str], pattern: str = "*.txt") -> list[Document]:
    """The files in `folder` and below whose names match `pattern`, by relative path; empty ones are left out.

    Raises `ValueError` where `folder` is no folder or nothing in it matches. A file that is not UTF-8 is refused
    when it is read.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"{folder} is not a folder; expected one with text files")
    paths = (
        Path(inner, name)
        for inner, _, names in os.walk(folder)
        for name in names
        if fnmatch.fnmatchcase(name, pattern)
    )
    documents = _documents(Path(folder), paths)
    if not documents:
        raise ValueError(f"{folder} has no files {pattern} with any text")
    return documents


def standard_library_documents() -> list[Document]:
    """The modules of the interpreter's own standard library, without its tests, by relative path."""
    library = Path(sysconfig.get_path("stdlib"))
    documents = _documents(library, (path for path in library_sources(library) if _is_utf8(path)))
    if not documents:
        raise ValueError(f"no sources of the standard library in {str(library)!r}; give a folder of text")
    return documents


def split_of(relative_path: str, held_out: float = HELD_OUT) -> str:
    """`val` for a share `held_out` of all paths, `train` for the others: by the path alone, the same always.

    Raises `ValueError` unless 0 < held_out < 1.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out={held_out!r} is not accepted: it must be above 0 and below 1")
    return "val" if _hash(relative_path) < held_out * 2**64 else "train"


def documents_of(documents: Iterable[Document], split: str, held_out: float = HELD_OUT) -> list[Document]:
    """Those of a split, `train` or `val`; a `ValueError` for another one, or where the split has none."""
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is not accepted for text: it must be one of {', '.join(SPLITS)}")
    every = list(documents)
    chosen = [document for document in every if split_of(document.name, held_out) == split]
    if not chosen:
        raise ValueError(
            f"no file of {len(every)} falls into the split {split!r} with held_out={held_out}; give more files "
            "or hold out another share of them"
        )
    return chosen


def encoded(documents: Iterable[Document], tokenizer: Tokenizer) -> Iterator[NDArray[np.integer]]:
    """The tokens (T,) of each document, after the begin-of-text token where the tokenizer has one.

    In the order of the hash of their names, so that neighbours are not parts of the same work.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    begin = np.array([] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id], dtype)
    for document in sorted(documents, key=lambda document: _hash(document.name)):
        yield np.concatenate([begin, tokenizer.encode(read_text(document.path)).astype(dtype)])


class TextStore:
    """The tokens of these documents, as `encoded` orders them, in memory.

    `name` is for messages, `tokenizer_name` for the vocabulary. Raises `ValueError` for a document that cannot be
    read or is not UTF-8.
    """

    def __init__(
        self, documents: Iterable[Document], tokenizer: Tokenizer, *, name: str, tokenizer_name: str
    ) -> None:
        self.name = name
        self.vocabulary = Vocabulary(tokenizer_name, tokenizer.vocab_size, tokenizer.bos_token_id)
        self._tokens = np.concatenate(
            [np.empty(0, token_dtype(tokenizer.vocab_size)), *encoded(documents, tokenizer)]
        )
        self.length = len(self._tokens)

    def read(self, start: int, stop: int) -> NDArray[np.int64]:
        check_range(self, start, stop)
        return self._tokens[start:stop].astype(np.int64)

    def fingerprint(self) -> str:
        return fingerprint_of(self._tokens.dtype, self._tokens.shape, self._tokens)


def _documents(folder: Path, paths: Iterable[Path]) -> list[Document]:
    found = (Document(path.relative_to(folder).as_posix(), path) for path in paths if path.stat().st_size)
    return sorted(found, key=lambda document: document.name)


def _is_utf8(path: Path) -> bool:
    try:
        path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    return True


def _hash(name: str) -> int:
    # File names that are not UTF-8 reach Python as lone surrogates.
    data = name.encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
