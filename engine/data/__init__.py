"""Data for training: stores of tokens, text that becomes one, and batches of sequences."""

from __future__ import annotations

from engine.data.batches import Batches, Sequences, in_order
from engine.data.store import TokenStore, Vocabulary
from engine.data.text import TextStore, documents_of, standard_library_documents, text_documents
from engine.data.zarr_store import ZarrStore, write_token_store
from engine.tokenizers import load_tokenizer

__all__ = [
    "Batches",
    "Sequences",
    "TextStore",
    "TokenStore",
    "Vocabulary",
    "ZarrStore",
    "in_order",
    "open_store",
    "write_token_store",
]


def open_store(dataset: str, path: str | None, split: str, tokenizer: str | None) -> TokenStore:
    """The tokens of a split of a data set.

    `stdlib` is the text of the interpreter's standard library, without a path, and `text` that of the *.txt
    files in the folder `path`: both have the splits train and val, a twentieth of their files, and are read by
    `tokenizer` (what `load_tokenizer` takes; None: bytes). Any other name is that of the token store at `path`,
    whose tokens are made already, so that it takes no tokenizer.

    Raises `ValueError` for other arguments and for data that cannot be read.
    """
    if dataset == "stdlib":
        if path is not None:
            raise ValueError(f"path={path!r} is not accepted with dataset='stdlib': it must be None")
        documents = standard_library_documents()
    elif path is None:
        raise ValueError(
            f"path=None is not accepted with dataset={dataset!r}: it must be a folder, of text files for 'text', "
            "else a token store; only 'stdlib' needs none"
        )
    elif dataset == "text":
        documents = text_documents(path)
    elif tokenizer is not None:
        raise ValueError(
            f"tokenizer={tokenizer!r} is not accepted with dataset={dataset!r}, a token store: it must be None, "
            "since the tokens are made already; 'text' and 'stdlib' take one"
        )
    else:
        return ZarrStore(path, split)
    chosen = documents_of(documents, split)
    used = tokenizer or "bytes"
    return TextStore(chosen, load_tokenizer(used), name=f"{path or dataset} ({split})", tokenizer_name=used)
