"""`python -m engine data`."""

from pathlib import Path

import numpy as np
import pytest
from token_stores import files

from engine.__main__ import main
from engine.data import Vocabulary, ZarrStore, open_store
from engine.data.bpe import BPETokenizer
from engine.data.text import split_of
from engine.tokenizers import load_tokenizer

NAMES = [f"a{i}.txt" for i in range(40)]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for name in NAMES:
        (folder / name).write_text(f"This is the text of {name}, and the text is the text.\n" * 3)
    return folder


def stored(path: Path, split: str) -> np.ndarray:
    store = ZarrStore(path, split)
    return store.read(0, store.length)


def test_bytes_of_a_folder(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "--output", str(tmp_path / "store"), "--text", str(text), "--held-out", "0.3"]) == 0
    out = capsys.readouterr().out.splitlines()
    for split, line in zip(("train", "val"), out[1:], strict=True):
        names = [name for name in NAMES if split_of(name, 0.3) == split]
        tokens = stored(tmp_path / "store", split)
        assert len(tokens) == sum((text / name).stat().st_size for name in names)
        written = bytes(tokens.astype(np.uint8)).decode()
        assert all((text / name).read_text() in written for name in names)
        assert (
            line.split() == f"{split} {len(names)} files {len(tokens):,} tokens 1.000 bytes per token".split()
        )
    assert str(tmp_path / "store") in out[0]
    assert ZarrStore(tmp_path / "store", "val").vocabulary == Vocabulary("bytes", 256, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["store", "text"]


def test_what_it_writes_is_what_training_from_text_reads(text: Path, tmp_path: Path) -> None:
    assert main(["data", "--output", str(tmp_path / "store"), "--text", str(text)]) == 0
    store = open_store("text", str(text), "train", None)
    assert stored(tmp_path / "store", "train").tolist() == store.read(0, store.length).tolist()


def test_a_trained_bpe(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    unseen = next(name for name in NAMES if split_of(name) == "val")
    (text / unseen).write_text("zqzqzqzq " * 500)
    assert main(["data", "--output", str(tmp_path / "a"), "--text", str(text), "--train-bpe", "290"]) == 0
    tokenizer = load_tokenizer(tmp_path / "a" / "tokenizer.json")
    assert isinstance(tokenizer, BPETokenizer)
    assert ZarrStore(tmp_path / "a", "train").vocabulary == Vocabulary(
        "tokenizer.json", 290, tokenizer.bos_token_id
    )
    tokens = stored(tmp_path / "a", "train")
    documents = [
        tokenizer.decode(part[1:]) for part in np.split(tokens, np.where(tokens == tokens[0])[0])[1:]
    ]
    assert tokens[0] == tokenizer.bos_token_id
    assert sorted(documents) == sorted(
        (text / name).read_text() for name in NAMES if split_of(name) == "train"
    )
    # Not one merge was learnt from what is held out.
    assert len(tokenizer.encode("zqzqzqzq")) == 8
    again = ["data", "--output", str(tmp_path / "b"), "--text", str(text), "--tokenizer"]
    assert main([*again, str(tmp_path / "a" / "tokenizer.json")]) == 0
    assert files(tmp_path / "b") == files(tmp_path / "a")


@pytest.mark.slow
def test_the_standard_library(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "--output", str(tmp_path / "store"), "--stdlib"]) == 0
    for split in ("train", "val"):
        store = open_store("stdlib", None, split, "bytes")
        assert np.array_equal(stored(tmp_path / "store", split), store.read(0, store.length))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "there", "--text", "text"], "there is there already"),
        (["--output", "no/where", "--text", "text"], "there is no folder"),
        (["--output", "new", "--text", "missing"], "missing is not a folder"),
        (["--output", "new", "--text", "there"], r"has no files \*.txt"),
        (["--output", "new", "--text", "text", "--held-out", "1"], "held_out=1.0 is not accepted"),
        (["--output", "new", "--text", "text", "--held-out", "0.000001"], "into the split 'val'"),
        (["--output", "new", "--text", "text", "--tokenizer", "nothing"], "cannot read 'nothing'"),
        (["--output", "new", "--text", "text", "--train-bpe", "5"], "vocab_size=5 is not accepted"),
        (["--output", "new", "--text", "text", "--train-bpe", "99999"], "the text has pairs for"),
    ],
)
def test_bad_input_is_one_line_status_2_and_nothing_written(
    arguments: list[str],
    message: str,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").mkdir()
    before = sorted(tmp_path.rglob("*"))
    assert main(["data", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert message.replace("\\", "") in err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_file_that_is_not_utf8_leaves_no_store(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (text / "a39.txt").write_bytes(b"\xff")
    assert main(["data", "--output", str(tmp_path / "store"), "--text", str(text)]) == 2
    assert "a39.txt' is not UTF-8" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["text"]
