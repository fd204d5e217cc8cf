"""The C++ extension: its instruction sets, its rounding, its threads, and how it is missed."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from harness import draw, reason_in
from torch import Tensor

from ttt_kernels import clipped_sgd, rms_norm, rope
from ttt_kernels.extension import cpu as extension

ROOT = Path(__file__).resolve().parent.parent
INSTRUCTION_SETS = extension.instruction_sets() if extension else []
HALVES = (torch.bfloat16, torch.float16)

needs_extension = pytest.mark.skipif(extension is None, reason="the C++ extension is not built")


@pytest.fixture
def choose() -> Iterator[Callable[[str], None]]:
    """Chooses an instruction set for the rest of a test."""
    before = extension.instruction_set()
    yield extension.choose_instruction_set
    extension.choose_instruction_set(before)


@needs_extension
def test_the_best_instruction_set_is_chosen() -> None:
    assert extension.instruction_set() == INSTRUCTION_SETS[-1]
    known = ["portable", "avx2", "avx512", "avx512_bf16"]
    assert [known[i] for i in sorted(map(known.index, INSTRUCTION_SETS))] == INSTRUCTION_SETS
    with pytest.raises(ValueError, match="instruction set 'sse9' does not run here"):
        extension.choose_instruction_set("sse9")
    assert extension.instruction_set() == INSTRUCTION_SETS[-1]


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES], ids=str)
def test_instruction_sets_agree(dtype: torch.dtype, choose: Callable[[str], None]) -> None:
    x, weight = draw(2, 3, 2, 50, seed=0).to(dtype), draw(50, seed=1).to(dtype)
    results = []
    for name in INSTRUCTION_SETS:
        choose(name)
        step = clipped_sgd([x], [x], lr=0.5, max_norm=1.0, backend="cpu")
        results.append(
            [rms_norm(x, weight, backend="cpu"), rope(x, torch.arange(3), backend="cpu"), *step[0]]
        )
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=2 * torch.finfo(dtype).eps, atol=1e-6)


def stored(values: Tensor, dtype: torch.dtype, vectors: bool) -> Tensor:
    """`values` as the kernels store them in `dtype`: the copies of weights that take a step of zero.

    A row of one element goes through the scalar path, a long row through the vectors.
    """
    rows = values.reshape(1 if vectors else -1, -1 if vectors else 1)
    zero = torch.zeros_like(rows)
    return clipped_sgd([rows], [zero], lr=1.0, copy_dtype=dtype, backend="cpu").copies[0].flatten()


def floats_around(dtype: torch.dtype) -> Tensor:
    """Float32 values where rounding to `dtype` is decided: every value of it, the middles between neighbours
    (ties), and the next float32 on either side of both; with NaN, infinities, subnormals and overflow."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    finite = every[every.isfinite()].sort().values.double()
    middles = ((finite[1:] + finite[:-1]) / 2).float()
    beyond = torch.tensor([65519.99, 65520.0, 65536.0, 1e30, 3.3961775e38, 3.4028235e38, 1e-45, 1e-40])
    points = torch.cat([every, middles, beyond, -beyond])
    up, down = torch.tensor(torch.inf), torch.tensor(-torch.inf)
    # NaN whose payload rounding would carry into the exponent or the sign, or cut to infinity.
    nans = torch.tensor([0x7FFFFFFF, 0x7F800001, -1, -0x7FFFFF]).to(torch.int32).view(torch.float32)
    return torch.cat([nans, points, torch.nextafter(points, up), torch.nextafter(points, down), nans])


def assert_same_bits(found: Tensor, expected: Tensor) -> None:
    """Equal bits, NaN for NaN whatever its payload."""
    assert torch.equal(found.isnan(), expected.isnan())
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[found.element_size()]
    number = ~expected.isnan()
    wrong = (found.view(bits) != expected.view(bits)) & number
    assert not wrong.any(), (found[wrong][:5], expected[wrong][:5])


@needs_extension
@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("vectors", [True, False])
def test_rounding_to_half_precision(
    name: str, dtype: torch.dtype, vectors: bool, choose: Callable[[str], None]
) -> None:
    choose(name)
    values = floats_around(dtype)
    if not vectors:
        values = torch.cat([values[:4], values[:: 7 if dtype == torch.float16 else 5]])
    assert_same_bits(stored(values, dtype, vectors), values.to(dtype))


@needs_extension
@pytest.mark.parametrize("name", INSTRUCTION_SETS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("vectors", [True, False])
def test_widening_of_half_precision(
    name: str, dtype: torch.dtype, vectors: bool, choose: Callable[[str], None]
) -> None:
    choose(name)
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    assert_same_bits(stored(every, torch.float32, vectors), every.float())
    assert_same_bits(stored(every, dtype, vectors), every)


@needs_extension
def test_threads_are_torchs() -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            assert extension.max_threads() == threads
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_build_without_a_compiler(tmp_path: Path) -> None:
    """The build succeeds, the reason is recorded, and who imports the result is told."""
    pytest.importorskip("setuptools")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).is_file():
            shutil.copy(ROOT / name, tmp_path)
    compiled = shutil.ignore_patterns("*.so", "__pycache__", "_cpu_build_failure.txt")
    for name in ("csrc", "ttt_kernels", "engine"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tmp_path / name, ignore=compiled)
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"CC": "/nonexistent", "CXX": "/nonexistent"}
    build = [sys.executable, "setup.py", "-q", "build", "--build-base", "tmp"]
    subprocess.run(build, cwd=tmp_path, env=environment, check=True, capture_output=True)
    (record,) = (tmp_path / "tmp").glob("lib*/ttt_kernels/_cpu_build_failure.txt")
    reason = record.read_text().strip()
    assert reason.startswith("the C++ extension could not be built when the package was installed: ")
    assert reason_in(record.parent.parent, "cpu", environment) == reason
