"""Ahead-of-time compilation of Triton kernels, without a GPU: what is measured, and that failures are found."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ttt_kernels import aot, aot_cuda
from ttt_kernels import compile as command
from ttt_kernels.aot import Case, Report, is_serialized, parse
from ttt_kernels.tuning import Config

pytest.importorskip("triton")

USAGE = "Resource usage:\n Function kernel:\n  REG:128 STACK:{stack} SHARED:0 LOCAL:0 CONSTANT[0]:560\n"
SASS = "  /*0100*/  {} R24, gdesc[UR4], RZ ;\n  /*0110*/  FFMA R1, R2, R3, R4 ;\n"


def report(instruction: str, stack: int = 0, shared: int = 1000) -> Report:
    return parse(USAGE.format(stack=stack), SASS.format(instruction), shared)


def test_a_good_kernel_has_no_problems() -> None:
    found = report("HGMMA.64x64x16.F32.BF16")
    assert (found.registers, found.spilled, found.shared) == (128, 0, 1000)
    assert found.instructions == {"HGMMA": 1, "FFMA": 1}
    assert found.products() == "HGMMA"
    assert found.problems(90, narrow=True) == []
    assert report("UTCHMMA").problems(100, narrow=True) == []
    assert report("HMMA.16816.F32.BF16").problems(80, narrow=True) == []
    assert report("FFMA").problems(90, narrow=False) == []


@pytest.mark.parametrize(
    ("found", "arch", "narrow", "problem"),
    [
        (report("HGMMA.64x64x16.F32.BF16", stack=16), 90, True, "16 bytes spilled"),
        (report("HGMMA.64x64x16.F32.BF16", shared=233_000), 90, True, "shared memory beyond 232448"),
        (report("HMMA.16816.F32", shared=167_000), 80, True, "shared memory beyond 166912"),
        (report("HMMA.16816.F32.BF16"), 90, True, "a product does not use HGMMA"),
        (report("HMMA.16816.F32.BF16 R0 ;\n HGMMA.64x64x16"), 90, True, "a product does not use HGMMA"),
        (report("FADD"), 80, True, "no tensor cores"),
        (report("FADD"), 100, True, "no tensor cores"),
        (report("HMMA.1688.F32.TF32"), 80, False, "float32 products are not exact"),
        (
            replace(report("HGMMA.64x64x16.F32.BF16"), serialized=True),
            90,
            True,
            "products of warp groups are serialized",
        ),
    ],
)
def test_problems_are_found(found: Report, arch: int, narrow: bool, problem: str) -> None:
    assert problem in found.problems(arch, narrow)


def test_serialized_products_are_read() -> None:
    said = "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to {}"
    assert is_serialized("ptxas info    : 0 bytes gmem\n" + said.format("insufficient register resources"))
    assert not is_serialized("ptxas info    : Used 168 registers, 0 bytes spill stores")


def compile_kernels(*given: str) -> subprocess.CompletedProcess:
    """The command in a process of its own, because kernels of this one are interpreted."""
    return subprocess.run(
        [sys.executable, "-m", "ttt_kernels.compile", *given],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("kernel", ["swa.forward", "swa.backward", "swiglu.gate_and_up"])
def test_kernels_compile_for_every_architecture(kernel: str) -> None:
    done = compile_kernels("--kernel", kernel, "--variant", "fp16")
    assert done.returncode == 0, done.stdout + done.stderr
    for arch, instruction in (("sm_80", "HMMA"), ("sm_90", "HGMMA"), ("sm_100", "UTCHMMA")):
        rows = [line.split() for line in done.stdout.splitlines() if f" {arch} " in line]
        assert rows
        assert all(row[-1] == instruction for row in rows), done.stdout


@pytest.mark.slow
def test_kernels_without_products_compile() -> None:
    operators = ("linear_ce", "rms_norm", "rope", "clipped_sgd")
    done = compile_kernels("--operator", *operators, "--variant", "fp16", "--arch", "sm_90")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {line.split(".")[0] for line in done.stdout.splitlines() if "sm_90" in line} == set(operators)


@pytest.mark.slow
def test_launches_bind_their_arguments() -> None:
    script = Path(__file__).with_name("launches.py")
    path = os.pathsep.join(p for p in sys.path if p)
    done = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": path},
        check=False,
    )
    assert done.stdout == "launched\n", done.stdout + done.stderr


@pytest.mark.slow
def test_every_kernel_is_listed() -> None:
    code = (
        "from ttt_kernels.compile import OPERATORS, cases; "
        "print(*{c.name for operator in OPERATORS for c in cases(operator, 90)})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "TRITON_INTERPRET": "0"},
        check=True,
    )
    orders = ("forward", "backward", "double_backward")
    kernels = {
        "swa": (
            *("forward", "backward_queries", "backward_keys"),
            *("along", "double_backward_queries", "double_backward_keys"),
            *("jvp_forward", "jvp_backward_queries", "jvp_backward_keys", "jvp_keys_before"),
        ),
        "swiglu": ("gate_and_up", *orders),
        "linear_ce": ("online", "d_logits", "second"),
        "rms_norm": (*orders, "jvp_backward", "total"),
        "rope": ("rotate", "heads_forward", "heads_backward"),
        "clipped_sgd": ("products", "step", "backward", "double_backward", "of_rate"),
    }
    assert set(done.stdout.split()) == {f"{o}.{name}" for o, names in kernels.items() for name in names}


def test_failures_make_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    bad = report("HGMMA.64x64x16.F32.BF16", stack=8)
    # A kernel of its own: those of the operators would not be interpreted any more by later tests.
    case = Case("swa.along", "bf16", None, {}, Config((("BQ", 64),), 4, 1), True)
    monkeypatch.setattr(command, "cases", lambda operator, arch: [case])
    monkeypatch.setattr(command, "reports", lambda places: [bad for _ in places])
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert command.main(["--arch", "sm_90", "--operator", "swa", "--kernel", "along"]) == 1
    assert "8 bytes spilled" in capsys.readouterr().out


CUDA_USAGE = """
arch = sm_90a
Resource usage:
 Common:
  GLOBAL:0
 Function _ZN3ttt4cuda47_GLOBAL__N__e74e181e_14_clipped_sgd_cu_74e5c4d312square_partsIfEEvNS1_5TupleEPd:
  REG:32 STACK:{stack} SHARED:1024 LOCAL:{local} CONSTANT[2]:8 CONSTANT[0]:3864 TEXTURE:0 SURFACE:0 SAMPLER:0
