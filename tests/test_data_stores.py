"""Token stores: what was written is what is read, and nothing else is read in its place."""

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from token_stores import CHUNK, TOKENS, VOCABULARY, files, parts, write, write_with_zarr
from zarr.codecs import BloscCodec, ShardingCodec

from engine.data import Vocabulary, ZarrStore, write_token_store

BLOSC = BloscCodec(cname="zstd", clevel=3, shuffle="shuffle")


@settings(max_examples=15)
@given(st.data())
def test_a_store_gives_back_what_was_written(data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 300))
    vocab_size = data.draw(st.sampled_from([1, 256, 60000, 128256]))
    tokens = np.random.default_rng(length).integers(0, vocab_size, length)
    cuts = data.draw(st.lists(st.integers(0, length), max_size=5))
    with tempfile.TemporaryDirectory() as folder:
        counts = write_token_store(
            Path(folder, "store"),
            {"train": parts(tokens, cuts), "val": [tokens[:1]]},
            Vocabulary("bytes", vocab_size, None),
            chunk_tokens=data.draw(st.integers(10, 400)),
        )
        assert counts == {"train": length, "val": 1}
        store = ZarrStore(Path(folder, "store"), "train")
        assert store.length == length
        start = data.draw(st.integers(0, length))
        stop = data.draw(st.integers(start, length))
        read = store.read(start, stop)
        assert read.dtype == np.int64
        assert read.tolist() == tokens[start:stop].tolist()
        assert ZarrStore(Path(folder, "store"), "val").read(0, 1).tolist() == tokens[:1].tolist()


def test_reading_across_chunks(tmp_path: Path) -> None:
    store = ZarrStore(write(tmp_path / "store"), "train")
    assert store.read(99, 301).tolist() == TOKENS[99:301].tolist()
    assert store.read(0, 950).tolist() == TOKENS.tolist()
    assert store.name == str(tmp_path / "store" / "train")


@pytest.mark.parametrize(("start", "stop"), [(-1, 5), (0, 951), (951, 951), (5, 4)])
def test_tokens_that_there_are_not(tmp_path: Path, start: int, stop: int) -> None:
    store = ZarrStore(write(tmp_path / "store"), "train")
    with pytest.raises(ValueError, match=rf"train: .*from {start} to {stop}; .*<= 950"):
        store.read(start, stop)


@pytest.mark.parametrize(
    ("vocab_size", "dtype"),
    [(256, "uint8"), (257, "uint16"), (65536, "uint16"), (65537, "int32"), (128256, "int32")],
)
def test_tokens_are_stored_in_the_smallest_dtype(tmp_path: Path, vocab_size: int, dtype: str) -> None:
    tokens = np.array([0, vocab_size - 1])
    write_token_store(tmp_path / "store", {"train": [tokens]}, Vocabulary("bytes", vocab_size, None))
    array = zarr.open_group(tmp_path / "store", mode="r")["train"]
    assert isinstance(array, zarr.Array)
    assert (array.dtype, array.chunks) == (np.dtype(dtype), (2**20,))
    assert ZarrStore(tmp_path / "store", "train").read(0, 2).tolist() == tokens.tolist()


def test_the_vocabulary_is_kept(tmp_path: Path) -> None:
    assert ZarrStore(write(tmp_path / "ours"), "train").vocabulary == VOCABULARY
    assert ZarrStore(write_with_zarr(tmp_path / "other"), "train").vocabulary is None


@pytest.mark.parametrize("wrong", [{"tokenizer": 3}, {"vocab_size": "many"}, {"bos_token_id": [1]}])
def test_a_vocabulary_that_is_none(tmp_path: Path, wrong: dict[str, object]) -> None:
    array = zarr.open_array(write(tmp_path / "store"), path="train")
    array.attrs.update(wrong)
    with pytest.raises(ValueError, match=f"{next(iter(wrong))}=.*not accepted"):
        ZarrStore(tmp_path / "store", "train")


