"""bench/gpu.py: what it measures, what it keeps, what it refuses, and what it makes of its results."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_runs import SMALL

from bench import (
    gpu,
    gpu_child,
    gpu_jobs,
    gpu_operators,
    gpu_plan,
    gpu_prefill,
    gpu_store,
    machine,
)
from bench.gpu_bars import BARS
from bench.gpu_cases import Sizes, case, names
from bench.gpu_checks import CPU, SIZES, operator
from bench.gpu_context import Context
from bench.gpu_plan import Measurement, Settings, plan
from engine import config as configs
from engine.golden import carried_cases
from ttt_kernels.registry import OPERATORS

OPTIONS = [
    "--device", "cpu", "--dtype", "float32", "--presets", "small", "--train-presets", "small",
    "--lengths", "32,64", "--tokens-per-batch", "64", "--long-preset", "small", "--long", "1024",
    "--no-compiled-baselines", "--minutes", "5",
]  # fmt: skip


def in_process(
    group: Sequence[Measurement], settings: Settings, deadline: float, put: gpu_jobs.Put, *_: Any
) -> None:
    """As a child process does it."""
    context = Context(torch.device(settings.device), settings.dtype)
    for m in group:
        if time.time() + m.seconds > deadline:
            put(m.key, {"status": "skipped", "reason": "no time left"})
            continue
        gpu_child.tell_of(context, m.key, m.task, m.arguments, lambda key, **found: put(key, found))


def all_in_process(
    groups: Sequence[list[Measurement]], settings: Settings, deadline: float, put: gpu_jobs.Put
) -> None:
    for group in groups:
        in_process(group, settings, deadline, put)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> list[str]:
    """A small preset, small checks, no ceilings and no processes; gives the keys of all that is begun."""
    monkeypatch.setitem(configs._PRESETS, "small", SMALL)
    monkeypatch.setattr(machine, "product_rate", lambda dtype, device: 1e11)
    monkeypatch.setattr(machine, "copy_bandwidth", lambda device: 1e10)
    monkeypatch.setitem(SIZES, "64", Sizes(2, 7, 5, 16, 16, 2, 8, 11, 1))
    monkeypatch.delitem(SIZES, "80")
    one = [path for path in carried_cases() if path.stem == "swa-full"]
    monkeypatch.setattr(gpu_plan, "golden_files", lambda: one)
    monkeypatch.setattr(gpu_plan, "names", lambda: ["swa", "swiglu", "rope", "clipped_sgd"])
    monkeypatch.setattr(gpu_operators, "REPEAT", 1)
    monkeypatch.setattr(gpu_prefill, "MOST_RUNS", 2)
    begun: list[str] = []

    def told(context: Context, key: str, *rest: Any) -> None:
        begun.append(key)
        right(context, key, *rest)

    right = gpu_child.tell_of
    monkeypatch.setattr(gpu_child, "tell_of", told)
    monkeypatch.setattr(gpu, "run_group", in_process)
    monkeypatch.setattr(gpu, "run_side_by_side", all_in_process)
    return begun


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())["results"]
    return found


@pytest.mark.usefixtures("quick")
def test_everything_is_checked_and_measured_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    assert gpu.main([*OPTIONS, "--output", str(tmp_path)]) == 0
    found = results(tmp_path)
    settings = Settings(
        device="cpu", dtype="float32", backends=("cpu",), presets=("small",), train_presets=("small",),
        lengths=(32, 64), long_preset="small", long=1024, compiled_baselines=False,
    )  # fmt: skip
    assert set(found) == {m.key for m in plan(settings)}
    assert {k: r for k, r in found.items() if r["status"] != "measured"} == {
        "official small 32": found["official small 32"]
    }
    assert found["official small 32"]["reason"] == "no checkout was given by --official"
    own, other = (found[f"prefill small 64 {model}"] for model in ("ttt-e2e", "full-attention"))
    for run in (own, other):
        assert run["tokens_per_s"] == pytest.approx(64 / run["seconds"])
        assert min(run["runs"]) <= run["seconds"] <= max(run["runs"])
    assert other["attention"] == "sdpa-flash"
    long = found["prefill small 1024 long text"]
    seconds = long["seconds_by_part"]
    assert len(seconds) == 64
    assert long["late_over_early"] == pytest.approx(sum(seconds[60:]) / sum(seconds[1:5]))
    trained = found["train small 32 ttt-e2e"]
    assert (trained["sequences"], trained["tokens"]) == (2, 64)
    for order in found["operators small swiglu"]["orders"].values():
        assert order["flops"] > 0
        assert order["error"] <= order["tolerance"]
    text = (tmp_path / "summary.md").read_text()
    assert "RED" not in text
    assert "small 64 ttt-e2e" in text
    assert f"sources {gpu_store.sources_hash()}" in text
    for picture in ("prefill.png", "train.png", "long-text.png"):
        assert f"({picture})" in text
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    # The bars are of other models.
    assert capsys.readouterr().out.count("not measured") == len(BARS)


def test_an_interruption_loses_nothing_and_the_next_run_goes_on(
    quick: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = gpu_child.TASKS["decode"]

    def interrupted(*arguments: Any, **more: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    monkeypatch.setitem(gpu_child.TASKS, "decode", interrupted)
    command = [*OPTIONS, "--stages", "prefill,decode", "--output", str(tmp_path)]
    assert gpu.main(command) == 130
    first = results(tmp_path)
    assert "prefill small 64 full-attention" in first
    assert "decode small" not in first
    assert (tmp_path / "summary.md").exists()
    monkeypatch.setitem(gpu_child.TASKS, "decode", decode)
    quick.clear()
    assert gpu.main(command) == 0
    assert not set(quick) & set(first)
    assert results(tmp_path) | first == results(tmp_path)
    assert results(tmp_path)["decode small"]["status"] == "measured"
    quick.clear()
    assert gpu.main(command) == 0
    assert quick == []
    assert gpu.main([*command, "--again", "--stages", "decode"]) == 0
    assert quick == ["decode small"]


@pytest.mark.usefixtures("quick")
def test_no_speed_of_what_a_red_check_is_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = OPERATORS["rope"].kernels["cpu"]
    right = kernels["backward"]

    def wrong(*arguments: Any) -> tuple[Any, ...]:
        return tuple(None if t is None else t * 1.01 for t in right(*arguments))

    monkeypatch.setitem(kernels, "backward", wrong)
    assert gpu.main([*OPTIONS, "--stages", "operators,decode", "--output", str(tmp_path)]) == 1
    found = results(tmp_path)
    assert found["checks rope cpu float32"]["green"] is False
    for key in ("operators small rope", "decode small"):
        assert found[key] == {"status": "refused", "reason": "checks rope cpu float32: red"}
    assert found["operators small swiglu"]["status"] == "measured"
    text = (tmp_path / "summary.md").read_text()
    assert "| rope cpu float32 | **RED** |" in text
    assert "not measured (checks rope cpu float32: red)" in text


@pytest.mark.usefixtures("quick")
def test_what_has_no_time_is_said_to_have_none(tmp_path: Path) -> None:
    assert gpu.main([*OPTIONS, "--minutes", "0.001", "--output", str(tmp_path)]) == 0
    found = results(tmp_path)
    assert found["checks swa cpu float32"] == {"status": "skipped", "reason": "no time left"}
    assert found["decode small"]["status"] == "refused"
    text = (tmp_path / "summary.md").read_text()
    assert "not measured (no time left)" in text
    assert "not measured (checks swa cpu float32: not made (no time left))" in text


def test_results_of_other_sources_are_put_aside(tmp_path: Path) -> None:
    facts = {"cpu": "x", "commit": "a", "changed": False, "sources": "1"}
    store = gpu_store.Store(tmp_path, facts, {"dtype": "float32"})
    store.put("ceilings", {"status": "measured"})
    same = gpu_store.Store(tmp_path, facts | {"commit": "b"}, {"dtype": "float32"})
    assert same.measured("ceilings")
    for other_facts, settings in (
        (facts, {"dtype": "bfloat16"}),
        (facts | {"sources": "2"}, {"dtype": "float32"}),
    ):
        other = gpu_store.Store(tmp_path, other_facts, settings)
        assert other.moved is not None
        assert json.loads(other.moved.read_text())["results"] == {"ceilings": {"status": "measured"}}
        assert not other.results
        store.put("ceilings", {"status": "measured"})


def test_kernels_are_compiled_again_where_the_cache_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results may have come from another machine like this one."""
    pytest.importorskip("triton")
    store = gpu_store.Store(tmp_path, {}, {})
    compiled, check = (Measurement(k, "checks", k, {}, "group", 0.0) for k in ("compile", "operator check"))
    assert not gpu.done(check, store)
    for m in (compiled, check):
        store.put(m.key, {"status": "measured"})
    for folder, there in ((tmp_path, True), (tmp_path / "missing", False)):
        monkeypatch.setenv("TRITON_CACHE_DIR", str(folder))
        assert gpu.done(check, store)
        assert gpu.done(compiled, store) is there


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", names())
def test_a_check_finds_a_wrong_result_of_any_order(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    context = Context(CPU, "float32")
    (sizes,) = SIZES.values()
    op = case(name, sizes, torch.float32, CPU, 0).example.operator
    assert operator(context, name, "cpu", "float32")["green"]
    for order in op.orders("cpu"):
        kernels = op.kernels["cpu"]
        right = kernels[order]

        def off(value: Any) -> Any:
            if isinstance(value, list | tuple):
                return [off(v) for v in value]
            return value * 1.0001 if isinstance(value, torch.Tensor) and value.is_floating_point() else value

        monkeypatch.setitem(kernels, order, lambda *a, right=right: tuple(map(off, right(*a))))
        found = operator(context, name, "cpu", "float32")
        assert not found["green"]
        monkeypatch.setitem(kernels, order, right)


@pytest.mark.usefixtures("quick")
def test_a_check_finds_what_was_not_written(monkeypatch: pytest.MonkeyPatch) -> None:
    # By its own means, not by those of these tests.
    torch.use_deterministic_algorithms(False)
    kernels = OPERATORS["rms_norm"].kernels["cpu"]
    right = kernels["forward"]

    def gap(*arguments: Any) -> tuple[torch.Tensor, ...]:
        y, rstd = right(*arguments)
        other = torch.empty_like(y)
        other[:, 1:] = y[:, 1:]
        return other, rstd

    monkeypatch.setitem(kernels, "forward", gap)
    worst = max(
        operator(Context(CPU, "float32"), "rms_norm", "cpu", "float32")["orders"], key=lambda o: o["error"]
    )
    assert worst["order"] == "forward"
    assert worst["error"] == float("inf")


@pytest.mark.usefixtures("quick")
def test_no_speed_of_an_order_that_is_wrong_at_a_models_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = OPERATORS["rope"].kernels["cpu"]
    right = kernels["backward"]
    monkeypatch.setitem(kernels, "backward", lambda *a: tuple(t * 1.01 for t in right(*a)))
    found = gpu_operators.measure(Context(CPU, "float32"), "small", "rope")
    assert found["green"] is False
    assert "wrong" in found["orders"]["backward"]["reason"]
    assert "seconds" not in found["orders"]["backward"]
    assert found["orders"]["forward"]["seconds"] > 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--stages", "speed"], "speed"),
        (["--presets", "huge"], "huge"),
        (["--train-presets", "huge"], "huge"),
        (["--lengths", "8K"], "8K"),
        (["--lengths", "0"], "--lengths=0"),
        (["--lengths", "100"], "mini-batch of tiny, 128"),
        (["--long", "8320"], "64 parts"),
        (["--long-preset", "125m"], "125m"),
        (["--tokens-per-batch", "0"], "--tokens-per-batch=0"),
        (["--minutes", "0"], "--minutes=0"),
        (["--device", "nothing"], "nothing"),
        (["--official", "missing"], "missing"),
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
    few = ["--device", "cpu", "--presets", "tiny", "--train-presets", "tiny", "--long-preset", "tiny"]
    few += ["--lengths", "256", "--long", "8192", "--output", "here"]
    assert gpu.main([*few, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert named in err
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_it_runs_from_any_folder_by_processes_of_its_own(tmp_path: Path) -> None:
    script = Path(gpu.__file__).resolve()
    arguments = ["--device", "cpu", "--presets", "tiny", "--train-presets", "tiny", "--long-preset", "tiny"]
    arguments += ["--lengths", "256", "--long", "8192", "--stages", "ceilings", "--output", "here"]
    done = subprocess.run(
        [sys.executable, str(script), *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert results(tmp_path / "here")["ceilings"]["product_flops_per_s"] > 1e8
    assert "## Ceilings" in (tmp_path / "here" / "summary.md").read_text()


@pytest.mark.slow
def test_sigterm_is_an_interruption(tmp_path: Path) -> None:
    arguments = ["--device", "cpu", "--presets", "tiny", "--train-presets", "tiny", "--long-preset", "tiny"]
    arguments += ["--lengths", "256", "--long", "8192", "--output", str(tmp_path)]
    process = subprocess.Popen(
        [sys.executable, str(Path(gpu.__file__).resolve()), *arguments], stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    # The first measurement was begun.
    process.stderr.readline()
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(timeout=120) == 130
    assert (tmp_path / "summary.md").exists()
