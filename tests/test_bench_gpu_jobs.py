"""bench/gpu.py's processes: what fails, hangs or is interrupted takes nothing else with it."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from gpu_runs import group_of

from bench import (
    gpu_child,
    gpu_jobs,
    gpu_store,
)
from bench.gpu_checks import CPU
from bench.gpu_context import Context
from bench.gpu_plan import Measurement, Settings

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
