"""The benchmarks: what they count, what they write, and what they refuse."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import decode, machine, measure, prefill
from bench.flops import decode_weight_bytes, mean_visible_keys, prefill_flops_per_token
from bench.table import format_table
from engine import TTTConfig

SHORT = ["--context", "160", "--mini-batch", "32", "--window", "48", "--repeat", "1"]


@pytest.mark.parametrize(("context", "window"), [(1, 1), (7, 3), (7, 7), (7, 100), (64, 16), (50, None)])
def test_mean_visible_keys_counts_every_query(context: int, window: int | None) -> None:
    seen = [
        sum(1 for key in range(query + 1) if window is None or query - key < window)
        for query in range(context)
    ]
    assert mean_visible_keys(context, window) == sum(seen) / context


def test_useful_operations_of_125m_are_the_published_count() -> None:
    config = TTTConfig.preset("125m", window=2048)
    assert prefill_flops_per_token(config, 4096) == pytest.approx(0.715e9, abs=0.001e9)


def test_useful_operations_are_those_of_every_product() -> None:
    config = TTTConfig.preset("tiny", num_layers=5, suffix_layers=3, vocab_size=300, window=10)
    d, i, keys = config.hidden_size, config.intermediate_size, 10 * (10 + 1) / 2 / 40 + 10 * 30 / 40
    attention_matrices, mlp, scores = 4 * d * d, 3 * d * i, 2 * d * keys
    forward = [attention_matrices, mlp, scores] * 5 + [mlp] * 3 + [d * 300]
    # Of the inner loss: through the head, then in every block with a fast MLP through the static MLP, the
    # fast MLP and, but for the first such block, the attention, whose backward is four products.
    inputs = [d * 300] + [mlp] + [mlp + attention_matrices + mlp + 2 * scores] * 2
    # The first fast MLP needs its gate's and up's gradients, not its input's.
    inputs += [d * i]
    weights = [mlp] * 3
    assert prefill_flops_per_token(config, 40) == pytest.approx(2 * sum(forward + inputs + weights))


def test_baselines_have_neither_fast_mlps_nor_an_inner_loop() -> None:
    config = TTTConfig.preset("125m").as_full_attention(4096)
    d, i = 768, 2048
    expected = 12 * (2 * (4 * d * d + 3 * d * i) + 4 * d * (4096 + 1) / 2) + 2 * d * 128256
    assert prefill_flops_per_token(config, 4096) == pytest.approx(expected)


def test_decode_reads_every_matrix_once_and_fast_ones_per_sequence() -> None:
    config = TTTConfig.preset("tiny")
    d, i = config.hidden_size, config.intermediate_size
    shared, fast = 4 * (4 * d * d + 3 * d * i) + 256 * d, 3 * d * i
    assert decode_weight_bytes(config, torch.bfloat16) == 2 * (shared + fast)
    assert decode_weight_bytes(config, torch.float32, batch=3) == 4 * (shared + 3 * fast)


def test_pieces_are_whole_mini_batches_and_add_up() -> None:
    config = TTTConfig.preset("tiny")
    assert prefill.pieces(config, 65536) == (4096,) * 16
    assert prefill.pieces(config, 1000) == (128,) * 7 + (104,)
    assert prefill.pieces(config, 5) == (5,)
    assert prefill.pieces(config, 16 * 128 + 1) == (256,) * 8 + (1,)


def test_a_table_lines_up() -> None:
    text = format_table(("name", "of", "n"), [("a", "bb", "1,000"), ("long one", "b", "2")])
    assert text.splitlines() == [
        "name      of      n",
        "-------------------",
        "a         bb  1,000",
        "long one  b       2",
    ]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without the seconds that ceilings and processes take, nor those of threads that wait for each other."""
    monkeypatch.setattr(machine, "product_rate", lambda dtype, device: 1e11)
    monkeypatch.setattr(decode, "read_bandwidth", lambda device: 1e10)
    tasks = {"measure": measure.measure, "check": measure.check}
    monkeypatch.setattr(prefill, "in_child", lambda job: tasks[job.task](job))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("dtype", "compared"), [("float32", "worst"), ("bfloat16", "mean")])