arch = sm_100
 Function _ZN3ttt4cuda47_GLOBAL__N__e74e181e_14_clipped_sgd_cu_74e5c4d313update_piecesINS_4bf16EfEEvNS1_5TupleEPf:
  REG:76 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:3928 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


def test_kernels_of_the_cuda_extension_are_read() -> None:
    first, second = aot_cuda.parse(CUDA_USAGE.format(stack=0, local=0))
    assert (first.operator, first.name, first.variant) == ("clipped_sgd", "clipped_sgd.square_parts", "float")
    assert (first.arch, first.report) == ("sm_90a", Report(32, 0, 1024, {}))
    assert (second.name, second.variant) == ("clipped_sgd.update_pieces", "bf16 float")
    assert (second.arch, second.report.registers) == ("sm_100", 76)


@pytest.mark.parametrize(("stack", "local", "status"), [(0, 0, 0), (16, 0, 1), (0, 8, 1)])
def test_cuda_kernels_that_spill_make_the_exit_status(
    stack: int, local: int, status: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(command, "reports", lambda places: [])
    monkeypatch.setattr(aot_cuda, "built", lambda: Path("extension.so"))
    monkeypatch.setattr(aot, "dump", lambda question, file: CUDA_USAGE.format(stack=stack, local=local))
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert command.main(["--arch", "sm_90", "--operator", "clipped_sgd", "--kernel", "square"]) == status
    printed = capsys.readouterr().out
    assert f"1 kernels compiled, {status} with problems" in printed
    assert ("bytes spilled" in printed) == bool(status)


@pytest.mark.skipif(aot_cuda.built() is None, reason="the CUDA extension is not built")
def test_cuda_kernels_do_not_spill() -> None:
    found = list(aot_cuda.kernels(aot_cuda.built()))
    assert {k.arch for k in found} <= {"sm_80", "sm_90a", "sm_100"}
    assert {k.operator for k in found} == set(aot_cuda.OPERATORS)
    for kernel in found:
        arch = int(kernel.arch.removeprefix("sm_").removesuffix("a"))
        assert kernel.report.problems(arch, None) == [], kernel


def test_operators_with_cuda_kernels() -> None:
    sources = Path(__file__).resolve().parent.parent / "csrc" / "cuda"
    kernels = {file.stem for file in sources.glob("*.cu") if "__global__" in file.read_text()}
    assert kernels == set(aot_cuda.OPERATORS)


def test_without_triton(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(command, "find_spec", lambda name: None)
    assert command.main([]) == 2
    assert "triton package is not installed" in capsys.readouterr().err