@pytest.mark.parametrize(
    "settings",
    [
        {"zarr_format": 2},
        {"zarr_format": 2, "compressors": None},
        {"zarr_format": 3, "compressors": [BLOSC]},
        {"zarr_format": 3, "chunk_key_encoding": {"name": "v2", "separator": "."}},
        {"zarr_format": 3, "shards": (3 * CHUNK,), "compressors": [BLOSC]},
        {
            "chunks": (3 * CHUNK,),
            "serializer": ShardingCodec(chunk_shape=(CHUNK,), index_location="start"),
            "compressors": None,
        },
    ],
)
def test_formats_that_others_write(tmp_path: Path, settings: dict[str, Any]) -> None:
    write_with_zarr(tmp_path / "store", **settings)
    store = ZarrStore(tmp_path / "store", "train")
    assert store.read(95, 605).tolist() == TOKENS[95:605].tolist()
    for path in (tmp_path / "store").rglob("*"):
        # The chunks alone: 0 to 9, c/0 to c/9, or c.0 and so on.
        if path.is_file() and path.name[-1].isdigit():
            path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"train: a chunk is damaged: \S*0, with tokens 0 to "):
        store.read(0, 10)


def test_tokens_may_all_be_zero(tmp_path: Path) -> None:
    store = ZarrStore(write(tmp_path / "store", np.zeros(250, np.int64)), "train")
    assert store.read(0, 250).tolist() == [0] * 250


@pytest.mark.parametrize(("zarr_format", "file"), [(3, "c/3"), (2, "3")])
def test_missing_chunks_are_named(tmp_path: Path, zarr_format: int, file: str) -> None:
    write_with_zarr(tmp_path / "store", zarr_format=zarr_format)
    store = ZarrStore(tmp_path / "store", "train")
    (tmp_path / "store" / "train" / file).unlink()
    assert store.read(200, 300).tolist() == TOKENS[200:300].tolist()
    # Gone since the store was opened, and read before.
    with pytest.raises(ValueError, match=rf"train: a chunk is missing: {file}, with tokens 300 to 399$"):
        store.read(250, 350)
    with pytest.raises(ValueError, match=rf"train: 1 of 10 chunks .* {file}, with tokens 300 to 399$"):
        ZarrStore(tmp_path / "store", "train")


def test_a_store_without_any_chunk(tmp_path: Path) -> None:
    shutil.rmtree(write(tmp_path / "store") / "train" / "c")
    with pytest.raises(ValueError, match=r"10 of 10 chunks are missing, the first c/0, with tokens 0 to 99"):
        ZarrStore(tmp_path / "store", "train")


@pytest.mark.parametrize("index_location", ["start", "end"])
def test_a_chunk_missing_in_a_shard_is_named(tmp_path: Path, index_location: Literal["start", "end"]) -> None:
    tokens = TOKENS.copy()
    tokens[400:500] = 0  # zarr leaves out a chunk of nothing but its fill value, unless it is told otherwise.
    write_with_zarr(
        tmp_path / "store",
        tokens,
        chunks=(3 * CHUNK,),
        serializer=ShardingCodec(chunk_shape=(CHUNK,), index_location=index_location),
        compressors=None,
        config={"write_empty_chunks": False},
    )
    store = ZarrStore(tmp_path / "store", "train")
    assert store.read(300, 400).tolist() == TOKENS[300:400].tolist()
    assert store.read(500, 950).tolist() == TOKENS[500:].tolist()
    with pytest.raises(ValueError, match=r"missing: number 1, with tokens 400 to 499, of the shard c/1$"):
        store.read(390, 410)
    (tmp_path / "store" / "train" / "c" / "2").unlink()
    with pytest.raises(ValueError, match=r"c/2, with tokens 600 to 899"):
        store.read(600, 601)


def test_shards_that_cannot_be_checked_are_refused(tmp_path: Path) -> None:
    write_with_zarr(tmp_path / "store", shards=(2 * CHUNK,))
    path = tmp_path / "store" / "train" / "zarr.json"
    metadata = json.loads(path.read_text())
    metadata["codecs"][0]["configuration"]["index_codecs"][0]["configuration"]["endian"] = "big"
    path.write_text(json.dumps(metadata))
    with pytest.raises(ValueError, match="train: the shards of this array cannot be checked"):
        ZarrStore(tmp_path / "store", "train")


@pytest.mark.parametrize("keep", [0, 3, 0.5, -1])
def test_truncated_chunks_are_named(tmp_path: Path, keep: float) -> None:
    chunk = write(tmp_path / "store") / "train" / "c" / "9"
    whole = chunk.read_bytes()
    chunk.write_bytes(whole[: int(keep * len(whole)) if keep == 0.5 else int(keep)])
    store = ZarrStore(tmp_path / "store", "train")
    with pytest.raises(ValueError, match=r"train: a chunk is damaged: c/9, with tokens 900 to 949: "):
        store.read(890, 950)


