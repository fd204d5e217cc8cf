"""The log of a training run: every step once, whatever was killed when."""

from __future__ import annotations

import io
import json
import math
import os
import re
import socket
import subprocess
import sys
import threading
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from engine.training import progress
from engine.training.log import TrainLog, WandbOptions

KEYS = ["step", "loss", "grad_norm", "lr", "inner_lr", "tokens", "tokens_per_s", "seconds"]


def record(log: TrainLog, *steps: int, **values: float) -> None:
    for step in steps:
        log.record(
            step,
            **{"loss": step / 2, "grad_norm": 1.5, "lr": 0.1, "inner_lr": 1.0, "tokens": 8, "seconds": 0.5}  # type: ignore[arg-type]
            | values,
        )


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_line_for_every_step(tmp_path: Path) -> None:
    with TrainLog(tmp_path / "new" / "folder", 3) as log:
        record(log, 1)
        # Read while it is open: the line must not wait in a buffer.
        assert lines(tmp_path / "new" / "folder") == [
            {
                "step": 1,
                "loss": 0.5,
                "grad_norm": 1.5,
                "lr": 0.1,
                "inner_lr": 1.0,
                "tokens": 8,
                "tokens_per_s": 16.0,
                "seconds": 0.5,
            }
        ]
        record(log, 2, 3)
    assert [line["step"] for line in lines(tmp_path / "new" / "folder")] == [1, 2, 3]
    assert list(lines(tmp_path / "new" / "folder")[2]) == KEYS


def test_numbers_without_json_become_null(tmp_path: Path) -> None:
    with TrainLog(tmp_path, 1) as log:
        record(log, 1, loss=math.nan, grad_norm=math.inf)
    (line,) = lines(tmp_path)
    assert line["loss"] is line["grad_norm"] is None


@pytest.mark.parametrize("resume_step", [0, 1, 2, 4])
@pytest.mark.parametrize("tail", ["", '{"step": 5, "lo', '{"step": 3}'])
def test_resuming_drops_what_comes_after(tmp_path: Path, resume_step: int, tail: str) -> None:
    with TrainLog(tmp_path, 9) as log:
        record(log, 1, 2, 3, 4)
    before = lines(tmp_path)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(tail)
    with TrainLog(tmp_path, 9, resume_step=resume_step) as log:
        assert lines(tmp_path) == before[:resume_step]
        record(log, resume_step + 1, loss=7.0)
    assert [line["step"] for line in lines(tmp_path)] == list(range(1, resume_step + 2))
    assert lines(tmp_path)[-1]["loss"] == 7.0
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("line", ["not json", "[]", '{"loss": 1}', '{"step": "1"}'])
def test_a_damaged_line_is_refused(tmp_path: Path, line: str) -> None:
    text = f'{{"step": 1}}\n{line}\n{{"step": 2}}\n'
    (tmp_path / "metrics.jsonl").write_text(text)
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 2 is not that of a step"):
        TrainLog(tmp_path, 9, resume_step=2)
    assert (tmp_path / "metrics.jsonl").read_text() == text


def test_refuses_what_is_out_of_order(tmp_path: Path) -> None:
    for resume_step in (-1, 10):
        with pytest.raises(ValueError, match=rf"resume_step={resume_step} is not accepted"):
            TrainLog(tmp_path, 9, resume_step=resume_step)
    with TrainLog(tmp_path, 9, resume_step=2) as log:
        for step in (2, 4):
            with pytest.raises(ValueError, match=rf"step={step} is not accepted: it must be 3"):
                record(log, step)
        with pytest.raises(ValueError, match="seconds=0 is not accepted"):
            record(log, 3, seconds=0)
        record(log, 3)
    assert [line["step"] for line in lines(tmp_path)] == [3]


LINE = r"step {}/9: loss \S+, grad 1\.5, 16 tokens/s, ends (\d{{4}}-\d\d-\d\d )?\d\d:\d\d"


def test_first_and_last_line_without_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with TrainLog(tmp_path, 9, resume_step=2) as log:
        record(log, 3, 4, 5)
    first, last = capsys.readouterr().err.splitlines()
    assert re.fullmatch(LINE.format(3), first)
    assert re.fullmatch(LINE.format(5), last)


def test_a_line_as_often_as_it_is_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with TrainLog(tmp_path, 9) as log:
        for step in range(1, 10):
            now[0] += 11
            record(log, step)
    assert [int(line[5]) for line in capsys.readouterr().err.splitlines()] == [1, 4, 7, 9]


def test_nothing_is_told_of_no_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with TrainLog(tmp_path, 9, resume_step=9):
        pass
    assert capsys.readouterr().err == ""


