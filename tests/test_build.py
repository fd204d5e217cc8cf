"""What setup.py builds of CUDA, and what it says where it cannot: no GPU and, but for one test, no nvcc is needed."""

import os
import runpy
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
from harness import reason_in

from ttt_kernels import extension

ROOT = Path(__file__).resolve().parent.parent
SETUP = runpy.run_path(str(ROOT / "setup.py"), run_name="setup")
KNOWN = "sm_75\nsm_80\nsm_86\nsm_90\nsm_100\n"
VARIABLE = "TTT_KERNELS_CUDA_ARCHITECTURES"


@pytest.mark.parametrize(
    ("known", "asked", "expected"),
    [
        (KNOWN, None, ["sm_80", "sm_90a", "sm_100"]),
        ("sm_70\nsm_80\nsm_90\n", None, ["sm_80", "sm_90a"]),
        (KNOWN, ["sm_100", "sm_80"], ["sm_80", "sm_100"]),
        (KNOWN, ["sm_90a"], ["sm_90a"]),
    ],
)
def test_architectures(known: str, asked: list[str] | None, expected: list[str]) -> None:
    assert SETUP["architectures"](known, asked) == expected


@pytest.mark.parametrize(
    ("known", "asked", "message"),
    [
        ("sm_70\n", None, "nvcc knows none of sm_80, sm_90a, sm_100"),
        (KNOWN, ["sm_80", "sm_86"], f"{VARIABLE} has 'sm_86'; accepted are sm_80, sm_90a, sm_100"),
        ("sm_80\nsm_90\n", ["sm_100"], f"{VARIABLE} has 'sm_100'; accepted are sm_80, sm_90a"),
    ],
)
def test_architectures_that_cannot_be(known: str, asked: list[str] | None, message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        SETUP["architectures"](known, asked)


def test_targets_end_with_ptx_that_later_chips_run() -> None:
    assert SETUP["targets"](["sm_80", "sm_90a"]) == {
        "sm_80": "-gencode=arch=compute_80,code=sm_80",
        "sm_90a": "-gencode=arch=compute_90a,code=sm_90a",
        # Not of compute_90a, whose PTX runs on no other chip.
        "compute_90": "-gencode=arch=compute_90,code=compute_90",
    }
    assert list(SETUP["targets"](["sm_100"])) == ["sm_100", "compute_100"]


def test_asked_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert SETUP["asked_architectures"]() is None
    monkeypatch.setenv(VARIABLE, "sm_90a sm_80")
    assert SETUP["asked_architectures"]() == ["sm_90a", "sm_80"]
    monkeypatch.setenv(VARIABLE, " ")
    with pytest.raises(RuntimeError, match=f"{VARIABLE} is empty"):
        SETUP["asked_architectures"]()


def executable(file: Path, script: str) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    return file


def test_nvcc_is_that_of_cuda_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = executable(tmp_path / "bin" / "nvcc", "")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert SETUP["find_nvcc"]() == own
    # No other is taken in its place.
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("PATH", str(own.parent), prepend=os.pathsep)
    with pytest.raises(RuntimeError, match=r"there is no nvcc in .*elsewhere \(CUDA_HOME\)"):
        SETUP["find_nvcc"]()
    with pytest.raises(RuntimeError, match="there is no libcudart_static"):
        SETUP["static_runtime"](own)
    library = tmp_path / "targets" / "x86_64-linux" / "lib" / "libcudart_static.a"
    library.parent.mkdir(parents=True)
    library.touch()
    assert SETUP["static_runtime"](own) == library.parent


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({VARIABLE: ""}, f"{VARIABLE} is empty"),
        ({"CUDA_HOME": "/nonexistent"}, "there is no nvcc in /nonexistent (CUDA_HOME)"),
        ({VARIABLE: "sm_35", "CUDA_HOME": "fake"}, f"{VARIABLE} has 'sm_35'; accepted are sm_80"),
        ({"CUDA_HOME": "fake"}, "nvcc failed on csrc/cuda/clipped_sgd.cu: it is raining"),
    ],
)
def test_a_build_without_cuda_succeeds_and_says_why(
    tmp_path: Path, environment: dict[str, str], reason: str
) -> None:
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    compiled = shutil.ignore_patterns("*.so", "__pycache__", "*_build_failure.txt")
    for name in ("csrc", "ttt_kernels", "engine"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=compiled)
    script = 'case "$*" in --list-gpu-code) echo sm_80 ;; *) echo it is raining >&2; exit 1 ;; esac'
    executable(tmp_path / "fake" / "bin" / "nvcc", script)
    (tmp_path / "fake" / "lib").mkdir()
    (tmp_path / "fake" / "lib" / "libcudart_static.a").touch()
    # Without a C++ compiler, which leaves less to compile.
    whole = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"CC": "/none", "CXX": "/none"}
    whole |= environment | (
        {"CUDA_HOME": str(tmp_path / "fake")} if environment.get("CUDA_HOME") == "fake" else {}
    )
    build = [sys.executable, "setup.py", "-q", "build", "--build-base", "tmp"]
    subprocess.run(build, cwd=tmp_path, env=whole, check=True, capture_output=True)
    (record,) = (tmp_path / "tmp").glob("lib*/ttt_kernels/_cuda_build_failure.txt")
    text = record.read_text().strip()
    assert text.startswith("the CUDA extension could not be built when the package was installed: ")
    assert reason in text
    # The other extension has a reason of its own.
    assert "/none" in record.with_name("_cpu_build_failure.txt").read_text()
    assert reason_in(record.parent.parent, "cuda", whole) == text


