"""From text to token numbers and back: raw bytes, or Llama 3's byte-pair encoding."""

from __future__ import annotations

import base64
import binascii
import importlib
import importlib.util
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int64]


class Tokenizer(Protocol):
    """What the engine asks of a tokenizer."""

    vocab_size: int
    bos_token_id: int | None
    """Begins a text; None where texts begin with their first byte."""
    eos_token_id: int | None
    """Ends a text; None where nothing does."""

    def encode(self, text: str) -> Tokens:
        """Token numbers of `text`, int64 of shape (T,), without a begin-of-text token."""

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes that the tokens stand for; a token outside the vocabulary is a ValueError."""

    def decode(self, ids: Iterable[int]) -> str:
        """As decode_bytes, read as UTF-8; what is not UTF-8 becomes U+FFFD."""


class ByteTokenizer:
    """Every byte of the text's UTF-8 is a token: 256 of them, none of which begins a text."""

    vocab_size = 256
    bos_token_id: int | None = None
    eos_token_id: int | None = None

    def encode(self, text: str) -> Tokens:
        return np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.int64)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return bytes(checked_ids(ids, self.vocab_size))

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


# How Llama 3 cuts text into the pieces within which byte pairs are merged (The Llama 3 Herd of Models,
# arXiv 2407.21783, and its published tokenizer).
LLAMA3_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+"
)
LLAMA3_SPECIAL_COUNT = 256
LLAMA3_SPECIAL_NAMES = {
    0: "begin_of_text",
    1: "end_of_text",
    4: "finetune_right_pad_id",
    5: "step_id",
    6: "start_header_id",
    7: "end_header_id",
    8: "eom_id",
    9: "eot_id",
    10: "python_tag",
    11: "image",
}

# No piece of the pattern above continues after a line break with anything but white space, so text may be
# cut there without changing a token. Whole megabytes at once overflow the regular expression engine.
LINE = re.compile(r"(?<=\n)(?=\S)")
BATCH_CHARACTERS = 100_000
# A run of letters or of blanks is one piece however long it is, and very long ones overflow the engine too.
LONGEST_BATCH_CHARACTERS = 400_000


class Llama3Tokenizer:
    """
    Llama 3's tokenizer, read from the `tokenizer.model` that is published with its weights.

    The file holds one token a line, base64 and rank. Special tokens follow the ranks: 256 from 128000 on,
    of which 128000 begins and 128001 ends a text. Text is never read as special tokens, even where it
    spells one. Needs the package tiktoken.
    """

    def __init__(self, path: str | Path) -> None:
        ranks = read_ranks(Path(path))
        first = len(ranks)
        reserved = 0
        special = {}
        for offset in range(LLAMA3_SPECIAL_COUNT):
            name = LLAMA3_SPECIAL_NAMES.get(offset)
            if name is None:
                name = f"reserved_special_token_{reserved}"
                reserved += 1
            special[f"<|{name}|>"] = first + offset
        self.vocab_size = first + LLAMA3_SPECIAL_COUNT
        self.bos_token_id: int | None = special["<|begin_of_text|>"]
        self.eos_token_id: int | None = special["<|end_of_text|>"]
        try:
            tiktoken = importlib.import_module("tiktoken")
        except ImportError as error:
            raise ValueError(
                "tokenizer: Llama 3's needs the package tiktoken: pip install '.[llama3]'"
            ) from error
        self.encoding = tiktoken.Encoding(
            name=Path(path).name, pat_str=LLAMA3_PIECES, mergeable_ranks=ranks, special_tokens=special
        )

    def encode(self, text: str) -> Tokens:
        parts = [np.asarray(self.encoding.encode_ordinary(part), np.int64) for part in batches(text)]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        return bytes(self.encoding.decode_bytes(checked_ids(ids, self.vocab_size)))

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")


def load_tokenizer(name_or_path: str | Path) -> Tokenizer:
    """
    `"bytes"`, `"llama3"` (the one that the installed package llama-models carries), the path of a Llama 3
    `tokenizer.model`, or that of a `.json` with a BPE that `python -m engine data` trained. A ValueError says
    what is missing.
    """
    if name_or_path == "bytes":
        return ByteTokenizer()
    if name_or_path == "llama3":
        return Llama3Tokenizer(installed_llama3_model())
    if Path(name_or_path).suffix == ".json":
        # Imported here because it imports this module.
        from engine.data.bpe import BPETokenizer

        return BPETokenizer.load(name_or_path)
    return Llama3Tokenizer(name_or_path)


def installed_llama3_model() -> Path:
    """Where the package llama-models keeps Llama 3's tokenizer.model; found without importing the package."""
    package = importlib.util.find_spec("llama_models")
    for folder in (package.submodule_search_locations or ()) if package else ():
        path = Path(folder, "llama3", "tokenizer.model")
        if path.is_file():
            return path
    raise ValueError(
        "tokenizer: 'llama3' is read from the package llama-models, which is not installed: "
        "pip install '.[llama3]', or give the path of a tokenizer.model"
    )


def read_ranks(path: Path) -> dict[bytes, int]:
    """Tokens and their ranks from a tokenizer.model; a ValueError says what is wrong with the file."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ValueError(
            f"tokenizer: cannot read {str(path)!r} ({error.strerror}); "
            "give 'bytes', 'llama3' or the path of a Llama 3 tokenizer.model"
        ) from error
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise ValueError(
                f"tokenizer: line {number} of {str(path)!r} is not a base64 token and its rank"
            ) from error
    if sorted(ranks.values()) != list(range(len(ranks))) or any(bytes((b,)) not in ranks for b in range(256)):
        raise ValueError(
            f"tokenizer: {str(path)!r} is not whole: its {len(ranks)} tokens must have the ranks from 0 on, "
            "each once, and every single byte must be one of them"
        )
    return ranks


def batches(text: str) -> list[str]:
    """`text` cut at line breaks into parts that the encoding can take, each whole where it is encoded."""
    parts: list[str] = []
    start = end = 0
    for match in LINE.finditer(text):
        if match.start() - start > BATCH_CHARACTERS:
            # The last break within the limit, unless one line alone is longer than that.
            cut = end if end > start else match.start()
            parts.append(text[start:cut])
            start = cut
        end = match.start()
    parts.append(text[start:])
    return [
        part[i : i + LONGEST_BATCH_CHARACTERS]
        for part in parts
        for i in range(0, len(part), LONGEST_BATCH_CHARACTERS)
    ]


def checked_ids(ids: Iterable[int], vocab_size: int) -> list[int]:
    """`ids` as plain ints; a ValueError names the first that is no token."""
    plain = [int(i) for i in ids]
    wrong = next((i for i in plain if not 0 <= i < vocab_size), None)
    if wrong is not None:
        raise ValueError(f"ids: {wrong} is no token; they go from 0 to {vocab_size - 1}")
    return plain
