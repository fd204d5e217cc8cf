"""bench/kernels.py: what it counts, what it checks, what it writes, and what it refuses."""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import attention_contenders, attention_problem, kernel_child, kernels, kernels_attention, machine
from bench.attention_contenders import contender
from bench.attention_problem import ORDERS, Problem
from bench.flops import visible_pairs
from bench.memory import PeakMemory, release_memory
from ttt_kernels.swa import operator

CPU = torch.device("cpu")
PROBLEM = Problem(2, 40, 4, 2, 8, 12, "float32")
SHORT = [
    *("attention", "--length", "40", "--window", "12", "--heads", "4", "--kv-heads", "2", "--head-dim", "8"),
    *("--dtype", "float32", "--repeat", "2", "--backend", "reference"),
]
BASELINES = ("sdpa-flash", "sdpa-math", "sdpa-tiles")


@pytest.mark.parametrize(
    ("queries", "keys", "window"),
    [
        (1, 1, 1),
        (7, 7, None),
        (7, 7, 3),
        (7, 7, 7),
        (7, 7, 50),
        (5, 9, None),
        (5, 9, 3),
        (5, 9, 6),
        (4, 9, 20),
    ],
)
def test_pairs_are_those_that_see_each_other(queries: int, keys: int, window: int | None) -> None:
    positions = range(keys - queries, keys)
    seen = [(i, j) for i in positions for j in range(i + 1) if window is None or i - j < window]
    assert visible_pairs(queries, keys, window) == len(seen)
    mask = attention_contenders.band(queries, keys, CPU, window)
    assert mask.nonzero().tolist() == [[i - (keys - queries), j] for i, j in seen]


def test_useful_operations_are_those_of_every_product() -> None:
    pairs = sum(min(i + 1, 12) for i in range(40))
    one = 2 * 8 * pairs * 2 * 4
    assert [PROBLEM.flops(order) / one for order in ORDERS] == [2, 4, 12, 18]


@pytest.mark.parametrize("window", [None, 12, 40, 100])
@pytest.mark.parametrize("name", ["ttt_kernels/reference", *BASELINES])
def test_every_contender_computes_the_same(name: str, window: int | None) -> None:
    chosen, problem = contender(name), replace(PROBLEM, window=window)
    if chosen.refusal(problem):
        assert name == "sdpa-tiles"
        assert not problem.windowed
        return
    truths = attention_problem.truths(problem, ORDERS)
    for order in chosen.orders:
        x = chosen.arrange(problem.inputs(CPU))
        found = chosen.rearrange(chosen.prepare(problem, x, order)())
        assert [f.shape for f in found] == [t.shape for t in truths["short"][order][0]]
        for part in truths.values():
            assert all(e <= bound for e, bound in attention_problem.verdicts(found, *part[order]))


@pytest.mark.parametrize("window", [None, 5, 12, 33])
def test_the_last_rows_need_only_the_last_keys(window: int | None) -> None:
    problem = replace(PROBLEM, window=window)
    whole = attention_problem.last_rows(problem, ORDERS, 40)
    tail = attention_problem.last_rows(problem, ORDERS, 7)
    for order in ORDERS:
        for all_rows, rows in zip(whole[order][0], tail[order][0], strict=True):
            assert rows.shape[1] == 7
            assert torch.allclose(all_rows[:, -7:], rows, rtol=1e-12, atol=1e-12)


