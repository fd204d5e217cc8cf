"""The CUDA kernels on the processor: csrc/cuda compiled by the C++ compiler against tests/cuda_on_host, and run.

To CUDA what TRITON_INTERPRET=1 is to Triton: the same sources, every thread of a block a fiber, shared memory poisoned
with NaN, and threads in the order that a test asks for.
"""

import ctypes
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from importlib.machinery import ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
COMPILER = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
ORDERS = (0, 1, 2, 3)
"""Which threads run as far as they can before others do: low numbers, high numbers, and two random orders."""


class OnHost:
    """The module `_cuda` compiled for the host.

    Attributes:
        kernels: the module.
        library: the same file, with the functions of tests/cuda_on_host/examples.cu.
    """

    def __init__(self, file: Path) -> None:
        spec = spec_from_file_location("_cuda", file, loader=ExtensionFileLoader("_cuda", str(file)))
        assert spec is not None
        assert spec.loader is not None
        self.kernels: ModuleType = module_from_spec(spec)
        spec.loader.exec_module(self.kernels)
        self.library = ctypes.CDLL(str(file))
        self.library.last_error.restype = ctypes.c_char_p
        self.library.copied_bytes.restype = ctypes.c_longlong

    def arrange(self, order: int = 0, processors: int = 3, *, in_bulk: bool = True) -> None:
        """Chooses the order of threads, the multiprocessors that the device is said to have, and whether they have
        a unit that copies in bulk.
        """
        self.library.set_order(order)
        self.library.set_processors(processors)
        self.library.set_copies_in_bulk(in_bulk)


def build(folder: Path) -> OnHost:
    """Compiles csrc/cuda and the emulation into `folder`, and loads them."""
    import pybind11

    emulation = Path(__file__).with_name("cuda_on_host")
    sources = [*ROOT.glob("csrc/cuda/*.c*"), *emulation.glob("*.c*")]
    include = [emulation, ROOT / "csrc", pybind11.get_include(), sysconfig.get_paths()["include"]]
    flags = ["-std=c++17", "-fPIC", "-fvisibility=hidden", "-U_FORTIFY_SOURCE", "-DTTT_ISA=cuda"]
    flags += ['-DTTT_CUDA_ARCHITECTURES="host"']
    assert COMPILER is not None

    def compile_one(source: Path) -> str:
        object_ = folder / f"{source.name}.o"
        # The bindings are the longest to compile, and no kernel.
        level = "-O0" if source.name == "bindings.cpp" else "-O1"
        command = [COMPILER, "-x", "c++", level, *flags, *(f"-I{path}" for path in include)]
        done = subprocess.run(
            [*command, "-c", source, "-o", object_], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{source} does not compile for the host:\n{done.stderr}")
        return str(object_)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sorted(sources)))
    file = folder / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    subprocess.run([COMPILER, "-shared", *objects, "-o", file], check=True)
    return OnHost(file)
