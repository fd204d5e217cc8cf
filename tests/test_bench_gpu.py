"""bench/gpu.py: what it checks, what it keeps, what it refuses, and what it makes of its results."""

import json
import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file

from bench import (
    gpu,
    gpu_child,
    gpu_jobs,
    gpu_official,
    gpu_operators,
    gpu_plan,
    gpu_prefill,
    gpu_report,
    gpu_store,
    gpu_train,
    machine,
    official_child,
)
from bench.gpu_bars import BARS
from bench.gpu_cases import Sizes, case, names
from bench.gpu_checks import CPU, REPEAT, SIZES, operator
from bench.gpu_context import Context, Wrong, random_model, random_tokens, with_config
from bench.gpu_official import Unavailable, named_as_there
from bench.gpu_official import measure as measure_official
from bench.gpu_orders import Truth, work
from bench.gpu_plan import Measurement, Settings, in_order, plan
from bench.gpu_prefill import checked, same_logits
from bench.gpu_train import engine_loss, gradient_error, step
from bench.gpu_transformer import Attention, Transformer
from bench.memory import PeakMemory, parameter_bytes
from bench.operator_example import flat
from engine import TTTConfig, TTTModel, graphs
from engine import config as configs
from engine.golden import carried_cases, load_golden
from engine.ops import Ops
from engine.prefill import Reader
from engine.recordings import Recordings
from engine.training import trial
from ttt_kernels import tuning
from ttt_kernels.registry import OPERATORS

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_layers": 2,
    "num_heads": 2,
    "suffix_layers": 1,
    "mini_batch_size": 16,
    "window": 24,
    "bos_token_id": None,
}
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


CHILD = """
import json, os, signal, subprocess, sys, time
for m in json.load(sys.stdin)["measurements"]:
    print(json.dumps({"key": m["key"], "status": "begun"}), flush=True)
    if m["key"] == "crashes":
        os.kill(os.getpid(), signal.SIGKILL)
    if m["key"] == "hangs":
        time.sleep(600)
    if m["key"] == "leaves":
        sys.exit(3)
    if m["key"] == "starts another":
        other = subprocess.Popen(["sleep", "600"], stdout=subprocess.DEVNULL)
        print(json.dumps({"key": "other", "status": "measured", "pid": other.pid}), flush=True)
        time.sleep(600)
    if m["key"] == "leaves a line half written":
        print('{"key": "le', end="", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    print(json.dumps({"key": m["key"], "status": "measured", "pid": os.getpid()}), flush=True)
    if m["key"] == "ends it all":
        sys.exit(0)
"""


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that does what its measurements are called."""
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    monkeypatch.setattr(gpu_jobs, "CHILD", str(script))


def group_of(*keys: str) -> list[Measurement]:
    return [Measurement(key, "prefill", "", {}, "group", 0.0) for key in keys]


@pytest.mark.usefixtures("child")
def test_a_process_takes_one_measurement_with_it_not_those_after_it() -> None:
    found: dict[str, dict[str, Any]] = {}
    keys = ("first", "crashes", "second", "leaves", "third")
    gpu_jobs.run_group(group_of(*keys), Settings(device="cpu"), time.time() + 60, found.__setitem__)
    assert set(found) == set(keys)
    assert "SIGKILL" in found["crashes"]["reason"]
    assert found["leaves"] == {"status": "failed", "reason": "the process ended with status 3"}
    assert [found[k]["status"] for k in ("first", "second", "third")] == ["measured"] * 3
    assert len({found[k]["pid"] for k in ("first", "second", "third")}) == 3


@pytest.mark.usefixtures("child")
def test_half_a_line_is_no_result() -> None:
    found: dict[str, dict[str, Any]] = {}
    keys = ("leaves a line half written", "second")
    gpu_jobs.run_group(group_of(*keys), Settings(device="cpu"), time.time() + 60, found.__setitem__)
    assert "SIGKILL" in found[keys[0]]["reason"]
    assert found["second"]["status"] == "measured"


@pytest.mark.usefixtures("child")
def test_a_process_that_ends_between_measurements_takes_none_with_it() -> None:
    """As it does where the device is of no use to it any more."""
    found: dict[str, dict[str, Any]] = {}
    keys = ("first", "ends it all", "second", "third")
    gpu_jobs.run_group(group_of(*keys), Settings(device="cpu"), time.time() + 60, found.__setitem__)
    assert [found[k]["status"] for k in keys] == ["measured"] * 4
    assert (
        found["first"]["pid"]
        == found["ends it all"]["pid"]
        != found["second"]["pid"]
        == found["third"]["pid"]
    )


@pytest.mark.usefixtures("child")
def test_what_takes_too_long_is_ended_with_all_that_it_has_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_jobs, "MORE", 2.0)
    found: dict[str, dict[str, Any]] = {}
    keys = ("starts another", "second")
    gpu_jobs.run_group(group_of(*keys), Settings(device="cpu"), time.time() + 60, found.__setitem__)
    assert found["starts another"]["reason"] == "it did not end"
    assert found["second"]["status"] == "measured"
    assert not runs(found["other"]["pid"])


def runs(pid: int, within: float = 20.0) -> bool:
    """Whether a process has not ended so many seconds from now; what nobody has waited for has ended too."""
    status = Path(f"/proc/{pid}/stat")
    end = time.monotonic() + within
    while time.monotonic() < end:
        if not status.exists() or status.read_text().rpartition(")")[2].split()[0] == "Z":
            return False
        time.sleep(0.1)
    return True


def test_a_process_ends_with_the_one_that_started_it() -> None:
    """Even in a kernel that never ends, and even where nothing could be told to it."""
    child = "import os, time; from bench.gpu_child import end_with; from threading import Thread; "
    child += "Thread(target=end_with, args=(os.getppid(),), daemon=True).start(); "
    child += "print(os.getpid(), flush=True); time.sleep(600)"
    parent = "import subprocess, sys; "
    parent += f"child = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE); "
    parent += "print(int(child.stdout.readline()))"
    done = subprocess.run(
        [sys.executable, "-c", parent], cwd=gpu_store.CHECKOUT, stdout=subprocess.PIPE, text=True, check=True
    )
    assert not runs(int(done.stdout))


def test_whatever_goes_wrong_is_told_and_where() -> None:
    class OutOfResources(Exception):
        """As Triton's, which is no RuntimeError."""

    def breaks(context: Context) -> dict[str, Any]:
        raise OutOfResources("too many\n registers")

    found: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(gpu_child.TASKS, "breaks", breaks)
        gpu_child.tell_of(Context(CPU, "float32"), "a", "breaks", {}, lambda **told: found.update(told))
    assert (found["status"], found["reason"]) == ("failed", "OutOfResources: too many registers")
    assert any("in breaks" in line for line in found["traceback"])


