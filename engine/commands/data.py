"""`python -m engine data`: text into a store of tokens to train on."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from engine.data.bpe import FILE, BPETokenizer
from engine.data.folders import atomic_folder
from engine.data.store import Vocabulary
from engine.data.text import (
    HELD_OUT,
    SPLITS,
    Document,
    documents_of,
    encoded,
    standard_library_documents,
    text_documents,
)
from engine.data.zarr_store import write_token_store
from engine.text import read_text
from engine.tokenizers import Tokenizer, load_tokenizer

HELP = "make a store of tokens to train on from text"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `data`."""
    parser.add_argument("--output", required=True, metavar="FOLDER", help="the store: a new folder")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--text", metavar="FOLDER", help="*.txt files (UTF-8) in it and below")
    source.add_argument("--stdlib", action="store_true", help="the interpreter's own standard library")
    tokenizer = parser.add_mutually_exclusive_group()
    tokenizer.add_argument(
        "--tokenizer",
        default="bytes",
        metavar="NAME",
        help="bytes, llama3, or the path of a tokenizer.model or tokenizer.json (default: %(default)s)",
    )
    tokenizer.add_argument(
        "--train-bpe", type=int, metavar="N", help="train a tokenizer of N tokens on the split train"
    )
    parser.add_argument(
        "--held-out",
        type=float,
        default=HELD_OUT,
        metavar="X",
        help="share of the files in the split val (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Writes the store and prints what is in it; 0. Raises `ValueError` for bad input."""
    documents = standard_library_documents() if args.stdlib else text_documents(args.text)
    splits = {split: documents_of(documents, split, args.held_out) for split in SPLITS}
    with atomic_folder(args.output) as folder:
        tokenizer = _tokenizer(args, splits["train"])
        name = FILE if isinstance(tokenizer, BPETokenizer) else args.tokenizer
        vocabulary = Vocabulary(name, tokenizer.vocab_size, tokenizer.bos_token_id)
        tokens = write_token_store(
            folder,
            {split: encoded(chosen, tokenizer) for split, chosen in splits.items()},
            vocabulary,
        )
        if isinstance(tokenizer, BPETokenizer):
            tokenizer.save(folder / FILE)
    print(f"{args.output}: {vocabulary.size} tokens in the vocabulary of {vocabulary.tokenizer}")
    for split, chosen in splits.items():
        size = sum(document.path.stat().st_size for document in chosen)
        print(
            f"{split:6} {len(chosen):7,} files {tokens[split]:15,} tokens "
            f"{size / tokens[split]:8.3f} bytes per token"
        )
    return 0


def _tokenizer(args: argparse.Namespace, training: list[Document]) -> Tokenizer:
    if args.train_bpe is None:
        return load_tokenizer(args.tokenizer)
    return BPETokenizer.train(_texts(training), args.train_bpe)


def _texts(documents: list[Document]) -> Iterator[str]:
    return (read_text(document.path) for document in documents)
