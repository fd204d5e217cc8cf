"""Text to tokens and back."""

import base64
import importlib.util
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.text import standard_library_text
from engine.tokenizers import ByteTokenizer, Llama3Tokenizer, Tokenizer, batches, load_tokenizer

needs_tiktoken = pytest.mark.skipif(
    importlib.util.find_spec("tiktoken") is None, reason="tiktoken is not installed"
)
needs_llama_models = pytest.mark.skipif(
    importlib.util.find_spec("tiktoken") is None or importlib.util.find_spec("llama_models") is None,
    reason="the extra llama3 is not installed",
)
MERGES = [b"th", b"the", b" t", b" the", b"\n\n"]


def write_model(path: Path, tokens: list[bytes]) -> Path:
    path.write_bytes(b"".join(base64.b64encode(t) + b" %d\n" % rank for rank, t in enumerate(tokens)))
    return path


@pytest.fixture
def small(tmp_path: Path) -> Tokenizer:
    return Llama3Tokenizer(
        write_model(tmp_path / "tokenizer.model", [bytes((b,)) for b in range(256)] + MERGES)
    )


@given(st.text())
def test_bytes_round_trip(text: str) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.tolist() == list(text.encode())
    assert tokenizer.decode(ids) == text


def test_bytes_describe_themselves() -> None:
    tokenizer = load_tokenizer("bytes")
    assert (tokenizer.vocab_size, tokenizer.bos_token_id, tokenizer.eos_token_id) == (256, None, None)
    assert tokenizer.encode("").shape == (0,)


def test_a_cut_character_is_decoded_as_unknown() -> None:
    assert ByteTokenizer().decode("é".encode()[:1]) == "\ufffd"
    assert ByteTokenizer().decode_bytes([0xC3]) == b"\xc3"


@pytest.mark.parametrize("ids", [[0, 256], [-1]])
def test_what_is_no_token_is_not_decoded(ids: list[int]) -> None:
    with pytest.raises(ValueError, match="go from 0 to 255"):
        ByteTokenizer().decode(ids)


@given(st.text(alphabet="ab \t\n\r,1é"), st.integers(1, 20))
def test_batches_are_the_text(text: str, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.tokenizers.BATCH_CHARACTERS", size)
        parts = batches(text)
    assert "".join(parts) == text
    # Cut only between a line break and what is not white space.
    assert all(part.endswith("\n") for part in parts[:-1])
    assert not any(part[:1].isspace() for part in parts[1:])


@needs_tiktoken
@given(st.text(alphabet="the \t\n\r,1é'sS"), st.integers(1, 20))
def test_cutting_long_text_changes_no_token(text: str, size: int) -> None:
    tokenizer = cutting_tokenizer()
    whole = tokenizer.encode(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engine.tokenizers.BATCH_CHARACTERS", size)
        assert tokenizer.encode(text).tolist() == whole.tolist()


_CUTTING: list[Tokenizer] = []


def cutting_tokenizer() -> Tokenizer:
    """Made once: hypothesis draws many examples of a test."""
    if not _CUTTING:
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            model = write_model(Path(folder, "model"), [bytes((b,)) for b in range(256)] + MERGES)
            _CUTTING.append(Llama3Tokenizer(model))
    return _CUTTING[0]


@needs_tiktoken
def test_llama3_merges_by_rank_and_numbers_specials_after_the_ranks(small: Tokenizer) -> None:
    assert small.encode("the the").tolist() == [257, 259]
    assert small.vocab_size == 256 + len(MERGES) + 256
    assert small.bos_token_id == 261
    assert small.eos_token_id == 262
    assert small.decode([261, 257]) == "<|begin_of_text|>the"


@needs_tiktoken
def test_llama3_reads_no_special_tokens_from_text(small: Tokenizer) -> None:
    text = "<|begin_of_text|> the\n"
    ids = small.encode(text)
    assert ids.max() < 261
    assert small.decode(ids) == text


@needs_tiktoken
def test_llama3_takes_very_long_runs(small: Tokenizer) -> None:
    for text in ("t" * 1_000_000, " " * 1_000_000):
        assert small.decode(small.encode(text)) == text


@needs_tiktoken
def test_llama3_refuses_what_is_no_token(small: Tokenizer) -> None:
    with pytest.raises(ValueError, match="go from 0 to 516"):
        small.decode([517])


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (None, "No such file"),
        (b"", "not whole"),
        (b"YQ== 0\n???? 1\n", "line 2"),
        (b"YQ==\n", "line 1"),
        (b"YQ== 0\nYg== 0\n", "not whole"),
        (b"YQ== 0\nYg== 1\n", "not whole"),
    ],
)
def test_damaged_model_files_are_refused(tmp_path: Path, data: bytes | None, reason: str) -> None:
    path = tmp_path / "tokenizer.model"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ValueError, match=reason):
        load_tokenizer(path)


def test_llama3_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install '\.\[llama3\]'"):
        load_tokenizer("llama3")


@needs_llama_models
def test_the_published_tokenizer() -> None:
    tokenizer = load_tokenizer("llama3")
    assert (tokenizer.vocab_size, tokenizer.bos_token_id, tokenizer.eos_token_id) == (128256, 128000, 128001)
    assert tokenizer.encode("Hello world").tolist() == [9906, 1917]
    text = standard_library_text(1_000_000)
    assert tokenizer.decode(tokenizer.encode(text)) == text