def test_a_device_that_refuses_everything_is_left(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """After the first failure, so that those after it are done by another process."""
    script = tmp_path / "child.py"
    lines = (
        f"import sys; sys.path.insert(0, {str(gpu_store.CHECKOUT)!r})",
        "from bench import gpu_child",
        "lost = []",
        "def synchronize(*_):",
        "    if lost: raise RuntimeError('CUDA error: an illegal memory access was encountered')",
        "gpu_child.synchronize = synchronize",
        "def breaks(context): lost.append(True), synchronize()",
        "def works(context): return synchronize() or {}",
        "gpu_child.TASKS |= {'breaks': breaks, 'works': works}",
        "gpu_child.main()",
    )
    script.write_text("\n".join(lines))
    monkeypatch.setattr(gpu_jobs, "CHILD", str(script))
    found: dict[str, dict[str, Any]] = {}
    tasks = {"first": "works", "second": "breaks", "third": "works"}
    group = [Measurement(key, "prefill", task, {}, "group", 0.0) for key, task in tasks.items()]
    gpu_jobs.run_group(group, Settings(device="cpu"), time.time() + 300, found.__setitem__)
    assert [found[key]["status"] for key in tasks] == ["measured", "failed", "measured"]
    assert "illegal memory access" in found["second"]["reason"]


@pytest.mark.usefixtures("child")
def test_what_hangs_is_ended_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_jobs, "GRACE", 0.0)
    found: dict[str, dict[str, Any]] = {}
    put = found.__setitem__
    gpu_jobs.run_group(group_of("first", "hangs", "second"), Settings(device="cpu"), time.time() + 4, put)
    assert found["first"]["status"] == "measured"
    assert found["hangs"]["reason"] == found["second"]["reason"] == "no time left"


@pytest.mark.usefixtures("child")
def test_an_interruption_ends_processes_side_by_side() -> None:
    found: dict[str, dict[str, Any]] = {}

    def put(key: str, result: dict[str, Any]) -> None:
        found[key] = result
        raise KeyboardInterrupt

    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        gpu_jobs.run_side_by_side(
            [group_of("first"), group_of("hangs")], Settings(device="cpu"), time.time() + 300, put
        )
    assert time.monotonic() - start < 60
    assert list(found) == ["first"]


def measured(**fields: Any) -> dict[str, Any]:
    return {"status": "measured"} | fields


def synthetic() -> dict[str, dict[str, Any]]:
    """Every figure just on the better side of its bar."""
    fast = {"attention": "sdpa-cudnn", "style": "kernels"}
    return {
        "ceilings": measured(product_flops_per_s=800e12, copy_bytes_per_s=4e12),
        "prefill 3b 131072 ttt-e2e": measured(flops=2.0 * 440e12, seconds=2.0),
        "prefill 3b 131072 full-attention": measured(seconds=5.0, **fast),
        "prefill 3b 131072 full-attention compiled": measured(seconds=3.8, attention="sdpa-flash", style="compiled"),
        "train 1b 8192 ttt-e2e": measured(seconds=2.2, tokens_per_s=1.0),
        "train 1b 8192 full-attention": measured(seconds=1.0, **fast),
        "train 1b 32768 ttt-e2e 131072": measured(seconds=3.0, tokens_per_s=1.05),
        "train 1b 131072 ttt-e2e": measured(seconds=3.0, tokens_per_s=1.0),
        "train 1b 131072 full-attention": measured(seconds=3.9, **fast),
        "prefill 125m 1048576 long text": measured(late_over_early=1.03, memory_late_over_early=1.01),
        "prefill 125m 32768 ttt-e2e": measured(seconds=1.0),
        "official 125m 32768": measured(seconds=3.0),
        "decode 3b": measured(bytes_per_s=2.8e12),
    }  # fmt: skip


def test_bars_are_met_at_the_bar() -> None:
    verdicts = [bar.verdict(synthetic()) for bar in BARS]
    assert [figure for figure, _ in verdicts] == [
        "55%",
        "1.90x (sdpa-flash, compiled)",
        "2.20x (sdpa-cudnn, kernels)",
        "1.30x (sdpa-cudnn, kernels)",
        "1.050 (1b 1.050)",
        "1.030",
        "1.010",
        "3.00x",
        "70%",
    ]
    assert [words for _, words in verdicts] == ["met", "met", "met, and the stretch", *["met"] * 6]


