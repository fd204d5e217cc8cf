"""What the machine code of the CUDA extension looks like, as it was built: no GPU is needed."""

import ctypes
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ttt_kernels import aot
from ttt_kernels.aot import Report

OPERATORS = ("clipped_sgd", "decode")
"""Operators with CUDA kernels: a file in csrc/cuda for each."""


@dataclass(frozen=True)
class Kernel:
    """A kernel of the extension, for one architecture.

    Attributes:
        operator: the operator whose file it is in.
        name: the kernel's, with its operator's.
        variant: the types it is compiled for.
        arch: as in sm_90a.
        report: what it needs; its dynamic shared memory, which a launch decides, is not in it.
    """

    operator: str
    name: str
    variant: str
    arch: str
    report: Report


def built() -> Path | None:
    """The extension's file, or None where it was not built."""
    found = find_spec("ttt_kernels._cuda")
    return None if found is None or found.origin is None else Path(found.origin)


def kernels(file: Path) -> Iterator[Kernel]:
    """Every kernel of an extension."""
    yield from parse(aot.dump("--dump-resource-usage", file))


def parse(usage: str) -> Iterator[Kernel]:
    """The kernels in what cuobjdump prints about resources."""
    arch = ""
    for of_arch, mangled, resources in re.findall(
        r"^arch = (\w+)|^ Function (\w+):\n(.*)$", usage, re.MULTILINE
    ):
        arch = of_arch or arch
        if not mangled:
            continue
        operator, name, variant = _named(mangled)
        numbers = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", resources)}
        report = Report(numbers["REG"], numbers["STACK"] + numbers["LOCAL"], numbers["SHARED"], {})
        yield Kernel(operator, f"{operator}.{name}", variant, arch, report)


def _demangled(name: str) -> str:
    """A name of C++ as it is written; the extension itself needs the library that knows."""
    library = ctypes.CDLL("libstdc++.so.6")
    library.__cxa_demangle.restype = ctypes.c_void_p
    address = library.__cxa_demangle(name.encode(), None, None, None)
    if not address:
        return name
    text = ctypes.string_at(address).decode()
    ctypes.CDLL(None).free(ctypes.c_void_p(address))
    return text


def _named(mangled: str) -> tuple[str, str, str]:
    """Operator, kernel and types, of a kernel in the unnamed namespace of its operator's file."""
    file = re.search(r"_GLOBAL__N__[0-9a-f]+_\d+_(\w+?)_cu_[0-9a-f]+", mangled)
    whole = _demangled(mangled)
    found = re.search(r"::(\w+)(?:<([^()]*)>)?\((?!anonymous)", whole)
    assert file is not None, whole
    assert found is not None, whole
    types = (found[2] or "").replace("ttt::", "").replace(", ", " ")
    return file[1], found[1], types