def test_where_nvcc_is_the_extension_is_built() -> None:
    _, reason = extension.load_cuda()
    if "could not be built" in reason:
        assert "there is no nvcc" in reason or f"{VARIABLE} is empty" in reason, reason


needs_cuda_build = pytest.mark.skipif(
    find_spec("ttt_kernels._cuda") is None, reason="the CUDA extension is not built"
)


@needs_cuda_build
def test_what_was_built_loads_without_a_gpu() -> None:
    """And says what it was built for; no library of CUDA has to be there."""
    code = "from ttt_kernels import _cuda; print(*_cuda.architectures())"
    package = Path(extension.__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=package.parent, check=True, capture_output=True, text=True
    )
    names = done.stdout.split()
    *real, ptx = names
    assert list(SETUP["targets"](real)) == names
    assert ptx.startswith("compute_")


@needs_cuda_build
def test_its_functions_are_those_that_run_on_the_processor(cuda_on_host: object) -> None:
    from ttt_kernels import _cuda

    def public(module: object) -> set[str]:
        return {name for name in dir(module) if not name.startswith("_")}

    assert public(_cuda) == public(cuda_on_host.kernels)


def test_a_missing_driver_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "find_spec", lambda name: object())
    for built, there, reason in (
        (False, False, "this torch was built without CUDA"),
        (True, False, "no GPU, or no driver of one, is available"),
    ):
        monkeypatch.setattr("torch.backends.cuda.is_built", lambda built=built: built)
        monkeypatch.setattr("torch.cuda.is_available", lambda there=there: there)
        assert extension.load_cuda.__wrapped__() == (None, reason)
    for reason in ("CUDA driver version is insufficient for CUDA runtime version", ""):
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        module = SimpleNamespace(unusable=lambda reason=reason: reason)
        monkeypatch.setattr(extension, "import_module", lambda name, module=module: module)
        told = f"the CUDA extension cannot use the driver: {reason}"
        assert extension.load_cuda.__wrapped__() == ((None, told) if reason else (module, ""))
    monkeypatch.setattr(extension, "find_spec", lambda name: None)
    monkeypatch.setattr(extension, "_record", lambda name: "")
    assert extension.load_cuda.__wrapped__() == (None, "the CUDA extension was not built")