def test_bars_are_not_met_behind_the_bar() -> None:
    found = synthetic()
    found["ceilings"] = measured(product_flops_per_s=801e12, copy_bytes_per_s=4.01e12)
    found["prefill 3b 131072 full-attention"]["seconds"] = 3.79
    found["train 1b 8192 ttt-e2e"]["seconds"] = 2.61
    found["train 1b 131072 ttt-e2e"] = measured(seconds=3.01, tokens_per_s=0.99)
    # The worst of the models counts.
    found |= {
        f"train 125m {n}": measured(tokens_per_s=1.0) for n in ("32768 ttt-e2e 131072", "131072 ttt-e2e")
    }
    found["prefill 125m 1048576 long text"] = measured(late_over_early=1.031, memory_late_over_early=1.02)
    found["official 125m 32768"]["seconds"] = 2.99
    assert [bar.verdict(found)[1] for bar in BARS] == ["**not met**"] * len(BARS)


def test_a_bar_without_its_figure_says_why() -> None:
    share, over, *_ = (bar.verdict({}) for bar in BARS)
    assert share == over == ("not measured", "prefill 3b 131072 ttt-e2e: not asked for yet")
    found = synthetic()
    found["prefill 3b 131072 ttt-e2e"] = {"status": "failed", "reason": "out of memory"}
    assert BARS[0].verdict(found)[1] == "prefill 3b 131072 ttt-e2e: out of memory"
    # Either of the baselines will do.
    for kind in ("", " compiled"):
        found = synthetic()
        found[f"prefill 3b 131072 full-attention{kind}"] = {"status": "skipped", "reason": "no time left"}
        assert BARS[1].verdict(found)[0].startswith("2.50x" if kind else "1.90x")
    found["prefill 3b 131072 full-attention"] = {"status": "skipped", "reason": "no time left"}
    assert "no time left" in BARS[1].verdict(found)[1]


def test_the_plan_has_everything_that_was_asked_for() -> None:
    keys = {m.key for m in plan(Settings(backends=("triton", "cpu")))}
    for preset in ("125m", "1b", "3b"):
        for length in (8192, 32768, 131072):
            for model in ("ttt-e2e", "full-attention"):
                assert {f"prefill {preset} {length} {model}", f"train {preset} {length} {model}"} <= keys
        assert f"decode {preset}" in keys
        for name in names():
            assert f"operators {preset} {name}" in keys
    for backend in ("triton", "cpu"):
        assert {f"checks golden e2e-base {backend}", "checks golden e2e-base default"} <= keys
        for name in names():
            assert {f"checks {name} {backend} {dtype}" for dtype in ("float32", "bfloat16")} <= keys
    for bar in BARS:
        bar.verdict({})
    assert {k for k in synthetic()} <= keys


def test_a_backend_is_checked_where_it_has_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OPERATORS["rope"].kernels, "other", OPERATORS["rope"].kernels["reference"])
    settings = Settings(backends=("triton", "other"), stages=("checks",))
    keys = {m.key for m in plan(settings) if " other" in m.key}
    assert keys == {"checks rope other float32", "checks rope other bfloat16"}
    assert not any("golden" in m.key and "other" in m.key for m in plan(settings))
    alone = Settings(backends=("triton",), stages=("checks",))
    assert not any(m.key.endswith("default") for m in plan(alone))


def test_what_has_bars_comes_first() -> None:
    groups = [g[0].group for g in in_order(plan(Settings(backends=("triton",)))) if not g[0].parallel]
    assert groups[:3] == ["3b", "train 1b", "125m"]


def test_every_operator_has_a_case() -> None:
    sizes = SIZES["80"]
    made = [case(name, sizes, torch.float32, CPU, 0) for name in names()]
    assert {c.example.operator.name for c in made} == set(OPERATORS)


@pytest.mark.parametrize("name", names())
def test_all_of_a_case_is_on_its_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # One without numbers, so that none are drawn either.
    monkeypatch.setattr(torch, "Generator", Mock(return_value=Mock(manual_seed=Mock(return_value=None))))
    made = case(name, SIZES["64"], torch.bfloat16, torch.device("meta"), 0)
    given = flat([v for v in made.example.inputs if isinstance(v, torch.Tensor | list)])
    assert {t.device.type for t in given} == {"meta"}


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


def test_some_heads_speak_for_all() -> None:
    made = case("swa", Sizes(1, 9, 5, 32, 16, 4, 8, 11, 1), torch.float32, CPU, 0, heads=2)
    for order in OPERATORS["swa"].orders("cpu"):
        given = made.example.arguments(order)
        found = work(made.example, order, "cpu", given)()
        truth = Truth(made, order, CPU, given)
        error, tolerance = truth.error(found)
        assert error <= tolerance
        broken = [t.clone() for t in found]
        broken[0][:, :, 1] += 1
        error, tolerance = truth.error(broken)
        assert error > tolerance


