"""Text as training data: which files, which split, in which order, and the stores that open by name."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from token_stores import write

from engine.data import TextStore, ZarrStore, open_store
from engine.data.text import documents_of, split_of, standard_library_documents, text_documents
from engine.tokenizers import ByteTokenizer

FILES = 60


class Marked(ByteTokenizer):
    """Bytes, each document after a token of its own."""

    vocab_size = 257
    bos_token_id = 256


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "text"
    for i in range(FILES):
        path = root / f"part{i % 3}" / f"{i}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"é{i}\r\n".encode())
    (root / "notes.md").write_text("# notes")
    (root / "empty.txt").write_bytes(b"")
    return root


def test_documents_are_the_files_that_match_and_are_not_empty(folder: Path) -> None:
    names = [document.name for document in text_documents(folder)]
    assert names == sorted(f"part{i % 3}/{i}.txt" for i in range(FILES))
    assert [document.name for document in text_documents(folder, "*.md")] == ["notes.md"]
    assert text_documents(folder)[0].path == folder / "part0" / "0.txt"


def test_folders_without_text_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"has no files \*\.py"):
        text_documents(folder, "*.py")
    with pytest.raises(ValueError, match="missing is not a folder"):
        text_documents(folder / "missing")


def test_splits_are_what_they_were() -> None:
    # By value: another hash would move files that a model was trained on into what it is measured on.
    assert [name for name in map(str, range(150)) if split_of(name) == "val"] == HELD_OUT_NAMES
    assert split_of("caf\udce9.txt") in ("train", "val")


HELD_OUT_NAMES = ["29", "72", "90", "99", "115", "143"]


@given(st.text(min_size=1), st.floats(0.01, 0.98))
def test_holding_out_more_keeps_what_is_held_out(name: str, share: float) -> None:
    if split_of(name, share) == "val":
        assert split_of(name, share + 0.01) == "val"


def test_the_share_held_out_is_what_was_asked_for() -> None:
    held = sum(split_of(f"folder/{i}", 0.2) == "val" for i in range(10_000))
    assert 1880 < held < 2120  # Three standard deviations.


@pytest.mark.parametrize("share", [0, 1, -0.1, float("nan")])
def test_shares_that_are_none(share: float) -> None:
    with pytest.raises(ValueError, match=r"held_out=.* must be above 0 and below 1"):
        split_of("name", share)


def test_every_document_is_in_one_split(folder: Path) -> None:
    documents = text_documents(folder)
    train, val = (set(documents_of(documents, split, 0.3)) for split in ("train", "val"))
    assert train | val == set(documents)
    assert not train & val
    with pytest.raises(ValueError, match="split='test' is not accepted"):
        documents_of(documents, "test")
    with pytest.raises(ValueError, match="no file of 1 falls into the split"):
        documents_of(documents[:1], "val" if split_of(documents[0].name) == "train" else "train")


def test_a_text_store_is_its_documents_in_an_order_of_its_own(folder: Path) -> None:
    documents = text_documents(folder)
    store = TextStore(documents, Marked(), name="here", tokenizer_name="marked")
    tokens = store.read(0, store.length)
    assert tokens.dtype == np.int64
    assert tokens[0] == 256
    pieces = [
        bytes(piece[piece != 256].astype(np.uint8)) for piece in np.split(tokens, np.where(tokens == 256)[0])
    ]
    contents = [document.path.read_bytes() for document in documents]
    assert sorted(pieces[1:]) == sorted(contents)
    assert pieces[1:] != contents
    again = TextStore(reversed(documents), Marked(), name="there", tokenizer_name="marked")
    assert again.read(0, again.length).tolist() == tokens.tolist()
    assert again.fingerprint() == store.fingerprint()
    assert store.vocabulary.size == 257
    assert store.read(5, 9).tolist() == tokens[5:9].tolist()
    with pytest.raises(ValueError, match="here: cannot read tokens from 0 to"):
        store.read(0, store.length + 1)
    documents[7].path.write_text("other")
    changed = TextStore(documents, Marked(), name="here", tokenizer_name="marked")
    assert changed.fingerprint() != store.fingerprint()


def test_a_document_that_is_not_utf8_is_named(folder: Path) -> None:
    (folder / "part1" / "1.txt").write_bytes(b"ab\xff")
    with pytest.raises(ValueError, match=r"1\.txt' is not UTF-8"):
        TextStore(text_documents(folder), ByteTokenizer(), name="x", tokenizer_name="bytes")


def test_the_standard_library_is_its_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {document.name for document in standard_library_documents()}
    assert {"json/decoder.py", "argparse.py"} <= names
    assert not any(name.startswith("test/") for name in names)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(ValueError, match="no sources of the standard library"):
        standard_library_documents()
    (tmp_path / "latin.py").write_bytes(b"# \xe9")
    (tmp_path / "plain.py").write_bytes(b"# e")
    assert [document.name for document in standard_library_documents()] == ["plain.py"]


def test_stores_open_by_name(folder: Path, tmp_path: Path) -> None:
    text = open_store("text", str(folder), "train", None)
    assert isinstance(text, TextStore)
    assert str(folder) in text.name
    assert text.vocabulary is not None
    assert text.vocabulary.size == 256
    library = {split: open_store("stdlib", None, split, "bytes") for split in ("train", "val")}
    assert library["train"].length > 5 * library["val"].length > 0
    assert bytes(library["val"].read(0, library["val"].length).astype(np.uint8)).decode()
    stored = open_store("books", str(write(tmp_path / "store")), "train", None)
    assert isinstance(stored, ZarrStore)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("stdlib", "somewhere", "train", None), "path='somewhere' is not accepted with dataset='stdlib'"),
        (("text", None, "train", None), "path=None is not accepted with dataset='text'"),
        (("books", None, "train", None), "path=None is not accepted with dataset='books'"),
        (("books", "nowhere", "train", None), "nowhere is not a folder"),
        (("books", "nowhere", "train", "bytes"), "tokenizer='bytes' is not accepted with dataset='books'"),
        (("text", "nowhere", "train", None), "nowhere is not a folder"),
        (("stdlib", None, "test", None), "split='test' is not accepted"),
        (("stdlib", None, "val", "nothing"), "cannot read 'nothing'"),
    ],
)
def test_data_sets_that_are_refused(
    arguments: tuple[str, str | None, str, str | None],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        open_store(*arguments)
