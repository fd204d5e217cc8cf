"""bench/train.py: what it counts, what it writes, what it catches, and what it refuses."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench import machine, train, train_child
from bench.contest import measure_in_turns
from bench.flops import prefill_flops_per_token, training_flops_per_token, visible_pairs
from bench.memory import PeakMemory
from engine import TTTConfig

SHORT = ["--context", "64", "--mini-batch", "32", "--window", "40", "--repeat", "2"]
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_layers": 2,
    "num_heads": 1,
    "suffix_layers": 1,
    "vocab_size": 256,
}


def test_useful_operations_are_those_of_every_product() -> None:
    """Four blocks, two with fast MLPs; three mini-batches of 8, of which two are learnt from."""
    config = TTTConfig.preset(
        "tiny", num_layers=4, suffix_layers=2, vocab_size=300, mini_batch_size=8, window=10
    )
    d, i = config.hidden_size, config.intermediate_size
    q_k_v, o, matrix = 3 * d * d, d * d, d * i
    per_pair = d  # one product of attention
    keys = [min(position + 1, 10) for position in range(24)]
    count = 0
    for position in range(24):
        pairs = keys[position] * per_pair
        count += 2 * (3 * (q_k_v + o + 3 * matrix) + 6 * pairs)
        if position < 16:
            # y = x W; dx = dy W; then for y its x and W, for dx its dy and W.
            linear = 1 + 1 + 2 + 2
            count += linear * d * 300
            # The first suffix block: attention as in a prefix block, fast MLP without the gradient of its input.
            count += 3 * (q_k_v + o) + 6 * pairs
            fast_forward, fast_gradient = 3, 4
            count += (fast_forward + fast_gradient) * 3 * matrix
            count += linear * 3 * matrix
            # The second one.
            count += linear * (q_k_v + o) + (2 + 4 + 12 + 4) * pairs
            count += (3 + 6) * 3 * matrix
            count += linear * 3 * matrix
        else:
            count += 3 * d * 300
            count += 2 * (3 * (q_k_v + o + 2 * 3 * matrix) + 6 * pairs)
    assert training_flops_per_token(config, 24) == pytest.approx(2 * count / 24)


@given(context=st.integers(1, 100), window=st.none() | st.integers(1, 100), layers=st.integers(1, 4))
def test_a_transformer_learns_at_three_times_the_cost_of_reading(
    context: int, window: int | None, layers: int
) -> None:
    config = TTTConfig.preset("tiny", num_layers=layers, suffix_layers=0, window=window)
    expected = 3 * prefill_flops_per_token(config, context)
    assert training_flops_per_token(config, context) == pytest.approx(expected)


@given(steps=st.integers(1, 6), suffix=st.integers(1, 3), window=st.none() | st.integers(1, 60))
def test_a_step_that_nobody_sees_is_not_counted(steps: int, suffix: int, window: int | None) -> None:
    """Only the last mini-batch is free of an inner step: its own share is that of any MLP beside others."""
    config = TTTConfig.preset(
        "tiny", num_layers=3, suffix_layers=suffix, window=window, mini_batch_size=8, vocab_size=64
    )
    d, i, context = config.hidden_size, config.intermediate_size, 8 * steps
    plain = 3 * (3 * (4 * d * d + 3 * d * i) + suffix * 3 * d * i + 64 * d) * context
    plain += 6 * 3 * d * visible_pairs(context, context, window)
    total = training_flops_per_token(config, context) * context / 2
    assert (total == pytest.approx(plain)) == (steps == 1)
    assert total >= plain * (1 - 1e-12)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    """A model of a few thousand weights, and neither the seconds of ceilings and processes nor of threads."""
    monkeypatch.setattr(machine, "product_rate", lambda dtype, device: 1e11)
    tasks = {"measure": train_child.measure, "check": train_child.check}
    monkeypatch.setattr(train, "in_child", lambda job: tasks[job.task](job))
    chosen = train.chosen_config
    monkeypatch.setattr(train, "chosen_config", lambda *given: replace(chosen(*given), **SMALL))


@pytest.mark.usefixtures("quick")
def test_an_object_for_every_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "runs.json"
    arguments = [*SHORT, "--batch", "2", "--compare", "all", "--dtype", "float32", "--json", str(file)]
    assert train.main(arguments) == 0
    runs: list[dict[str, Any]] = json.loads(file.read_text())
    # The reference backend by the graph, and this backend by every other method, but nothing twice.
    assert [(run["model"], run["method"]) for run in runs] == [
        ("ttt-e2e", "rollback"),
        ("ttt-e2e", "graph"),
        ("ttt-e2e", "graph"),
        ("ttt-e2e", "snapshots"),
        ("full-attention", None),
        ("sliding-window", None),
    ]
    assert [run["backend"] for run in runs[:3]] == [runs[0]["backend"], "reference", runs[0]["backend"]]
    assert [run["checkpoint_blocks"] for run in runs] == [True, False, True, True, True, True]
    # Of two mini-batches one is read again.
    assert [run["snapshot_every"] for run in runs] == [None, None, None, 1, None, None]
    assert [run["window"] for run in runs] == [40, 40, 40, 40, None, 40]
    for run in runs:
        assert (run["preset"], run["context"], run["batch"], run["dtype"]) == ("tiny", 64, 2, "float32")
        assert (run["device"], run["mini_batch"], run["vocab"]) == ("cpu", 32, 256)
        assert len(run["seconds"]) == 2
        assert run["tokens_per_s"] == pytest.approx(2 * 64 / min(run["seconds"]))
        assert run["flops_per_s"] == pytest.approx(run["tokens_per_s"] * run["flops_per_token"])
        assert run["share_of_peak"] == pytest.approx(run["flops_per_s"] / run["peak_flops_per_s"])
        assert run["peak_memory_bytes"] > run["extra_memory_bytes"] >= 0
        assert 3.0 < run["loss"] < 8.0
        assert "cpu" in run["machine"]
    # One model, one loss.
    for run in runs[1:4]:
        assert run["loss"] == pytest.approx(runs[0]["loss"], rel=1e-5)
    out, err = capsys.readouterr()
    assert "useful operations" in out
    assert out.count("full-attention") == 2
    assert "relative error of the gradients" in err


@pytest.mark.usefixtures("quick")
def test_lengths_beside_the_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "runs.json"
    arguments = [*SHORT[2:], "--lengths", "32,64", "--method", "rollback", "--no-checkpoint-blocks"]
    assert train.main([*arguments, "--json", str(file)]) == 0
    runs = json.loads(file.read_text())
    assert [run["context"] for run in runs] == [32, 64]
    assert {(run["model"], run["method"], run["checkpoint_blocks"]) for run in runs} == {
        ("ttt-e2e", "rollback", False)
    }
    out, err = capsys.readouterr()
    first, second = (line.split() for line in out.splitlines() if line.startswith("ttt-e2e"))
    assert first.count("1.000") >= 1
    ratio = runs[0]["tokens_per_s"] / runs[1]["tokens_per_s"]
    assert f"{ratio:.3f}" in second
    # The gradient is checked once: at every length it would be of the same short problem.
    assert err.count("checking") == 1


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("wrong", ["fast_down", "w_qkv", "missing", "nan"])
def test_no_speed_of_a_wrong_gradient(
    wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = train_child._step

    def broken(model: Any, tokens: torch.Tensor, job: train_child.Job) -> torch.Tensor:
        if job.backend != "other":
            return right(model, tokens, job)
        loss = right(model, tokens, replace(job, backend="reference"))
        block = model.blocks[-1]
        if wrong == "missing":
            block.seq_norm.grad = None
        elif wrong == "nan":
            block.seq_norm.grad[0] = math.nan
        else:
            # Queries are the first third of w_qkv, and their gradients far smaller than the values'.
            gradient = getattr(block, wrong).grad
            gradient[: len(gradient) // 3] *= 1 + 1e-3
        return loss

    monkeypatch.setattr(train_child, "_step", broken)
    monkeypatch.setattr(train.options, "select", lambda *arguments: "other")
    file = tmp_path / "runs.json"
    arguments = [*SHORT, "--compare", "none", "--dtype", "float32", "--json", str(file)]
    assert train.main(arguments) == 1
    out, err = capsys.readouterr()
    assert "tokens/s" not in out + err
    assert "disagrees with the reference" in err
    assert not file.exists()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("failing_window", [None, 40])
def test_a_model_that_cannot_be_measured_leaves_the_others(
    failing_window: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = train.in_child

    def failing(job: train_child.Job) -> dict[str, Any]:
        if job.task == "measure" and job.config["window"] == failing_window:
            raise RuntimeError("the process was ended by SIGKILL")
        return run(job)

    monkeypatch.setattr(train, "in_child", failing)
    file = tmp_path / "runs.json"
    assert train.main([*SHORT, "--compare", "full-attention", "--json", str(file)]) == 1
    left = ["ttt-e2e"] if failing_window is None else ["full-attention"]
    assert [run["model"] for run in json.loads(file.read_text())] == left
    out, err = capsys.readouterr()
    assert "SIGKILL" in err
    # With nothing to compare, nothing is compared.
    assert "multiples" not in out


@pytest.mark.usefixtures("quick")
def test_a_check_that_fails_is_no_permission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def failing(job: train_child.Job) -> dict[str, Any]:
        assert job.task == "check"
        raise RuntimeError("the process was ended by SIGKILL")

    monkeypatch.setattr(train, "in_child", failing)
    assert train.main([*SHORT, "--compare", "none", "--json", str(tmp_path / "runs.json")]) == 1
    assert "SIGKILL" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_contenders_take_turns() -> None:
    """Round by round, until one fails."""
    work = [(SimpleNamespace(label=name), name) for name in "abc"]
    turns: list[str] = []

    def measure(job: str) -> dict[str, Any]:
        turns.append(job)
        if turns == ["a", "b", "c", "a", "b"]:
            raise RuntimeError("no more")
        return {"turn": len(turns)}

    found = measure_in_turns(work, measure, 3)
    assert turns == ["a", "b", "c", "a", "b", "c", "a", "c"]
    assert [(c.label, [r["turn"] for r in results]) for c, results in found] == [
        ("a", [1, 4, 7]),
        ("c", [3, 6, 8]),
    ]


def test_a_smaller_vocabulary() -> None:
    args = train.parse(["--preset", "125m", "--vocab", "4096"])
    config = train.chosen_config(args, "float32")
    # Its beginning of text is not among so few.
    assert (config.vocab_size, config.bos_token_id) == (4096, None)
    assert train.chosen_config(train.parse(["--preset", "125m"]), "float32").bos_token_id == 128000


@given(
    name=st.sampled_from(TTTConfig.presets()), mini_batch=st.integers(1, 3000), window=st.integers(1, 9000)
)
def test_the_problem_of_the_check_is_short(name: str, mini_batch: int, window: int) -> None:
    config = TTTConfig.preset(name, mini_batch_size=mini_batch, window=window)
    short = train_child.short(config)
    assert short.mini_batch_size == min(mini_batch, 128)
    assert short.window is not None
    assert short.window < train_child.CHECK_STEPS * short.mini_batch_size
    assert short.vocab_size <= 2048
    assert (short.bos_token_id is None) == (config.bos_token_id is None)
    assert (short.num_layers, short.suffix_layers) == (config.num_layers, config.suffix_layers)


def test_the_whole_process_includes_what_is_forgotten() -> None:
    memory = PeakMemory(torch.device("cpu"))
    large = torch.ones(32 * 2**20)
    high = memory.process_bytes()
    del large
    memory.restart()
    # The system's counts are some pages off.
    assert memory.process_bytes() > high - 2**22 > 2**27
    assert memory.process_bytes() >= memory.peak_bytes()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--preset", "huge"], "huge"),
        (["--text", "missing.txt"], "missing.txt"),
        (["--text", __file__, "--context", "1048576"], "too short"),
        (["--backend", "abacus"], "abacus"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--context", "0"], "--context=0"),
        (["--context", "200"], "--context=200"),
        (["--mini-batch", "-1"], "--mini-batch=-1"),
        (["--vocab", "0"], "--vocab=0"),
        (["--repeat", "0"], "--repeat=0"),
        (["--compare", "reference,others"], "others"),
        (["--lengths", "128,many"], "128,many"),
        (["--lengths", "128,-128"], "--lengths=-128"),
        (["--lengths", "128,200"], "--lengths=200"),
        (["--lengths", "128", "--context", "128"], "--context"),
        (["--lengths", "128", "--compare", "graph"], "--compare"),
        (["--tokenizer", "missing.model"], "missing.model"),
        (["--json", "missing/runs.json"], "missing"),
    ],
)
def test_bad_input_is_refused_in_one_line(
    arguments: list[str],
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert train.main(["--json", "runs.json", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert named in err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_it_runs_from_any_folder(tmp_path: Path) -> None:
    script = Path(train.__file__).resolve()
    arguments = [*SHORT, "--compare", "full-attention", "--json", "runs.json"]
    done = subprocess.run(
        [sys.executable, str(script), *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    runs = json.loads((tmp_path / "runs.json").read_text())
    assert [run["model"] for run in runs] == ["ttt-e2e", "full-attention"]
    for run in runs:
        # At least the gradients of some two million weights; torch and the weights only in the whole process.
        assert 4e6 < run["extra_memory_bytes"] < 5e8
        assert 1e8 < run["peak_memory_bytes"] < 4e9
        assert run["peak_flops_per_s"] > 1e8
