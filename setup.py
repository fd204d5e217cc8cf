"""Builds the C++ extension `ttt_kernels._cpu`, and with nvcc the CUDA extension `ttt_kernels._cuda`.

The CPU's kernel sources are compiled once per instruction set and the processor's best is chosen when the
module loads, so one build serves every processor of its architecture; CUDA's are compiled for every
architecture of GPU that nvcc knows of those named below, and as PTX for later ones. The extensions include
no header of torch and link neither torch, an OpenMP runtime nor a CUDA library. Where one cannot be built
the installation goes on without it and the reason is kept for `ttt_kernels.backends()`.

nvcc is that of CUDA_HOME where that is set, else that of /usr/local/cuda, else the PATH's. No GPU is needed.

Environment: TTT_KERNELS_CXXFLAGS, flags for the compiler and the linker after all others;
TTT_KERNELS_INSTRUCTION_SETS, names of the sets to build beside the portable one (all where it is not set);
TTT_KERNELS_CUDA_ARCHITECTURES, names of the architectures to build for (all of sm_80, sm_90a and sm_100 that
nvcc knows where it is not set; nothing of CUDA is built where it is empty).
"""

import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

COMMON_FLAGS = [
    "-std=c++17",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wno-psabi",
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",
    "-g0",
]
AVX512 = [
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"),
    "-mprefer-vector-width=512",
]
ARCHITECTURES = ("sm_80", "sm_90a", "sm_100")
NVCC_FLAGS = ["-std=c++17", "-O3", "-DTTT_ISA=cuda", "-Icsrc", "-Xcompiler=-fPIC,-fvisibility=hidden"]


def instruction_sets() -> dict[str, list[str]]:
    """Name of every instruction set that is built, with its compiler flags, plainest first."""
    known = known_instruction_sets()
    names = os.environ.get("TTT_KERNELS_INSTRUCTION_SETS", " ".join(known)).split()
    return {name: flags for name, flags in known.items() if name == "portable" or name in names}


def known_instruction_sets() -> dict[str, list[str]]:
    """Those of this machine's architecture."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return {"portable": ["-O3"]}
    return {
        # Only for processors older than AVX2: not worth the third more time that -O3 takes to compile.
        "portable": ["-O2"],
        "avx2": ["-O3", "-mavx2", "-mfma", "-mf16c"],
        "avx512": ["-O3", *AVX512],
        "avx512_bf16": ["-O3", *AVX512, "-mavx512bf16"],
    }


def extra_flags() -> list[str]:
    """What comes after all other flags of the compiler and the linker."""
    return os.environ.get("TTT_KERNELS_CXXFLAGS", "").split()


def find_nvcc() -> Path:
    """The CUDA compiler.

    Raises:
        RuntimeError: there is none.
    """
    if home := os.environ.get("CUDA_HOME"):
        found, places = shutil.which("nvcc", path=f"{home}/bin"), f"{home} (CUDA_HOME)"
    else:
        found = shutil.which("nvcc", path="/usr/local/cuda/bin") or shutil.which("nvcc")
        places = "/usr/local/cuda or on the PATH"
    if not found:
        raise RuntimeError(f"there is no nvcc in {places}")
    return Path(found).resolve()


def asked_architectures() -> list[str] | None:
    """What TTT_KERNELS_CUDA_ARCHITECTURES names, or None where it is not set.

    Raises:
        RuntimeError: it is empty.
    """
    value = os.environ.get("TTT_KERNELS_CUDA_ARCHITECTURES")
    if value is not None and not value.split():
        raise RuntimeError("TTT_KERNELS_CUDA_ARCHITECTURES is empty")
    return None if value is None else value.split()


def architectures(known: str, asked: list[str] | None) -> list[str]:
    """Architectures to build for, the oldest first.

    Args:
        known: what `nvcc --list-gpu-code` prints.
        asked: `asked_architectures()`.

    Raises:
        RuntimeError: nvcc knows none of `ARCHITECTURES`, or another one is asked for.
    """
    # An architecture with instructions of its own is not listed beside the one that it extends.
    possible = [name for name in ARCHITECTURES if name.removesuffix("a") in known.split()]
    if not possible:
        raise RuntimeError(f"nvcc knows none of {', '.join(ARCHITECTURES)}")
    for name in asked or ():
        if name not in possible:
            accepted = ", ".join(possible)
            raise RuntimeError(f"TTT_KERNELS_CUDA_ARCHITECTURES has {name!r}; accepted are {accepted}")
    return [name for name in possible if asked is None or name in asked]


def targets(names: list[str]) -> dict[str, str]:
    """What the kernels are compiled to, with nvcc's option: the architectures, and PTX that later ones run."""
    numbers = [name.removeprefix("sm_") for name in names]
    found = {f"sm_{n}": f"-gencode=arch=compute_{n},code=sm_{n}" for n in numbers}
    # PTX of an architecture with instructions of its own runs nowhere else.
    newest = numbers[-1].removesuffix("a")
    return {**found, f"compute_{newest}": f"-gencode=arch=compute_{newest},code=compute_{newest}"}


def static_runtime(nvcc: Path) -> Path:
    """The folder of the runtime library that is linked into the extension."""
    home = nvcc.parent.parent
    for folder in (home / "lib64", home / "lib", *sorted(home.glob("targets/*/lib"))):
        if (folder / "libcudart_static.a").is_file():
            return folder
    raise RuntimeError(f"there is no libcudart_static.a beside {nvcc}")


