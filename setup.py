"""Builds the C++ extension `ttt_kernels._cpu`.

The kernel sources are compiled once per instruction set and the processor's best is chosen when the
module loads, so one build serves every processor of its architecture. The extension includes no header
of torch and links neither torch nor an OpenMP runtime. Where it cannot be built the installation goes
on without it and the reason is kept for `ttt_kernels.backends()`.

Environment: TTT_KERNELS_CXXFLAGS, flags for the compiler and the linker after all others;
TTT_KERNELS_INSTRUCTION_SETS, names of the sets to build beside the portable one (all where it is not set).
"""

import os
import platform
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

REASON_FILE = "_cpu_build_failure.txt"
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


class BuildExtension(build_ext):
    """Compiles the kernels for each instruction set; a failure is recorded instead of raised."""

    def run(self) -> None:
        reason = self._reason_path()
        reason.unlink(missing_ok=True)
        try:
            super().run()
        except Exception as error:
            reason.parent.mkdir(parents=True, exist_ok=True)
            reason.write_text(
                f"the C++ extension could not be built when the package was installed: {error}\n"
            )
            self.warn(f"ttt_kernels is installed without its C++ kernels: {error}")
            self.extensions = []

    def _reason_path(self) -> Path:
        if self.inplace:
            return Path("ttt_kernels") / REASON_FILE
        return Path(self.build_lib) / "ttt_kernels" / REASON_FILE

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        kernels = sorted(str(p) for p in Path("csrc/cpu").glob("*.cpp"))
        include = ["csrc", pybind11.get_include()]
        depends = [str(p) for p in sorted(Path("csrc").rglob("*.h"))]
        sets = instruction_sets()
        extra = os.environ.get("TTT_KERNELS_CXXFLAGS", "").split()

        def compile_one(job: tuple[str, str, list[tuple[str, str]], list[str]]) -> list[str]:
            folder, source, macros, flags = job
            return self.compiler.compile(
                [source],
                output_dir=str(Path(self.build_temp) / folder),
                macros=macros,
                include_dirs=include,
                depends=depends,
                extra_postargs=[*COMMON_FLAGS, *flags, *extra],
            )

        built = [(f"TTT_BUILT_{name.upper()}", "1") for name in sets]
        # What is not a kernel takes the longest and starts first. The plainest set comes before the others:
        # of a template of the standard library that several sets instantiate, the linker keeps the first
        # copy, which must run on every processor.
        jobs = [("common", source, built, ["-O2"]) for source in ext.sources]
        jobs += [
            (name, source, [("TTT_ISA", name)], flags) for name, flags in sets.items() for source in kernels
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            objects = [path for paths in pool.map(compile_one, jobs) for path in paths]
        self.compiler.link_shared_object(
            objects,
            self.get_ext_fullpath(ext.name),
            libraries=["dl", "pthread"] if platform.system() == "Linux" else [],
            extra_postargs=extra,
            target_lang="c++",
        )


setup(
    ext_modules=[Extension("ttt_kernels._cpu", sources=["csrc/bindings.cpp", "csrc/common/parallel.cpp"])],
    cmdclass={"build_ext": BuildExtension},
)