@pytest.mark.usefixtures("quick")
def test_prefill_writes_an_object_for_every_run(
    dtype: str, compared: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, plot = tmp_path / "runs.json", tmp_path / "plot.png"
    pytest.importorskip("matplotlib")
    arguments = ["--dtype", dtype, "--batch", "2", "--compare", "all"]
    assert prefill.main([*SHORT, *arguments, "--json", str(file), "--plot", str(plot)]) == 0
    runs: list[dict[str, Any]] = json.loads(file.read_text())
    assert {run["model"] for run in runs} == {"ttt-e2e", "full-attention", "sliding-window"}
    for run in runs:
        assert (run["preset"], run["context"], run["batch"], run["device"]) == ("tiny", 160, 2, "cpu")
        assert run["dtype"] == dtype
        assert run["tokens_per_s"] == pytest.approx(2 * 160 / min(run["seconds"]))
        assert run["flops_per_s"] == pytest.approx(run["tokens_per_s"] * run["flops_per_token"])
        assert run["share_of_peak"] == pytest.approx(run["flops_per_s"] / run["peak_flops_per_s"])
        assert run["position"] == list(range(32, 161, 32))
        assert len(run["seconds_per_token_by_position"]) == 5
        assert run["peak_memory_bytes"] >= 0
        # Random weights predict bytes no better than chance, to begin with.
        assert 3.0 < run["mean_nll"] < 6.5
    out, err = capsys.readouterr()
    assert "full-attention" in out
    assert f"{compared} difference" in err
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plot.png", "runs.json"]


@pytest.mark.usefixtures("quick")
def test_prefill_reads_the_users_text(tmp_path: Path) -> None:
    text, file = tmp_path / "text", tmp_path / "runs.json"
    text.write_text("a" * 161)
    arguments = [*SHORT, "--compare", "none", "--text", str(text), "--json", str(file)]
    assert prefill.main(arguments) == 0
    (run,) = json.loads(file.read_text())
    assert run["text"] == str(text)
    # One letter again and again is learnt while it is read.
    assert run["mean_nll"] < 5.0


@pytest.mark.parametrize(
    ("dtype", "first", "error"), [("float32", -1, 1e-4), ("bfloat16", 0, 0.04)], ids=["float32", "bfloat16"]
)
@pytest.mark.usefixtures("quick")
def test_no_speed_is_reported_of_a_wrong_result(
    dtype: str,
    first: int,
    error: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    right = measure.TTTModel.prefill

    def wrong(model: Any, tokens: torch.Tensor, state: Any, *, backend: str) -> Any:
        out = right(model, tokens, state, backend="reference")
        if backend == "other":
            out.nll[:, first:] += error
        return out

    monkeypatch.setattr(measure.TTTModel, "prefill", wrong)
    monkeypatch.setattr(prefill.options, "select", lambda *arguments: "other")
    file = tmp_path / "runs.json"
    assert prefill.main([*SHORT, "--dtype", dtype, "--compare", "none", "--json", str(file)]) == 1
    out, err = capsys.readouterr()
    assert "tokens/s" not in out + err
    assert "disagrees with the reference" in err
    assert not file.exists()


@pytest.mark.usefixtures("quick")
def test_a_model_that_cannot_be_measured_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = prefill.in_child

    def failing(job: measure.Job) -> dict[str, Any]:
        if job.task == "measure" and job.config["window"] is None:
            raise RuntimeError("the process was ended by SIGKILL")
        return run(job)

    monkeypatch.setattr(prefill, "in_child", failing)
    file = tmp_path / "runs.json"
    assert prefill.main([*SHORT, "--compare", "full-attention", "--json", str(file)]) == 1
    assert [run["model"] for run in json.loads(file.read_text())] == ["ttt-e2e"]
    assert "full-attention" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--preset", "huge"], "huge"),
        (["--text", "missing.txt"], "missing.txt"),
        (["--text", __file__, "--context", "1000000"], "too short"),
        (["--backend", "abacus"], "abacus"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--device", "nothing"], "nothing"),
        (["--context", "0"], "--context=0"),
        (["--mini-batch", "-1"], "--mini-batch=-1"),
        (["--repeat", "0"], "--repeat=0"),
        (["--compare", "reference,others"], "others"),
        (["--tokenizer", "missing.model"], "missing.model"),
        (["--plot", "plot.txt"], "plot.txt"),
        (["--plot", "missing/plot.png"], "missing"),
        (["--json", "missing/runs.json"], "missing"),
    ],
)
@pytest.mark.usefixtures("quick")
def test_prefill_refuses_bad_input_in_one_line(
    arguments: list[str],
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert prefill.main(["--json", "runs.json", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert named in err
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("quick")
def test_decode_writes_its_share_of_the_bandwidth(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.json"
    assert (
        decode.main(
            ["--preset", "tiny", "--dtype", "float32", "--tokens", "4", "--prompt", "8", "--json", str(file)]
        )
        == 0
    )
    (run,) = json.loads(file.read_text())
    assert run["weight_bytes_per_step"] == decode_weight_bytes(TTTConfig.preset("tiny"), torch.float32)
    assert run["share_of_bandwidth"] == pytest.approx(
        run["tokens_per_s"] * run["weight_bytes_per_step"] / 1e10
    )
    assert "tokens/s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["--tokens", "0"], "--tokens=0"), (["--tokens", "1000"], "too many"), (["--preset", "x"], "x")],
)
@pytest.mark.usefixtures("quick")
def test_decode_refuses_bad_input_in_one_line(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert decode.main(arguments) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert named in err


def job(**changes: Any) -> measure.Job:
    config = TTTConfig.preset("tiny").to_dict()
    return replace(measure.Job("measure", config, "reference", "cpu", "missing.npy", 1, (5,)), **changes)


@pytest.mark.slow
def test_a_childs_failure_is_an_error_here() -> None:
    with pytest.raises(RuntimeError, match="ended with status 1"):
        measure.in_child(job())


def test_a_childs_refusal_is_a_value_error_here() -> None:
    with pytest.raises(ValueError, match="nothing"):
        measure.in_child(job(config={"nothing": 1}))


@pytest.mark.slow
def test_prefill_runs_from_any_folder(tmp_path: Path) -> None:
    script = Path(prefill.__file__).resolve()
    arguments = [*SHORT, "--compare", "full-attention", "--json", "runs.json"]
    done = subprocess.run(
        [sys.executable, str(script), *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "tokens/s" in done.stdout
    runs = json.loads((tmp_path / "runs.json").read_text())
    assert [run["model"] for run in runs] == ["ttt-e2e", "full-attention"]
    for run in runs:
        # A tiny model and its temporaries: some megabytes, not what torch itself takes.
        assert 1e6 < run["peak_memory_bytes"] < 1e9
        assert run["peak_flops_per_s"] > 1e8