def test_kernels_are_checked_with_every_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    options = [tuning.Config((("BLOCK", size),), 4, 1) for size in (16, 32, 64)]
    ran: list[tuning.Config] = []
    kernels = OPERATORS["rms_norm"].kernels["cpu"]
    right = kernels["forward"]

    def with_choice(*arguments: Any) -> Any:
        tuning.run("kernel", (), options, ran.append)
        # One run of the last configuration has other bits, but not wrong ones.
        other = ran.count(options[2]) == 2
        return [torch.nextafter(t, 2 * t) if other else t for t in right(*arguments)]

    monkeypatch.setitem(kernels, "forward", with_choice)
    monkeypatch.setattr("bench.gpu_checks.SIZES", {"8": Sizes(2, 7, 5, 16, 16, 2, 8, 11, 1)})
    found = operator(Context(CPU, "float32"), "rms_norm", "cpu", "float32")
    told = [o for o in found["orders"] if o["order"] == "forward"]
    assert [(o["configuration"], o["repeats"]) for o in told] == [(0, True), (1, True), (2, False)]
    assert all(o["error"] <= o["tolerance"] for o in told)
    assert not found["green"]
    # Both other orders take what forward saves from one run more, of what is chosen outside of these checks.
    assert [ran.count(option) for option in options] == [REPEAT + 2, REPEAT, REPEAT]


def small(**changes: Any) -> TTTConfig:
    return TTTConfig.from_dict({"name": "small"} | SMALL | changes)


def baseline(config: TTTConfig, style: str = "kernels") -> Transformer:
    return Transformer(random_model(config, torch.float32, CPU), Attention("sdpa-flash", {}), style)


def test_the_baseline_is_the_engines_full_attention() -> None:
    config = small().as_full_attention(40)
    context, transformer = Context(CPU, "float32"), baseline(config)
    assert same_logits(context, transformer.model, transformer)["error"] < 1e-5

    def loss(model: TTTModel) -> Any:
        other = Transformer(model, transformer.attention)
        return lambda tokens: other.loss(tokens, recompute=True)

    assert gradient_error(context, config, loss)["green"]
    with torch.no_grad():
        transformer.model.blocks[0].q_norm[0] = 2.0
    broken = Context(CPU, "float32")
    other = with_config(transformer.model, replace(config, norm_eps=0.5))
    with pytest.raises(Wrong, match="off by"):
        same_logits(broken, other, transformer)


