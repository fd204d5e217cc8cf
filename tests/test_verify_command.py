"""`python -m engine`: its exit statuses, and that an error of the user's is one line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness import EVERY_BACKEND
from safetensors.torch import safe_open, save_file

from engine import TTTConfig, TTTModel
from engine.__main__ import main
from engine.golden import carried_cases

# The quickest one: what every case gives on every backend is tests/test_golden.py's.
CASE = next(path for path in carried_cases() if path.stem == "swa-full")


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.endswith("\n")
    return error


def test_the_carried_cases_hold(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify"]) == 0
    output = capsys.readouterr().out
    assert "all 4 cases hold" in output
    assert "FAIL" not in output
    for group in (
        "token nll",
        "loss",
        "inner gradients",
        "fast weights",
        "meta-gradients",
        "fast weights (prefill)",
    ):
        assert f"  {group} " in output


def test_one_file_on_one_backend() -> None:
    command = [sys.executable, "-m", "engine", "verify", str(CASE), "--backend", "reference"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "all 1 cases hold" in done.stdout


def test_a_tampered_case_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with safe_open(CASE, "pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    tensors["params/language_model.model.h.blocks.seq_modeling_block.wk.weight"][2, 3, 4] += 0.1
    save_file(tensors, tmp_path / "tampered.safetensors", metadata=metadata)
    assert main(["verify", str(CASE), str(tmp_path / "tampered.safetensors")]) == 1
    output = capsys.readouterr().out
    assert "1 of 2 cases FAIL" in output
    assert output.index("FAIL") > output.index("tampered.safetensors")


def test_bad_input_is_one_line_and_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(CASE.read_bytes()[:10000])
    assert main(["verify", str(CASE), str(truncated)]) == 2
    assert "truncated.safetensors is damaged" in one_line(capsys)
    assert main(["verify", str(tmp_path / "nothing.safetensors")]) == 2
    assert "nothing.safetensors: there is no such file" in one_line(capsys)
    assert main(["verify", str(tmp_path)]) == 2
    assert "no such file" in one_line(capsys)
    assert main(["verify", str(CASE), "--backend", "abacus"]) == 2
    assert "abacus" in one_line(capsys)
    assert main(["verify", str(CASE), "--device", "nothing"]) == 2
    assert "nothing" in one_line(capsys)


def test_a_backend_that_cannot_run_here_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for backend in {"cpu", "triton", "cuda"} - set(EVERY_BACKEND):
        assert main(["verify", str(CASE), "--backend", backend]) == 2
        assert backend in one_line(capsys)


def test_info(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    output = capsys.readouterr().out
    assert all(name in output for name in (*TTTConfig.presets(), "reference"))
    assert main(["info", "--preset", "3b"]) == 0
    assert "hidden_size        2560" in capsys.readouterr().out
    model = TTTModel(TTTConfig.preset("tiny"), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert main(["info", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert model.fingerprint() in output
    assert f"{model.num_parameters:,}" in output


def test_info_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--preset", "2b"]) == 2
    assert "tiny, 125m, 350m, 760m, 1b, 3b" in one_line(capsys)
    assert main(["info", str(tmp_path)]) == 2
    assert "config.json: there is no such file" in one_line(capsys)


@pytest.mark.parametrize(
    "command", [["--help"], ["verify", "--help"], ["info", "--help"], ["generate", "--help"]]
)
def test_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_status:
        main(command)
    assert exit_status.value.code == 0
    assert "usage: python -m engine" in capsys.readouterr().out
