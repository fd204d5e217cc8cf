"""`python -m engine train`: from the command line to the training loop, and errors."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from hydra.core.config_store import ConfigStore
from train_config import experiment

from engine.__main__ import main
from engine.training import app
from engine.training.groups import register
from engine.training.run import Run

TINY = "+experiment=tiny/pretrain-tiny-stdlib-e2e"
RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """Hydra gives the root logger handlers that write to what stdout is during the test."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    for handler in root.handlers:
        if handler not in handlers:
            handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Run]:
    """The runs that reached the training loop, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    runs: list[Run] = []

    def train(run: Run) -> int:
        runs.append(run)
        logging.getLogger("engine.training.loop").info("training %s", run.exp_name)
        return 0

    loop = ModuleType("engine.training.loop")
    loop.__dict__["train"] = train
    monkeypatch.setitem(sys.modules, "engine.training.loop", loop)
    return runs


def test_a_run_is_trained_and_described(
    trained: list[Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "experiments/demo/pretrain-tiny-stdlib-e2e"
    overrides = ["training.loader_workers=3", "training.wandb_key=secret", "training.total_steps=7"]
    assert main(["train", "+deploy=interactive", TINY, *overrides]) == 0
    (run,) = trained
    assert run.total_steps == 7
    out, err = capsys.readouterr()
    assert err == ""
    for text in (out, (folder / "train.log").read_text()):
        assert text.count("Launching with") == text.count("training pretrain-tiny-stdlib-e2e") == 1
        assert (
            sum("ignored" in line and "training.loader_workers=3" in line for line in text.splitlines()) == 1
        )
    assert "total_steps: 7" in (folder / "config.yaml").read_text()
    assert {path.name for path in folder.iterdir()} == {"train.log", "config.yaml"}
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and "secret" in path.read_text()]
    assert Path.cwd() == tmp_path
    assert sys.argv[1:2] != ["+deploy=interactive"]
    assert "HYDRA_FULL_ERROR" not in os.environ


@pytest.mark.slow
def test_the_status_is_that_of_the_training(trained: list[Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["engine.training.loop"], "train", lambda run: 3)
    monkeypatch.setattr(sys, "argv", ["train", TINY])
    assert app.main() == 3


def test_an_experiment_of_the_users(trained: list[Run], tmp_path: Path) -> None:
    (tmp_path / "mine/experiment").mkdir(parents=True)
    (tmp_path / "mine/experiment/small.yaml").write_text(
        "# @package _global_\n"
        "defaults:\n"
        "  - override /training: 125m/pretrain-8K\n"
        "  - override /model: 125m\n"
        "  - _self_\n"
        "training:\n"
        "  exp_name: small\n"
        "  dummy_dataset: true\n"
        "model:\n"
        "  rope_theta: 500000\n"
    )
    assert main(["train", "--config-dir", "mine", "+experiment=small"]) == 0
    (run,) = trained
    assert (run.exp_name, run.total_steps, run.dataset.dummy) == ("small", 4800, True)
    model = run.model
    assert (model.intermediate_size, model.window, model.suffix_layers, model.rope_theta) == (
        2048,
        None,
        0,
        5e5,
    )


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([TINY, "training.seq_length=1000"], "training.seq_length=1000 is not accepted"),
        ([TINY, "training.steps=3"], "training.steps"),
        (["--config-dir", "nowhere", TINY], "nowhere"),
        pytest.param(
            [TINY, "training.total_steps=many"], "training.total_steps=many", marks=pytest.mark.slow
        ),
        pytest.param(["+experiment=tiny/none"], "tiny/none", marks=pytest.mark.slow),
        pytest.param([], "training.exp_name: set it, or choose a +experiment=", marks=pytest.mark.slow),
    ],
)
def test_bad_input_is_one_line_and_status_2(
    arguments: list[str], named: str, trained: list[Run], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert trained == []
    (line,) = err.splitlines()
    assert line.startswith("python -m engine train: ")
    assert named in line


@pytest.mark.slow
def test_a_users_option_needs_a_name_of_its_own(
    trained: list[Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "training/tiny-stdlib").mkdir(parents=True)
    (tmp_path / "training/tiny-stdlib/pretrain-1K.yaml").write_text("total_steps: 1\n")
    assert main(["train", "--config-dir", str(tmp_path), TINY]) == 2
    assert "'training/tiny-stdlib/pretrain-1K' is an option that is here already" in capsys.readouterr().err


@pytest.mark.slow
def test_slurm_is_an_extra(
    trained: list[Run], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    register()
    launchers = ConfigStore.instance().repo["hydra"]["launcher"]
    monkeypatch.delitem(launchers, "submitit_slurm.yaml", raising=False)
    monkeypatch.setattr("engine.training.app.importlib.util.find_spec", lambda name: None)
    assert main(["train", "+deploy=submitit", TINY]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("pip install '.[slurm]'")


@pytest.mark.slow
def test_submitting_needs_slurm(
    trained: list[Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["train", "+deploy=submitit", TINY]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "srun" in line


def test_a_submitted_process_knows_its_rank(trained: list[Run], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("submitit")
    for name in RANKS:
        # So that what the job exports is gone after the test.
        monkeypatch.setenv(name, "99")
    job = {"JOB_ID": "5", "NTASKS": "8", "JOB_NUM_NODES": "2", "JOB_NODELIST": "node[3-4]", "PROCID": "6"}
    for name, value in (job | {"LOCALID": "2"}).items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("SUBMITIT_EXECUTOR", "slurm")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3")
    monkeypatch.delenv("MASTER_PORT")
    assert app.launch(experiment("tiny/pretrain-tiny-stdlib-e2e")) == 0
    environment = {name: os.environ.get(name) for name in RANKS}
    port = environment.pop("MASTER_PORT")
    assert environment == {
        "RANK": "6",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "2",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "node3",
    }
    assert port is not None
    assert 1024 < int(port) < 65536
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1,2,3"
    assert len(trained) == 1
    # Only the first process writes and speaks.
    assert not trained[0].log_dir.exists()
    assert logging.getLogger().level == logging.WARNING


def test_help_says_the_groups(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--help"], [TINY, "-h"]):
        assert main(["train", *arguments]) == 0
        out = capsys.readouterr().out
        for part in ("python -m engine train +experiment=tiny", "3b/extension/ext-3b-e2e-128K", "+deploy="):
            assert part in out


def test_train_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "train a model" in capsys.readouterr().out


@pytest.mark.slow
def test_cfg_shows_the_keys() -> None:
    command = [sys.executable, "-m", "engine", "train", TINY, "training.total_steps=7", "--cfg", "job"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "  total_steps: 7\n" in done.stdout
    assert "  train_mode: meta\n" in done.stdout


@pytest.mark.slow
def test_an_error_of_a_submitted_run_comes_back(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    (tmp_path / "mine/deploy").mkdir(parents=True)
    (tmp_path / "mine/deploy/processes.yaml").write_text(
        "# @package _global_\n"
        "defaults:\n"
        "  - override /hydra/launcher: submitit_local\n"
        "  - _self_\n"
        "hydra:\n"
        "  mode: MULTIRUN\n"
    )
    arguments = [TINY, f"training.exp_dir={tmp_path}", "training.total_steps=0"]
    assert main(["train", "--config-dir", str(tmp_path / "mine"), "+deploy=processes", *arguments]) == 2
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("python -m engine train: training.total_steps=0 is not accepted")
