"""The choice of configurations: what is timed, what is remembered, and files that are damaged."""

import json
from pathlib import Path

import pytest
import torch

from ttt_kernels import triton_launch, tuning
from ttt_kernels.tuning import Config

FAST, SLOW = (Config((("BQ", size),), 4, 1) for size in (64, 16))
KEY = ("bfloat16", 64)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A device on which FAST is faster, and an empty cache."""
    monkeypatch.setenv("TTT_KERNELS_CACHE", str(tmp_path / "new"))
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(tuning, "_untimed", set())
    monkeypatch.setattr(tuning, "_may_choose", lambda: True)
    monkeypatch.setattr(tuning, "_capturing", lambda: False)
    monkeypatch.setattr(tuning, "_device", lambda: "device")
    monkeypatch.setattr(tuning, "_time", lambda launch, config: 1.0 if config == FAST else 2.0)
    return tmp_path / "new" / "device.json"


def launched(key: tuple = KEY, configs: tuple[Config, ...] = (SLOW, FAST)) -> Config:
    found: list[Config] = []
    tuning.run("kernel", key, configs, found.append)
    assert len(found) == 1
    return found[0]


def forbid_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(launch: object, config: Config) -> float:
        raise AssertionError("timed again")

    monkeypatch.setattr(tuning, "_time", fail)


def test_the_fastest_is_chosen_once_and_remembered(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert launched() == FAST
    forbid_timing(monkeypatch)
    assert launched() == FAST
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(tuning, "_untimed", set())
    assert launched() == FAST
    with pytest.raises(AssertionError, match="timed again"):
        launched(("bfloat16", 128))


def test_other_configurations_are_timed_anew(cache: Path) -> None:
    assert launched() == FAST
    assert launched(configs=(FAST, SLOW)) == FAST


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"kernel": "no"}', "\x00\x01"])
def test_a_damaged_file_is_replaced(cache: Path, content: str) -> None:
    cache.parent.mkdir()
    cache.write_text(content)
    assert launched() == FAST
    assert list(json.loads(cache.read_text()).values()) == [1]
    assert [p.name for p in cache.parent.iterdir()] == ["device.json"]


def test_what_others_have_added_is_kept(cache: Path) -> None:
    launched()
    cache.write_text(json.dumps({"another": 0}))
    launched(("bfloat16", 128))
    assert json.loads(cache.read_text())["another"] == 0


def test_a_folder_that_cannot_be_written(cache: Path) -> None:
    cache.parent.write_text("a file")
    assert launched() == FAST


def test_the_first_where_nothing_is_chosen(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_may_choose", lambda: False)
    forbid_timing(monkeypatch)
    assert launched() == SLOW
    assert not cache.exists()


def test_a_capture_takes_what_was_chosen_before(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert launched() == FAST
    forbid_timing(monkeypatch)
    monkeypatch.setattr(tuning, "_capturing", lambda: True)
    assert launched() == FAST
    assert launched(("bfloat16", 128)) == SLOW
    assert len(json.loads(cache.read_text())) == 1


def test_the_first_where_nothing_can_be_timed(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_time", lambda launch, config: float("inf"))
    assert launched() == SLOW
    assert not cache.exists()
    monkeypatch.setattr(tuning, "_time", lambda launch, config: pytest.fail("timed again"))
    assert launched() == SLOW


def test_the_file_is_read_once(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert launched() == FAST
    monkeypatch.setattr(tuning, "_read", lambda device: pytest.fail("read again"))
    assert launched() == FAST


@pytest.mark.parametrize("value", ["1", "0", ""])
def test_interpreted(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", value)
    assert tuning.interpreted() == (value == "1")


def test_much_work_has_a_choice_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[tuple] = []
    monkeypatch.setattr(tuning, "run", lambda name, key, configs, run: keys.append(key))
    for count in (3, 500, 512, 30_000, 1 << 41):
        triton_launch.launch("kernel", None, lambda _, n=count: n, [FAST], ("a",), torch.device("cpu"), {})
    assert keys[0] != keys[1] == keys[2] != keys[3] == keys[4]