def test_expected_end_goes_on_at_the_same_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    evening = datetime(2026, 1, 31, 22, 0)
    monkeypatch.setattr(progress, "datetime", SimpleNamespace(now=lambda: evening))
    clock = progress.Clock(total_steps=10, resume_step=4)
    now[0] += 1200
    assert clock.end(6) == "22:40"
    now[0] += 3300
    assert clock.end(7) == "23:15"
    now[0] += 10700
    assert clock.end(8) == "2026-02-01 00:06"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_bar_on_a_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    with TrainLog(tmp_path, 9, resume_step=2) as log:
        record(log, 3, 4)
    shown = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert "2/9" in shown
    assert "4/9" in shown
    assert "loss 2.0000, grad 1.5, 16 tokens/s, ends " in shown


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"pip install '\.\[wandb\]'"):
        TrainLog(tmp_path, 9, WandbOptions(project="p", mode="offline"))


class FakeWandb(SimpleNamespace):
    """Keeps what it was asked for."""

    def __init__(self) -> None:
        class Error(Exception):
            pass

        super().__init__(errors=SimpleNamespace(Error=Error), Settings=dict, calls=[], fail=None)

    def init(self, **arguments: Any) -> FakeWandb:
        if self.fail is not None:
            raise self.fail
        self.calls.append(arguments)
        return self

    def log(self, values: dict[str, float], step: int) -> None:
        self.calls.append((step, values))

    def finish(self) -> None:
        self.calls.append("finish")


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_weights_and_biases_is_told_every_step(tmp_path: Path, wandb: FakeWandb) -> None:
    options = WandbOptions(project="p", entity="e", key="secret", mode="online")
    with TrainLog(tmp_path, 9, options) as log:
        record(log, 1, 2)
    begun, *told, end = wandb.calls
    assert {name: begun[name] for name in ("project", "entity", "mode", "dir", "settings")} == {
        "project": "p",
        "entity": "e",
        "mode": "online",
        "dir": tmp_path,
        "settings": {"api_key": "secret"},
    }
    assert [step for step, _ in told] == [1, 2]
    assert list(told[0][1]) == KEYS[1:]
    assert end == "finish"


def test_a_resumed_run_is_the_same_run(tmp_path: Path, wandb: FakeWandb) -> None:
    options = WandbOptions(project="p")
    for resume_step in (0, 3, 0):
        TrainLog(tmp_path, 9, options, resume_step).close()
    first, resumed, anew = (call["id"] for call in wandb.calls if isinstance(call, dict))
    assert first == resumed != anew


def test_a_run_that_cannot_begin_is_told(tmp_path: Path, wandb: FakeWandb) -> None:
    wandb.fail = wandb.errors.Error("no API key")
    with pytest.raises(ValueError, match="Weights & Biases: the run cannot begin: no API key"):
        TrainLog(tmp_path, 9, WandbOptions(project="p"))


def test_without_options_it_is_not_asked(tmp_path: Path, wandb: FakeWandb) -> None:
    with TrainLog(tmp_path, 9) as log:
        record(log, 1)
    assert wandb.calls == []


def test_refuses_options() -> None:
    with pytest.raises(ValueError, match="mode='shared' is not accepted"):
        WandbOptions(project="p", mode="shared")
    with pytest.raises(ValueError, match="project='' is not accepted"):
        WandbOptions(project="")
    assert "secret" not in repr(WandbOptions(project="p", key="secret"))


OFFLINE = """
import sys
from engine.training.log import TrainLog, WandbOptions

for resume_step in (0, 1):
    with TrainLog(sys.argv[1], 2, WandbOptions(project="p", mode="offline"), resume_step) as log:
        log.record(resume_step + 1, loss=1.0, grad_norm=1.0, lr=0.1, inner_lr=1.0, tokens=8, seconds=0.5)
"""


@pytest.mark.slow
def test_offline_calls_nobody(tmp_path: Path) -> None:
    """The real package, with a server of ours in the place of theirs."""
    pytest.importorskip("wandb")
    callers = []

    def answer(server: socket.socket) -> None:
        while True:
            try:
                connection, caller = server.accept()
            except OSError:
                return
            callers.append(caller)
            connection.close()

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=answer, args=(server,), daemon=True)
        thread.start()
        url = f"http://127.0.0.1:{server.getsockname()[1]}"
        environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB")}
        environment |= {"HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path), "WANDB_BASE_URL": url}
        environment |= {"http_proxy": url, "https_proxy": url, "WANDB_API_KEY": "0" * 40}
        done = subprocess.run(
            [sys.executable, "-c", OFFLINE, str(tmp_path / "run")],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
    assert callers == []
    assert [line["step"] for line in lines(tmp_path / "run")] == [1, 2]
    written = list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(written) == 2
    assert len({path.name for path in written}) == 1