def test_a_long_problem_is_checked_short_with_a_window_that_moves() -> None:
    problem = replace(PROBLEM, length=8192, window=2048)
    short = problem.short()
    assert short.windowed
    assert (short.heads, short.kv_heads, short.head_dim) == (4, 2, 8)
    assert replace(PROBLEM, length=8192, window=512).short().window == 512
    assert not replace(PROBLEM, length=8192, window=8192).short().windowed
    assert PROBLEM.short() == PROBLEM


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are counted from here on Linux")
def test_memory_that_was_freed_is_counted_again() -> None:
    def work() -> int:
        return len([torch.ones(25_000) for _ in range(300)])

    work()
    release_memory(CPU)
    memory = PeakMemory(CPU)
    memory.restart()
    work()
    assert memory.peak_bytes() == pytest.approx(30e6, rel=0.1)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without the seconds that ceilings and processes take, nor those of threads that wait for each other."""
    monkeypatch.setattr(machine, "product_rate", lambda dtype, device: 1e11)
    monkeypatch.setattr(kernels, "in_child", kernel_child.run)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("head_dim", "serves"), [("64", True), ("257", False)])
def test_backends_are_those_that_serve_such_heads(head_dim: str, serves: bool) -> None:
    pytest.importorskip("triton")
    parser = argparse.ArgumentParser()
    kernels_attention.add_arguments(parser)
    args = parser.parse_args(["--head-dim", head_dim, "--baselines", "none"])
    assert ("ttt_kernels/triton" in kernels_attention.contenders(args, "float32", CPU)) == serves


@pytest.mark.slow
@pytest.mark.usefixtures("quick")
def test_an_object_for_every_contender_order_and_length(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    file, plot = tmp_path / "rows.json", tmp_path / "plot.png"
    arguments = [*SHORT, "--length", "40", "24", "--json", str(file), "--plot", str(plot)]
    assert kernels.main(arguments) == 0
    rows: list[dict[str, Any]] = json.loads(file.read_text())
    expected = {("ttt_kernels/reference", order) for order in ORDERS}
    expected |= {("sdpa-flash", "forward"), ("sdpa-flash", "backward"), ("sdpa-tiles", "forward")}
    expected |= {("sdpa-math", "double-backward"), ("sdpa-math", "all")}
    assert {(r["contender"], r["order"]) for r in rows} == expected
    assert len(rows) == 2 * len(expected)
    for r in rows:
        problem = replace(PROBLEM, batch=1, length=r["length"])
        assert (r["operator"], r["status"], r["device"], r["dtype"]) == (
            "attention",
            "measured",
            "cpu",
            "float32",
        )
        assert (r["window"], r["heads"], r["kv_heads"], r["head_dim"]) == (12, 4, 2, 8)
        assert len(r["seconds"]) == 2
        assert r["seconds_best"] == min(r["seconds"]) <= r["seconds_median"]
        assert r["flops_per_s"] == pytest.approx(problem.flops(r["order"]) / r["seconds_best"])
        assert r["share_of_peak"] == pytest.approx(r["flops_per_s"] / 1e11)
        assert 0 < r["error"] <= r["tolerance"] < 1e-5
        assert r["extra_peak_memory_bytes"] >= 0
        assert r["check"]["all_rows_at_length"] == r["length"]
        assert "cpu" in r["machine"]
        if r["own"]:
            rivals = [
                o for o in rows if not o["own"] and (o["order"], o["length"]) == (r["order"], r["length"])
            ]
            best = min(o["seconds_best"] for o in rivals)
            assert r["times_faster"] == pytest.approx(best / r["seconds_best"])
    out = capsys.readouterr().out
    blocks = out.split("\n\n")
    assert [block for block in blocks if block in ORDERS] == list(ORDERS)
    assert sum(line.startswith("sdpa-flash ") for line in out.splitlines()) == 4
    assert "times faster" in out
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plot.png", "rows.json"]


def off_by_a_little(kernel: Any, position: int, rows: slice) -> Any:
    def wrong(*arguments: Any, **settings: Any) -> Any:
        results = [t.clone() for t in kernel(*arguments, **settings)]
        results[position][:, rows] *= 1 + 1e-4
        return tuple(results)

    return wrong


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("position", [0, 1, 2, 3])
def test_no_speed_is_reported_of_a_wrong_result(
    position: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = operator.kernels["reference"]
    wrong = off_by_a_little(own["double_backward"], position, slice(None))
    monkeypatch.setitem(own, "double_backward", wrong)
    file = tmp_path / "rows.json"
    orders = ["--orders", "backward", "double-backward", "--baselines", "sdpa", "--json", str(file)]
    assert kernels.main([*SHORT, *orders]) == 1
    rows = {(r["contender"], r["order"]): r for r in json.loads(file.read_text())}
    found = rows["ttt_kernels/reference", "double-backward"]
    assert found["status"] == "wrong"
    assert found["error"] == pytest.approx(1e-4, rel=0.1)
    assert not [key for key in found if "seconds" in key or "per_s" in key or "faster" in key][1:]
    assert rows["ttt_kernels/reference", "backward"]["status"] == "measured"
    (line,) = (li for li in capsys.readouterr().out.splitlines() if "WRONG" in li)
    assert line.startswith("ttt_kernels/reference")


@pytest.mark.usefixtures("quick")
def test_an_error_that_only_the_full_length_shows_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_problem, "CHECK_LENGTH", 24)
    right = operator.kernels["reference"]["forward"]
    wrong = off_by_a_little(right, 0, slice(24, None))
    monkeypatch.setitem(operator.kernels["reference"], "forward", wrong)
    file = tmp_path / "rows.json"
    assert kernels.main([*SHORT, "--orders", "forward", "--baselines", "none", "--json", str(file)]) == 1
    assert [r["status"] for r in json.loads(file.read_text())] == ["wrong"]


@pytest.mark.usefixtures("quick")
def test_a_result_that_is_not_a_number_is_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = operator.kernels["reference"]["forward"]
    monkeypatch.setitem(
        operator.kernels["reference"], "forward", lambda *a: (right(*a)[0] * float("nan"), *right(*a)[1:])
    )
    file = tmp_path / "rows.json"
    assert kernels.main([*SHORT, "--orders", "forward", "--baselines", "none", "--json", str(file)]) == 1
    (found,) = json.loads(file.read_text())
    assert (found["status"], found["error"]) == ("wrong", None)


@pytest.mark.usefixtures("quick")
def test_what_would_not_fit_is_left_out_with_a_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # 16 matrices of scores and a mask, of which 60 % are not there.
    needed = 16 * 4 * 40 * 40 * 4 + 40 * 40 * 7
    file = tmp_path / "rows.json"
    arguments = [*SHORT, "--orders", "double-backward", "--baselines", "math", "--json", str(file)]
    statuses = []
    for free in (needed / 0.6 * 0.99, needed / 0.6 * 1.01):
        monkeypatch.setattr(kernels, "available_bytes", lambda device, free=free: int(free))
        assert kernels.main(arguments) == 0
        own, math = json.loads(file.read_text())
        assert own["status"] == "measured"
        statuses.append(math["status"])
        if math["status"] == "skipped":
            assert "60%" in math["reason"]
            assert f"sdpa-math, double-backward, 40: {math['reason']}" in capsys.readouterr().out
    assert statuses == ["skipped", "measured"]


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("failing", "status"), [("sdpa-flash", 0), ("ttt_kernels/reference", 1)])
def test_a_contender_that_fails_leaves_the_others(
    failing: str,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(job: kernel_child.Job) -> dict[str, Any]:
        if job.contender == failing:
            raise RuntimeError("the process was ended by SIGKILL")
        return kernel_child.run(job)

    monkeypatch.setattr(kernels, "in_child", run)
    file = tmp_path / "rows.json"
    arguments = [*SHORT, "--orders", "forward", "--baselines", "sdpa", "--json", str(file)]
    assert kernels.main(arguments) == status
    statuses = {r["contender"]: r["status"] for r in json.loads(file.read_text())}
    assert statuses.pop(failing) == "skipped"
    assert set(statuses.values()) == {"measured"}
    assert "ended by SIGKILL" in capsys.readouterr().out


@pytest.mark.usefixtures("quick")
def test_an_order_that_torch_does_not_have_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_contenders.Sdpa, "orders", ORDERS)
    truths = attention_problem.truths(PROBLEM, ORDERS)
    monkeypatch.setattr(kernel_child.torch, "load", lambda path, weights_only: truths)
    fields = {name: getattr(PROBLEM, name) for name in PROBLEM.__dataclass_fields__}
    job = kernel_child.Job("bench.kernels_attention", "sdpa-flash", fields, "cpu", ORDERS, 1, "")
    results = kernel_child.run(job)
    assert "seconds" in results["backward"]
    assert "derivative" in results["double-backward"]["reason"]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--length", "40", "0"], "--length=0"),
        (["--window", "0"], "--window=0"),
        (["--window", "wide"], "wide"),
        (["--heads", "0"], "--heads=0"),
        (["--heads", "3"], "--kv-heads=2"),
        (["--head-dim", "-1"], "--head-dim=-1"),
        (["--batch", "0"], "--batch=0"),
        (["--repeat", "0"], "--repeat=0"),
        (["--backend", "abacus"], "abacus"),
        (["--baselines", "sdpa", "abacus"], "abacus"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--json", "missing/rows.json"], "missing"),
        (["--plot", "plot.txt"], "plot.txt"),
        (["--plot", "plot.png"], "two lengths"),
    ],
)
@pytest.mark.usefixtures("quick")
def test_bad_input_is_refused_in_one_line(
    arguments: list[str],
    named: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert kernels.main([*SHORT, "--json", "rows.json", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert named in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [[], ["abacus"], ["attention", "--orders", "third"]])
def test_unknown_words_end_with_status_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        kernels.main(arguments)


@pytest.mark.slow
def test_kernels_run_from_any_folder(tmp_path: Path) -> None:
    script = Path(kernels.__file__).resolve()
    arguments = [*SHORT, "--length", "256", "--baselines", "math", "--json", "rows.json"]
    done = subprocess.run(
        [sys.executable, str(script), *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert {r["status"] for r in rows} == {"measured"}
    for r in rows:
        # At least the results: (1, 256, 4 or 2, 8) floats; at most some matrices of scores, of 1 MiB each.
        assert 30e3 < r["extra_peak_memory_bytes"] < 60e6
        assert r["peak_flops_per_s"] > 1e8
