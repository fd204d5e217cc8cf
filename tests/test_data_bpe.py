"""A byte-pair encoding trained on the spot."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.data.bpe import BOS, BPETokenizer
from engine.text import standard_library_text
from engine.tokenizers import Tokenizer, load_tokenizer

TEXT = standard_library_text(30_000)
TRAINED = BPETokenizer.train([TEXT], 400)


def test_it_describes_itself() -> None:
    tokenizer: Tokenizer = TRAINED
    assert (tokenizer.vocab_size, tokenizer.eos_token_id) == (400, None)
    assert tokenizer.bos_token_id is not None
    assert tokenizer.decode([tokenizer.bos_token_id]) == BOS
    assert tokenizer.encode("").shape == (0,)


@given(st.text() | st.text(alphabet=" \t\n\r'sé<|begin_of_text|>\x00\u0120日🙂"))
def test_round_trip(text: str) -> None:
    ids = TRAINED.encode(text)
    assert TRAINED.decode_bytes(ids) == text.encode()
    assert TRAINED.decode(ids) == text
    assert TRAINED.bos_token_id not in ids


def test_text_is_never_read_as_the_special_token() -> None:
    text = f"{BOS} a{BOS}"
    ids = TRAINED.encode(text)
    assert TRAINED.bos_token_id not in ids
    assert TRAINED.decode(ids) == text


def test_training_merges_what_is_frequent() -> None:
    assert len(TRAINED.encode(TEXT)) < 0.6 * len(TEXT.encode())
    assert len(TRAINED.encode(" the")) == 1


def test_cut_characters_are_bytes() -> None:
    ids = TRAINED.encode("日")
    assert len(ids) > 1
    assert TRAINED.decode_bytes(ids[:1]) == "日".encode()[:1]
    assert TRAINED.decode(ids[:1]) == "\ufffd"


def test_the_same_text_trains_the_same(tmp_path: Path) -> None:
    TRAINED.save(tmp_path / "a.json")
    BPETokenizer.train([TEXT], 400).save(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_a_saved_one_is_loaded_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    TRAINED.save(path)
    loaded = load_tokenizer(str(path))
    assert isinstance(loaded, BPETokenizer)
    assert (loaded.vocab_size, loaded.bos_token_id) == (400, TRAINED.bos_token_id)
    text = f"naïve {BOS} 日本"
    assert loaded.encode(text).tolist() == TRAINED.encode(text).tolist()
    assert loaded.decode(loaded.encode(text)) == text


@pytest.mark.parametrize("ids", [[0, 400], [-1]])
def test_what_is_no_token_is_not_decoded(ids: list[int]) -> None:
    with pytest.raises(ValueError, match="go from 0 to 399"):
        TRAINED.decode(ids)


def test_text_that_is_no_text() -> None:
    with pytest.raises(ValueError, match="surrogates"):
        TRAINED.encode("\ud800")


def test_vocabularies_that_cannot_be_trained() -> None:
    assert BPETokenizer.train([], 257).vocab_size == 257
    with pytest.raises(ValueError, match="vocab_size=256 is not accepted: it must be at least 257"):
        BPETokenizer.train([TEXT], 256)
    with pytest.raises(
        ValueError, match=r"vocab_size=300 is not accepted: the text has pairs for 25. tokens"
    ):
        BPETokenizer.train(["ab"], 300)


def without_byte(values: dict[str, Any]) -> None:
    # The last token takes its number, so that the numbers still have no gap.
    vocabulary = values["model"]["vocab"]
    last = max(vocabulary, key=vocabulary.get)
    vocabulary[last] = vocabulary.pop("~")
    values["model"]["merges"] = []


def with_gap(values: dict[str, Any]) -> None:
    vocabulary = values["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] = 500


def with_other_character(values: dict[str, Any]) -> None:
    values["model"]["vocab"]["日"] = 400


@pytest.mark.parametrize(
    "damage",
    [
        without_byte,
        with_gap,
        with_other_character,
        lambda values: values.update(normalizer={"type": "Lowercase"}),
        lambda values: values["pre_tokenizer"].update(add_prefix_space=True),
        lambda values: values.update(added_tokens=[]),
        lambda values: values.update(
            truncation={"max_length": 9, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
        ),
    ],
)
def test_encodings_that_would_change_text_are_refused(
    tmp_path: Path, damage: Callable[[dict[str, Any]], object]
) -> None:
    path = tmp_path / "tokenizer.json"
    TRAINED.save(path)
    values = json.loads(path.read_text())
    damage(values)
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"tokenizer\.json' is (not accepted|damaged)"):
        load_tokenizer(path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "No such file"),
        (b"", "damaged or not a tokenizer"),
        (b"{}", "damaged or not a tokenizer"),
        (b"\xff", "not UTF-8"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, data: bytes | None, message: str) -> None:
    path = tmp_path / "tokenizer.json"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(path)


def test_without_its_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match=r"pip install '\.\[data\]'"):
        BPETokenizer.train([TEXT], 300)