def test_what_is_computed_again_is_the_same() -> None:
    config = small().as_full_attention(40)
    gradients = []
    for recompute in (False, True):
        transformer = baseline(config)
        tokens = random_tokens(config, 2, 41, CPU)
        transformer.loss(tokens, recompute=recompute).backward()
        gradients.append([p.grad for p in transformer.model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_plain_torch_is_the_same_baseline() -> None:
    config = small().as_full_attention(40)
    by_kernels, plain = baseline(config), baseline(config)
    plain._ops = baseline(config, "compiled")._ops
    tokens = random_tokens(config, 1, 33, CPU)
    values = [t.logits(tokens, t.weights()) for t in (by_kernels, plain)]
    torch.testing.assert_close(values[0], values[1])


@pytest.mark.usefixtures("one_thread")
def test_a_wrong_model_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    right = TTTModel.prefill

    def wrong(model: Any, tokens: torch.Tensor, state: Any, *, backend: str | None = None) -> Any:
        out = right(model, tokens, state, backend=backend)
        return out._replace(nll=out.nll + 1e-3) if backend is None else out

    context = Context(CPU, "float32")
    model = random_model(small(), torch.float32, CPU)
    assert checked(context, model)["error"] < 2e-5
    monkeypatch.setattr(TTTModel, "prefill", wrong)
    with pytest.raises(Wrong, match="off by"):
        checked(Context(CPU, "float32"), model)


@pytest.mark.usefixtures("one_thread")
def test_what_is_replayed_is_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recordings whose replay gives something else than what was recorded; as few tokens as for large models."""
    monkeypatch.setattr(gpu_prefill, "CHECK_TOKENS", 1)
    monkeypatch.setattr("engine.state.SLAB", 32)
    model = random_model(small(), torch.float32, CPU)
    kinds: set[Any] = set()
    wrong = [""]

    def run(self: Recordings, lane: Any, key: tuple[Any, ...], work: Callable[[], None]) -> None:
        work()
        if key in self._replays and key[0] == wrong[0]:
            self.nll += 1e-3
        kinds.add(key[0])
        self._replays[key] = work

    recorded_by(monkeypatch, run)
    assert checked(Context(CPU, "float32"), model)["error"] < 2e-5
    for wrong[0] in ("step", "look"):
        with pytest.raises(Wrong, match="off by"):
            checked(Context(CPU, "float32"), model)
    assert kinds == {"prefix", "step", "look"}


def recorded_by(monkeypatch: pytest.MonkeyPatch, run: Callable[..., None]) -> None:
    """Has the engine read as on a GPU, with something else than graphs."""
    lane = SimpleNamespace(active=nullcontext, mark=lambda: None, wait=lambda mark: None)
    monkeypatch.setattr(graphs, "available", lambda device: True)
    monkeypatch.setattr(graphs, "lanes", lambda device: graphs.Lanes(lane, lane, lane))
    monkeypatch.setattr(Ops, "recordable", property(lambda ops: "reference" not in ops.backends))
    monkeypatch.setattr(Recordings, "run", run)


def test_nothing_is_recorded_while_a_long_text_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the windows, mini-batches and parts of the model that reads it, whose width changes nothing."""
    usual = TTTConfig.preset("125m")
    narrow = usual.to_dict() | {
        "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "num_layers": 2, "suffix_layers": 1,
        "vocab_size": 16, "bos_token_id": None,
    }  # fmt: skip
    del narrow["name"]
    monkeypatch.setitem(configs._PRESETS, "narrow", narrow)
    monkeypatch.setattr(gpu_prefill, "checked", lambda context, model: {})
    monkeypatch.setattr(Reader, "logits", lambda self: None)
    part: list[int] = []
    recorded: set[Any] = set()
    late: list[Any] = []

    def run(self: Recordings, lane: Any, key: tuple[Any, ...], work: Callable[[], None]) -> None:
        if key not in recorded and part:
            late.append((len(part), key))
        recorded.add(key)

    def told(work: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
        part.append(0)
        return work(), 1.0

    recorded_by(monkeypatch, run)
    monkeypatch.setattr(gpu_prefill, "timed", told)
    gpu_prefill.long_text(Context(CPU, "float32"), "narrow", 2**20)
    assert len(part) == gpu_prefill.PASSES * gpu_prefill.PARTS
    assert {key[0] for key in recorded} == {"prefix", "step", "look"}
    assert late == []


@pytest.mark.usefixtures("one_thread")
def test_an_interruption_of_a_long_text_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(configs._PRESETS, "small", SMALL)
    calls: list[float] = []

    def told(work: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
        calls.append(100.0 if len(calls) in (3, gpu_prefill.PARTS + 62) else 1.0)
        return work(), calls[-1]

    monkeypatch.setattr(gpu_prefill, "timed", told)
    found = gpu_prefill.long_text(Context(CPU, "float32"), "small", 1024)
    assert max(calls) == 100.0
    assert found["seconds_by_part"] == [1.0] * gpu_prefill.PARTS
    assert found["late_over_early"] == 1.0


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("can", [True, False])
def test_full_attention_is_replayed_where_the_engine_is(can: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Timed without launches; with them where it cannot be recorded."""
    monkeypatch.setitem(configs._PRESETS, "small", SMALL)
    recorded_by(monkeypatch, lambda *_: None)
    done: list[str] = []

    def record(work: Callable[[], None]) -> Callable[[], None]:
        if not can:
            raise RuntimeError("operation not permitted when stream is capturing")
        work()
        return lambda: done.append("replayed")

    lane = graphs.lanes(CPU).main
    lane.record = record  # type: ignore[method-assign]
    usual = Transformer.logits

    def logits(self: Transformer, tokens: torch.Tensor, weights: Any) -> torch.Tensor:
        if tokens.shape[1] == 64:
            done.append("launched")
        return usual(self, tokens, weights)

    monkeypatch.setattr(Transformer, "logits", logits)
    found = gpu_prefill.full_attention(Context(CPU, "float32"), "small", 64)
    runs = len(found["runs"])
    # The warm-up, and the recording.
    assert done == (["launched"] * 2 + ["replayed"] * runs if can else ["launched"] * (1 + runs))


@pytest.mark.usefixtures("one_thread")
def test_nothing_is_recorded_while_reading_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(configs._PRESETS, "small", SMALL)
    timing, late = [False], []

    def run(self: Recordings, lane: Any, key: tuple[Any, ...], work: Callable[[], None]) -> None:
        if key not in self._replays and timing[0]:
            late.append(key)
        self._replays[key] = work
        work()

    def told(work: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
        timing[0] = True
        return work(), 1.0

    recorded_by(monkeypatch, run)
    monkeypatch.setattr(gpu_prefill, "timed", told)
    found = gpu_prefill.ttt(Context(CPU, "float32"), "small", 256)
    assert timing[0]
    assert late == []
    assert found["runs"] == [1.0, 1.0]


@pytest.mark.usefixtures("one_thread")
def test_rounder_products_are_given_what_rounding_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The formulas at the model's own dtype are as far off as it says; a few times that is too far."""
    config = small(compute_dtype="bfloat16")
    model = random_model(config, torch.bfloat16, CPU)
    found = checked(Context(CPU, "bfloat16"), model)
    assert found["error"] <= found["tolerance"] < 5 * found["error"]
    right = TTTModel.prefill

    def wrong(model: Any, tokens: torch.Tensor, state: Any, *, backend: str | None = None) -> Any:
        out = right(model, tokens, state, backend=backend)
        return out._replace(nll=out.nll + 2 * found["tolerance"]) if backend is None else out

    monkeypatch.setattr(TTTModel, "prefill", wrong)
    with pytest.raises(Wrong, match="off by"):
        checked(Context(CPU, "bfloat16"), model)


def test_a_batch_is_accumulated_of_what_fits() -> None:
    """Without memory for two sequences they come one by one."""
    config = small()
    context = Context(CPU, "float32")
    for needed, size in ((1.0, 4), (1e18, 1)):
        model = random_model(config, torch.float32, CPU)
        found = step(context, model, engine_loss(model), 32, 128, needed, lambda part: None)
        assert (found["micro_batch"], found["micro_batches"]) == (size, 4 // size)
        assert found["tokens"] == 128


@pytest.mark.parametrize(("kind", "enough"), [("ttt", 4), ("full_attention", 1)])
@pytest.mark.parametrize(
    ("room", "fails", "expected"),
    [(1.01, False, {False}), (0.99, False, {True}), (1.01, True, {False, True})],
)
def test_nothing_is_computed_again_where_enough_sequences_fit(
    kind: str, enough: int, room: float, fails: bool, expected: set[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many as make large products; where it does not fit, or proves not to, what is spared is computed again."""
    monkeypatch.setitem(configs._PRESETS, "small", SMALL)
    monkeypatch.setattr(gpu_train, "checked", lambda *_: {})
    tried: list[tuple[bool, int]] = []
    usual, loss = TTTModel.loss, Transformer.loss

    def own(self: TTTModel, tokens: torch.Tensor, *, checkpoint_blocks: bool) -> Any:
        tried.append((checkpoint_blocks, len(tokens)))
        if fails and not checkpoint_blocks:
            raise torch.OutOfMemoryError
        return usual(self, tokens, checkpoint_blocks=checkpoint_blocks)

    def other(self: Transformer, tokens: torch.Tensor, *, recompute: bool, **more: Any) -> torch.Tensor:
        tried.append((recompute, len(tokens)))
        if fails and not recompute:
            raise torch.OutOfMemoryError
        return loss(self, tokens, recompute=recompute, **more)

    monkeypatch.setattr(TTTModel, "loss", own)
    monkeypatch.setattr(Transformer, "loss", other)
    config = TTTConfig.preset("small", compute_dtype="float32")
    of_one = gpu_train.ttt_bytes(config, 32, recompute=False)
    if kind == "full_attention":
        of_one = gpu_train.full_attention_bytes(config.as_full_attention(32), 32, recompute=False)
    free = room * enough * of_one / gpu_train.SHARE_OF_MEMORY
    monkeypatch.setattr(gpu_train, "_free", lambda *_: free)
    found = getattr(gpu_train, kind)(Context(CPU, "float32"), "small", 32, 8 * 32)
    assert {again for again, _ in tried} == expected
    assert found["recompute"].startswith("all" if True in expected else "nothing")
    assert all(rows >= enough for again, rows in tried if not again)


@pytest.mark.parametrize(("room", "expected"), [(1.01, "nothing"), (0.99, "all")])
def test_a_sequence_is_learnt_from_as_a_longer_one(
    room: float, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One at a time although all fit, and computed again what has to be of the longer one."""
    monkeypatch.setitem(configs._PRESETS, "small", SMALL)
    monkeypatch.setattr(gpu_train, "checked", lambda *_: {})
    config = TTTConfig.preset("small", compute_dtype="float32")
    free = room * gpu_train.ttt_bytes(config, 128, recompute=False) / gpu_train.SHARE_OF_MEMORY
    monkeypatch.setattr(gpu_train, "_free", lambda *_: free)
    found = gpu_train.ttt(Context(CPU, "float32"), "small", 32, 128, as_of=128)
    assert (found["micro_batch"], found["micro_batches"], found["tokens"]) == (1, 4, 128)
    assert found["recompute"].startswith(expected)


@pytest.mark.usefixtures("one_thread")
def test_every_kernel_of_a_model_is_compiled_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a call's arguments those that are missing, and what is wanted, are compiled in."""
    monkeypatch.setitem(
        configs._PRESETS, "small", SMALL | {"num_layers": 4, "suffix_layers": 2, "window": 32}
    )
    calls: set[Any] = set()

    def known(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.dtype, value.dim(), value.shape[1] % 16 if value.dim() == 4 else None
        if isinstance(value, list | tuple):
            return tuple(map(known, value))
        return value if isinstance(value, bool) else type(value)

    for name, op in OPERATORS.items():
        for order, kernel in op.kernels["cpu"].items():

            def told(*given: Any, what: Any = (name, order), kernel: Any = kernel) -> Any:
                calls.add((what, *map(known, given)))
                return kernel(*given)

            monkeypatch.setitem(op.kernels["cpu"], order, told)
    context = Context(CPU, "float32")
    gpu_train.compile_models(context, "small")
    compiled = set(calls)
    calls.clear()
    gpu_train.ttt(context, "small", 96, 192)
    gpu_prefill.ttt(context, "small", 96)
    assert len(calls) > len(OPERATORS)
    assert calls <= compiled


@pytest.mark.usefixtures("one_thread")
def test_gradients_of_replays_are_checked_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recordings whose replay gives something else than what was recorded."""
    wrong = False

    def run(self: Any, lane: Any, key: tuple[Any, ...], work: Callable[[], None]) -> None:
        work()
        if wrong and key in self._replays and key[0] == "back":
            self.d_x *= 1.1
        self._replays[key] = work

    recorded_by(monkeypatch, run)
    assert gpu_train.checked(Context(CPU, "float32"), small(), engine_loss)["error"] < 1e-4
    wrong = True
    with pytest.raises(Wrong, match="gradients are off"):
        gpu_train.checked(Context(CPU, "float32"), small(), engine_loss)


def test_what_does_not_fit_is_gone_before_less_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    """While an error is handled, its traceback holds all that the failed step had."""
    config = small()
    model = random_model(config, torch.float32, CPU)
    held: list[weakref.ref[torch.Tensor]] = []
    left: list[bool] = []

    def loss(tokens: torch.Tensor) -> torch.Tensor:
        large = torch.zeros(3)
        held.append(weakref.ref(large))
        if len(tokens) > 1:
            raise torch.OutOfMemoryError
        return engine_loss(model)(tokens) + large.sum()

    def note(device: torch.device) -> None:
        left.append(any(tensor() is not None for tensor in held))

    monkeypatch.setattr(gpu_train, "release_memory", note)
    assert step(Context(CPU, "float32"), model, loss, 32, 64, 1.0, lambda part: None)["micro_batch"] == 1
    assert len(held) == 3
    assert len(left) == 4
    assert not any(left)


def test_full_attention_is_warmed_up_at_its_full_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """By one block and the head; and values lie in memory as they do in the model."""
    monkeypatch.setitem(configs._PRESETS, "small", SMALL)
    monkeypatch.setattr(gpu_train, "checked", lambda *_: {})
    calls: list[tuple[int | None, int, bool]] = []
    strides: set[tuple[Any, ...]] = set()
    usual, attend = Transformer.loss, Attention.__call__

    def loss(self: Transformer, tokens: torch.Tensor, *, recompute: bool, blocks: int | None = None) -> Any:
        calls.append((blocks, tokens.shape[1] - 1, torch.is_grad_enabled()))
        return usual(self, tokens, recompute=recompute, blocks=blocks)

    def attended(self: Attention, *given: torch.Tensor) -> torch.Tensor:
        strides.add(tuple(t.stride() for t in given))
        return attend(self, *given)

    monkeypatch.setattr(Transformer, "loss", loss)
    monkeypatch.setattr(Attention, "__call__", attended)
    gpu_train.full_attention(Context(CPU, "float32"), "small", 64, 64)
    assert calls == [(1, 64, True), (None, 64, True), (None, 64, True)]
    assert len(strides) == 1


def test_what_graphs_keep_counts_as_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all that was allocated the parameters alone are left out, not what a warm-up has made."""
    cuda = torch.device("cuda", 1)
    segments = [
        {"device": 1, "segment_pool_id": (0, 0), "total_size": 10**9, "allocated_size": 7000},
        {"device": 1, "segment_pool_id": (0, 3), "total_size": 500, "allocated_size": 20},
        {"device": 1, "segment_pool_id": (0, 4), "total_size": 60, "allocated_size": 60},
        {"device": 0, "segment_pool_id": (0, 5), "total_size": 10**8, "allocated_size": 0},
    ]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 7080)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 9000)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    linear = torch.nn.Linear(5, 10, bias=False, dtype=torch.bfloat16)
    assert PeakMemory(cuda, parameter_bytes(linear)).peak_bytes() == 9000 + 480 - 100
    assert PeakMemory(cuda).peak_bytes() == 9000 + 480 - 7080
    assert trial._peak(cuda) == 9480


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


def test_parameters_are_shared_by_configurations() -> None:
    context = Context(CPU, "float32")
    config = small().as_full_attention(8192)
    a = context.model(config, torch.float32)
    b = context.model(small().as_full_attention(131072), torch.float32)
    assert b.config.rope_theta != a.config.rope_theta
    assert b.embed.weight.data_ptr() == a.embed.weight.data_ptr()
    assert context.model(small(), torch.float32).embed.weight.data_ptr() != a.embed.weight.data_ptr()
    assert torch.equal(a.final_norm, torch.ones(32))
    assert float(a.blocks[0].w_gate.detach().std()) == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("path", carried_cases(), ids=lambda path: path.stem)
def test_the_official_code_is_given_its_own_names(path: Path) -> None:
    golden = load_golden(path)
    model = TTTModel(golden.config)
    model.load_state_dict(golden.weights)
    theirs = {k.removeprefix("params/"): v for k, v in load_file(path).items() if k.startswith("params/")}
    ours = named_as_there(model)
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        assert torch.equal(ours[name], value)


def test_the_official_code_is_asked_for_or_left_out(tmp_path: Path) -> None:
    context = Context(CPU, "float32")
    with pytest.raises(Unavailable, match="--official"):
        measure_official(context, "tiny", 256, None)
    # A folder without it, or Python without its packages.
    with pytest.raises(Unavailable, match=r"not installed|could not run|needs Python"):
        measure_official(context, "tiny", 256, str(tmp_path))


def test_what_the_official_code_lacks_is_named_as_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_official, "find_spec", lambda module: None if module == "hydra" else object())
    monkeypatch.setattr(gpu_official, "PYTHON", (3, 11))
    with pytest.raises(Unavailable, match=r"not installed: hydra-core$"):
        measure_official(Context(CPU, "float32"), "tiny", 256, "anywhere")
    monkeypatch.setattr(gpu_official, "PYTHON", (4, 0))
    with pytest.raises(Unavailable, match=r"needs Python 4\.0 or newer"):
        measure_official(Context(CPU, "float32"), "tiny", 256, "anywhere")


def own_mini_batches(preset: str, length: int) -> list[float]:
    """The mean loss of every mini-batch, the first token being the last one's target."""
    config = TTTConfig.preset(preset, compute_dtype="float32")
    model = random_model(config, torch.float32, CPU)
    tokens = random_tokens(config, 1, length, CPU)
    nll = model.prefill(torch.cat((tokens, tokens[:, :1]), 1), model.init_state()).nll[:, 1:].double()
    return [float(part.mean()) for part in nll.split(config.mini_batch_size, 1)]


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Takes the lines of a script that is run in place of JAX's process."""
    monkeypatch.setitem(configs._PRESETS, "small", SMALL)
    monkeypatch.setattr(gpu_official, "PYTHON", (3, 11))
    monkeypatch.setattr(gpu_official, "missing_packages", list)
    script = tmp_path / "stand_in.py"
    monkeypatch.setattr(gpu_official, "CHILD", str(script))
    head = "import json, os, sys, time\njob = json.load(sys.stdin)\n"

    def write(lines: str) -> None:
        script.write_text(head + lines)

    return write


def answer(**ways: dict[str, Any]) -> str:
    """A script's line that gives this result."""
    return f"print({json.dumps(json.dumps({'jax': '0', 'device': 'none', 'ways': ways}))})"


def test_the_official_code_is_measured_by_its_fastest_settings_that_are_right(
    stand_in: Callable[[str], None],
) -> None:
    own = own_mini_batches("small", 64)
    assert len(own) == 4
    near = [own[0] + 0.9e-3, *own[1:]]
    # The mean is what it should be, and yet other things were read.
    far = [own[0] + 1.1e-3, own[1] - 1.1e-3, *own[2:]]
    stand_in(
        answer(
            slow={"runs": [3.0, 9.0, 2.0], "losses": own},
            fast={"runs": [2.0, 1.0, 1.5], "losses": near},
            wrong={"runs": [0.1], "losses": far},
            short={"runs": [0.1], "losses": own[:1]},
            broken={"reason": "RuntimeError: it has broken"},
        )
    )
    found = measure_official(Context(CPU, "float32"), "small", 64, "anywhere")
    assert (found["settings"], found["seconds"], found["tokens_per_s"]) == ("fast", 1.5, 64 / 1.5)
    assert found["check"] == {"error": pytest.approx(0.9e-3), "tolerance": 1e-3}
    assert found["own_mean_nll"] == pytest.approx(sum(own) / 4)
    assert found["others"] == {
        "slow": "3.000 s",
        "wrong": "a mini-batch's loss is off by 1.1e-03, at most 1.0e-03",
        "short": "a mini-batch's loss is off by nan, at most 1.0e-03",
        "broken": "RuntimeError: it has broken",
    }
    found["others"] = {"slow": "3.000 s"}
    (row,) = gpu_report._official_rows("small 64", group_of("official small 64")[0], found)
    assert row == ("small 64", "1.500", "43", f"{sum(near) / 4:.4f}", "fast (slow: 3.000 s); jax 0, none")


@pytest.mark.parametrize("losses", [[float("nan")] * 4, [9.0] * 4])
def test_no_speed_is_reported_of_official_code_that_reads_something_else(
    losses: list[float], stand_in: Callable[[str], None]
) -> None:
    stand_in(answer(one={"runs": [1.0], "losses": losses}, other={"reason": "no time left"}))
    with pytest.raises(Wrong, match=r"something else: one: .* is off by (nan|\d.*), .*; other: no time left"):
        measure_official(Context(CPU, "float32"), "small", 64, "anywhere")


def test_official_code_that_does_not_run_says_why(
    stand_in: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def why() -> str:
        with pytest.raises(Unavailable) as error:
            measure_official(Context(CPU, "float32"), "small", 64, "anywhere")
        return str(error.value)

    stand_in(answer(one={"reason": "XlaRuntimeError: RESOURCE_EXHAUSTED: Out of memory"}))
    assert why() == "it could not run: XlaRuntimeError: RESOURCE_EXHAUSTED: Out of memory"
    stand_in(answer(one={"reason": "slow"}, other={"reason": "broken"}))
    assert why() == "it could not run: one: slow; other: broken"
    stand_in("print(json.dumps({'reason': 'RuntimeError: no GPU'}))")
    assert why() == "it could not run: RuntimeError: no GPU"
    stand_in("print('the last words', file=sys.stderr); sys.exit(3)")
    assert why() == "it ended with status 3: the last words"
    stand_in("os.kill(os.getpid(), 9)")
    assert why() == "it was ended by SIGKILL"
    monkeypatch.setattr(gpu_official, "SECONDS", 1.0)
    stand_in("time.sleep(60)")
    assert why() == "it took more than 1 s"


def test_the_official_code_has_the_memory_that_this_model_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(configs._PRESETS, "small", SMALL)
    monkeypatch.setattr(gpu_official, "PYTHON", (3, 11))
    monkeypatch.setattr(gpu_official, "missing_packages", list)
    context = Context(CPU, "float32")
    model = weakref.ref(context.model(TTTConfig.preset("small", compute_dtype="float32"), torch.float32))

    def child(job: dict[str, Any], device: torch.device) -> dict[str, Any]:
        assert model() is None
        assert device == CPU
        assert set(load_file(job["weights"]))
        raise Unavailable("enough")

    monkeypatch.setattr(gpu_official, "in_child", child)
    with pytest.raises(Unavailable, match="enough"):
        measure_official(context, "small", 64, "anywhere")


def test_the_official_code_has_this_gpu_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = gpu_official.environment
    assert environment(CPU) == {"JAX_PLATFORMS": "cpu"}
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = environment(torch.device("cuda:1"))
    assert found == {
        "JAX_PLATFORMS": "cuda",
        "CUDA_VISIBLE_DEVICES": "1",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    # torch counts those that it was given.
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,3")
    assert environment(torch.device("cuda:1"))["CUDA_VISIBLE_DEVICES"] == "3"


def test_an_error_of_jax_is_told_without_its_notes() -> None:
    error = ValueError("no such\nthing")
    error.add_note("For simplicity, JAX has removed its internal frames from the traceback.")
    assert official_child.in_a_line(error) == "ValueError: no such thing"


def test_the_official_code_is_not_measured_on_another_device(tmp_path: Path) -> None:
    # As JAX does without a GPU where it is asked for one.
    (tmp_path / "jax.py").write_text(
        "def devices(platform):\n    assert platform != 'cuda'\n    raise KeyError(platform)\n"
    )

    def reason(platform: str) -> str:
        job = {"path": str(tmp_path), "experiment": "none", "platform": platform, "limit": 1.0}
        child = subprocess.run(
            [sys.executable, gpu_official.CHILD], input=json.dumps(job), capture_output=True, text=True
        )
        assert child.returncode == 0
        found: dict[str, str] = json.loads(child.stdout)
        return found["reason"]

    assert reason("cuda") == "RuntimeError: JAX has no cuda device here (AssertionError: )"
    # Any other error is told too.
    assert reason("cpu") == "KeyError: 'cpu'"


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
