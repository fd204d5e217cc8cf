"""bench/gpu.py beside the official JAX code."""

import json
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_runs import SMALL, group_of
from safetensors.torch import load_file

from bench import (
    gpu_official,
    gpu_report,
    official_child,
)
from bench.gpu_checks import CPU
from bench.gpu_context import Context, Wrong, random_model, random_tokens
from bench.gpu_official import Unavailable, named_as_there
from bench.gpu_official import measure as measure_official
from engine import TTTConfig, TTTModel
from engine import config as configs
from engine.golden import carried_cases, load_golden


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
