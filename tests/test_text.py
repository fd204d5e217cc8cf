"""Real text: files, and the standard library."""

from pathlib import Path

import pytest

from engine.text import read_text, standard_library_text


def test_standard_library_is_the_same_text_every_time_and_long_enough() -> None:
    text = standard_library_text(100_000)
    assert text == standard_library_text(100_000)
    assert len(text.encode()) >= 100_000
    assert "import" in text
    assert standard_library_text(200_000).startswith(text)


def test_standard_library_is_without_tests_and_installed_packages() -> None:
    text = standard_library_text(10**9)
    assert 2_000_000 < len(text.encode()) < 40_000_000
    assert "def test_getitem_error" not in text


def test_a_file_is_read_as_utf8(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_bytes("naïve 日本\r\n".encode())
    assert read_text(path) == "naïve 日本\r\n"


@pytest.mark.parametrize(
    ("data", "reason"), [(None, "No such file"), (b"", "empty"), (b"ab\xff", "UTF-8.*byte 2")]
)
def test_files_that_hold_no_text_are_refused(tmp_path: Path, data: bytes | None, reason: str) -> None:
    path = tmp_path / "text"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ValueError, match=reason):
        read_text(path)
    with pytest.raises(ValueError, match="Is a directory"):
        read_text(tmp_path)