class BuildExtension(build_ext):
    """Compiles all sources in one pool; what cannot be built is recorded instead of raised."""

    def run(self) -> None:
        root = Path() if self.inplace else Path(self.build_lib)
        self._reasons = {
            ext.name: root / f"{ext.name.replace('.', '/')}_build_failure.txt" for ext in self.extensions
        }
        for path in self._reasons.values():
            path.unlink(missing_ok=True)
        try:
            super().run()
        except Exception as error:
            for ext in list(self.extensions):
                self._leave_out(ext, error)

    def _leave_out(self, ext: Extension, error: Exception) -> None:
        """Installs without an extension, and records why."""
        what = "C++" if ext.name.endswith("_cpu") else "CUDA"
        path = self._reasons[ext.name]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"the {what} extension could not be built when the package was installed: {error}\n")
        self.warn(f"ttt_kernels is installed without its {what} kernels: {error}")
        self.extensions = [other for other in self.extensions if other is not ext]

    def build_extensions(self) -> None:
        steps = {"ttt_kernels._cpu": self._cpu, "ttt_kernels._cuda": self._cuda}
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            begun: list[tuple[Extension, Callable[[], None]]] = []
            for ext in list(self.extensions):
                try:
                    begun.append((ext, steps[ext.name](ext, pool)))
                except Exception as error:
                    self._leave_out(ext, error)
            for ext, link in begun:
                try:
                    link()
                except Exception as error:
                    self._leave_out(ext, error)

    def _compile(self, source: str, folder: str, macros: list[tuple[str, str]], flags: list[str]) -> str:
        """Compiles a C++ source; returns the object's path."""
        import pybind11

        (path,) = self.compiler.compile(
            [source],
            output_dir=str(Path(self.build_temp) / folder),
            macros=macros,
            include_dirs=["csrc", pybind11.get_include()],
            depends=[str(p) for p in sorted(Path("csrc").rglob("*.h"))],
            extra_postargs=[*COMMON_FLAGS, *flags, *extra_flags()],
        )
        return path

    def _link(self, ext: Extension, objects: list[Future[str]], **options: list[str]) -> None:
        self.compiler.link_shared_object(
            [object_.result() for object_ in objects],
            self.get_ext_fullpath(ext.name),
            extra_postargs=[*options.pop("flags", []), *extra_flags()],
            target_lang="c++",
            **options,
        )

    def _cpu(self, ext: Extension, pool: ThreadPoolExecutor) -> Callable[[], None]:
        """Begins to compile the CPU's kernels; what it returns links them."""
        kernels = sorted(str(p) for p in Path("csrc/cpu").glob("*.cpp"))
        sets = instruction_sets()
        built = [(f"TTT_BUILT_{name.upper()}", "1") for name in sets]
        # What is not a kernel takes the longest and comes first. The plainest set comes before the others:
        # of a template of the standard library that several sets instantiate, the linker keeps the first
        # copy, which must run on every processor.
        jobs = [(source, "common", built, ["-O2"]) for source in ext.sources]
        jobs += [
            (source, name, [("TTT_ISA", name)], flags) for name, flags in sets.items() for source in kernels
        ]
        objects = [pool.submit(self._compile, *job) for job in jobs]
        libraries = ["dl", "pthread"] if platform.system() == "Linux" else []
        return lambda: self._link(ext, objects, libraries=libraries)

    def _cuda(self, ext: Extension, pool: ThreadPoolExecutor) -> Callable[[], None]:
        """Begins to compile CUDA's kernels, the longest first; what it returns links them."""
        asked, nvcc = asked_architectures(), find_nvcc()
        known = subprocess.run([nvcc, "--list-gpu-code"], check=True, capture_output=True, text=True).stdout
        goals = targets(architectures(known, asked))
        library = static_runtime(nvcc)
        compiler = ["-ccbin", os.environ["CXX"]] if os.environ.get("CXX") else []
        folder = Path(self.build_temp) / "cuda"
        folder.mkdir(parents=True, exist_ok=True)

        def compile_one(source: Path) -> str:
            object_ = folder / f"{source.stem}.o"
            command = [nvcc, *NVCC_FLAGS, *compiler, *goals.values(), "-c", source, "-o", object_]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"nvcc failed on {source}: {done.stderr.strip()[-2000:]}")
            return str(object_)

        built = [("TTT_CUDA_ARCHITECTURES", f'"{" ".join(goals)}"')]
        kernels = sorted(Path("csrc/cuda").glob("*.cu"), key=lambda p: -p.stat().st_size)
        objects = [pool.submit(compile_one, source) for source in kernels]
        objects += [pool.submit(self._compile, source, "cuda", built, ["-O2"]) for source in ext.sources]
        # The runtime's symbols stay inside: torch brings a runtime of its own.
        return lambda: self._link(
            ext, objects, library_dirs=[str(library)], flags=["-Wl,--exclude-libs,ALL"],
            libraries=["cudart_static", "dl", "rt", "pthread"],
        )  # fmt: skip


if __name__ == "__main__":
    setup(
        # What takes the longest starts first.
        ext_modules=[
            Extension("ttt_kernels._cuda", sources=["csrc/cuda/bindings.cpp"]),
            Extension("ttt_kernels._cpu", sources=["csrc/bindings.cpp", "csrc/common/parallel.cpp"]),
        ],
        cmdclass={"build_ext": BuildExtension},
    )