def test_every_flipped_bit_is_noticed(tmp_path: Path) -> None:
    chunk = write(tmp_path / "store") / "train" / "c" / "0"
    store = ZarrStore(tmp_path / "store", "train")
    whole = chunk.read_bytes()
    for place in range(0, len(whole), 5):
        chunk.write_bytes(whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=r"damaged: c/0, with tokens 0 to 99"):
            store.read(0, 10)


def unreadable(path: Path) -> None:
    (write(path) / "train" / "zarr.json").write_text("{")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "store is not a folder"),
        (lambda path: path.write_text("x"), "store is not a folder"),
        (lambda path: path.mkdir(), "store has no split 'train'; it has none"),
        (lambda path: write(path).joinpath("train").rename(path / "val"), "'train'; it has val$"),
        (lambda path: write_with_zarr(path, TOKENS.reshape(95, 10)), r"shape \(95, 10\).* one dimension"),
        (lambda path: write_with_zarr(path, TOKENS.astype("float32")), "dtype float32; expected .*integers"),
        (lambda path: write_with_zarr(path, TOKENS[:0]), r"shape \(0,\).*at least one"),
        (unreadable, "train is damaged or not a zarr array"),
        (lambda path: zarr.create_group(path / "train"), "train is damaged or not a zarr array"),
    ],
)
def test_what_is_no_store_is_refused(tmp_path: Path, make: Callable[[Path], object], message: str) -> None:
    make(tmp_path / "store")
    with pytest.raises(ValueError, match=message):
        ZarrStore(tmp_path / "store", "train")


def cut_short() -> Iterator[np.ndarray]:
    yield TOKENS
    raise KeyboardInterrupt


def test_an_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_token_store(tmp_path / "store", {"train": cut_short()}, VOCABULARY, chunk_tokens=CHUNK)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "split 'val' has no tokens"),
        ([np.array([], np.int64)], "split 'val' has no tokens"),
        ([np.array([3, 1000])], "split 'val' contains the token 1000; accepted are 0 to 999"),
        ([np.array([-1, 3])], "split 'val' contains the token -1"),
    ],
)
def test_tokens_that_make_no_store(tmp_path: Path, tokens: list[np.ndarray], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_token_store(tmp_path / "store", {"train": [TOKENS], "val": tokens}, VOCABULARY)
    assert not list(tmp_path.iterdir())


def test_no_store_is_replaced(tmp_path: Path) -> None:
    before = files(write(tmp_path / "store"))
    with pytest.raises(ValueError, match="store is there already"):
        write(tmp_path / "store", TOKENS[:5])
    assert files(tmp_path / "store") == before
    with pytest.raises(ValueError, match=r"there is no folder .*missing"):
        write(tmp_path / "missing" / "store")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
    with pytest.raises(ValueError, match="chunk_tokens=0 is not accepted"):
        write_token_store(tmp_path / "new", {"train": [TOKENS]}, VOCABULARY, chunk_tokens=0)


def test_fingerprint_follows_the_data(tmp_path: Path) -> None:
    def fingerprint(name: str, tokens: np.ndarray) -> str:
        return ZarrStore(write(tmp_path / name, tokens), "train").fingerprint()

    first = fingerprint("a", TOKENS)
    assert fingerprint("b", TOKENS) == first
    assert len(first) == 16
    begins, ends = TOKENS.copy(), TOKENS.copy()
    begins[0] += 1
    ends[-1] ^= 1
    changed = {fingerprint("c", begins), fingerprint("d", ends), fingerprint("e", TOKENS[:-1])}
    assert len(changed | {first}) == 4
    write_with_zarr(tmp_path / "wide", TOKENS.astype(np.int64))
    assert ZarrStore(tmp_path / "wide", "train").fingerprint() != first


def test_without_zarr_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "store")
    monkeypatch.setitem(sys.modules, "zarr", None)
    with pytest.raises(ValueError, match=r"pip install '\.\[data\]'"):
        ZarrStore(tmp_path / "store", "train")
    with pytest.raises(ValueError, match=r"pip install '\.\[data\]'"):
        write(tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["store"]
