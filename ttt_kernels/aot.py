"""Compiling Triton kernels ahead of time, without a GPU, and what the machine code looks like."""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

from ttt_kernels.tuning import Config

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Architecture -> bytes of shared memory that a block can have."""
INSTRUCTIONS = ("UTCHMMA", "UTCQMMA", "HGMMA", "HMMA", "FFMA")
"""Instructions of matrix products, the fastest first: tensor memory, warp groups, warps, no tensor cores."""


@dataclass(frozen=True)
class Constant:
    """An argument that is known when a kernel is compiled, such as None for a tensor that is missing."""

    value: Any


@dataclass(frozen=True)
class Case:
    """A kernel with the types of its arguments, to be compiled with a configuration.

    Attributes:
        name: the kernel's, with its operator's.
        variant: what distinguishes it from the kernel's other cases with this configuration.
        kernel: the `triton.jit` function.
        arguments: each argument's Triton type ("*bf16", "i32", ...), a tuple of such, or a `Constant`.
        config: sizes of tiles (constants of the kernel), warps and stages.
        narrow: whether its matrix products are of 16-bit factors; None where it has no products.
    """

    name: str
    variant: str
    kernel: Any
    arguments: Mapping[str, Any]
    config: Config
    narrow: bool | None


@dataclass(frozen=True)
class Report:
    """What a compiled kernel needs and uses.

    Attributes:
        registers: of a thread.
        spilled: bytes of a thread's stack frame, where registers go that do not fit.
        shared: bytes of shared memory of a block.
        instructions: how often each of `INSTRUCTIONS` that occurs does.
        serialized: whether ptxas made products of warp groups wait for one another.
    """

    registers: int
    spilled: int
    shared: int
    instructions: Mapping[str, int]
    serialized: bool = False

    def products(self) -> str:
        """The instructions of its matrix products; every kernel has FFMA for the rest."""
        tensor = [name for name in self.instructions if name != "FFMA"]
        return " ".join(tensor or self.instructions) or "none"

    def problems(self, arch: int, narrow: bool | None) -> list[str]:
        """What must not be on an architecture (80, 90, 100), `narrow` being the case's."""
        found = []
        if self.spilled:
            found.append(f"{self.spilled} bytes spilled")
        if self.shared > SHARED_LIMIT[arch]:
            found.append(f"shared memory beyond {SHARED_LIMIT[arch]}")
        if arch == 90 and narrow and ("HGMMA" not in self.instructions or "HMMA" in self.instructions):
            found.append("a product does not use HGMMA")
        if self.serialized:
            found.append("products of warp groups are serialized")
        if narrow and set(self.instructions) <= {"FFMA"}:
            found.append("no tensor cores")
        if narrow is False and not set(self.instructions) <= {"FFMA"}:
            found.append("float32 products are not exact")
        return found


def compile_case(case: Case, arch: int) -> Report:
    """Compiles a case for an architecture (80 is sm_80)."""
    import triton
    from triton import knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source, log = ASTSource(case.kernel, *_describe(case)), StringIO()
    with knobs.nvidia.scope(), knobs.compilation.scope(), redirect_stdout(log):
        # What is taken from the cache has no messages of ptxas.
        knobs.nvidia.dump_ptxas_log = knobs.compilation.always_compile = True
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=case.config.options())
    report = read(compiled.asm["cubin"], compiled.metadata.shared)
    return replace(report, serialized=is_serialized(log.getvalue()))


def is_serialized(log: str) -> bool:
    """Whether ptxas says so: that wgmma instructions "are serialized due to ..."."""
    return any("wgmma" in line and "serialized" in line for line in log.splitlines())


def _describe(case: Case) -> tuple[dict[str, Any], dict[tuple[int, ...], Any], dict[tuple[int, ...], Any]]:
    """Signature, constants and attributes: addresses and strides are multiples of 16, as usual ones are."""
    names = case.kernel.arg_names
    given = {**case.arguments, **{name: Constant(size) for name, size in case.config.sizes}}
    assert set(given) == set(names), f"{case.name}: {sorted(set(given) ^ set(names))}"
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    aligned = [["tt.divisibility", 16]]
    for i, name in enumerate(names):
        kind = given[name]
        if isinstance(kind, Constant):
            signature[name] = "constexpr"
            constants[(i,)] = kind.value
            continue
        signature[name] = kind
        if isinstance(kind, tuple):
            attributes.update(dict.fromkeys(_places(kind, (i,)), aligned))
        elif kind.startswith("*"):
            attributes[(i,)] = aligned
    return signature, constants, attributes


def _places(kinds: tuple[Any, ...], start: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Where the elements of a tuple are, those of tuples in it included."""
    found = []
    for i, kind in enumerate(kinds):
        found += _places(kind, (*start, i)) if isinstance(kind, tuple) else [(*start, i)]
    return found


def read(cubin: bytes, shared: int) -> Report:
    """The report of machine code that needs `shared` bytes of shared memory."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage = dump("--dump-resource-usage", file)
        code = dump("--dump-sass", file)
    return parse(usage, code, shared)


def parse(usage: str, code: str, shared: int) -> Report:
    """The report from what cuobjdump prints about resources and instructions."""
    numbers = {name: max(map(int, re.findall(rf"\b{name}:(\d+)", usage))) for name in ("REG", "STACK")}
    counts = {name: len(re.findall(rf"\b{name}\b", code)) for name in INSTRUCTIONS}
    return Report(numbers["REG"], numbers["STACK"], shared, {name: n for name, n in counts.items() if n})


def dump(question: str, file: Path) -> str:
    """What the cuobjdump that comes with Triton prints about machine code."""
    from triton import knobs

    tool = knobs.nvidia.cuobjdump.path
    return subprocess.run([tool, question, str(file)], check=True, capture_output=True, text=True).stdout
