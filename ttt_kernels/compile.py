"""Compiles every Triton kernel and configuration ahead of time: `python -m ttt_kernels.compile`.

Prints, for each, its registers, spilled bytes, shared memory and the instructions of its matrix products; and for the
kernels of the CUDA extension, where nvcc has built it, the first three. Exit status 1 where one spills, needs more
shared memory than the chip has, or does not use the tensor cores that it could; 2 without Triton. No GPU is needed.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from importlib.util import find_spec
from multiprocessing import get_context

from ttt_kernels import aot, aot_cuda, extension
from ttt_kernels.aot import Case, Report

OPERATORS = ("swa", "swiglu", "linear_ce", "rms_norm", "rope", "clipped_sgd")
"""Operators with Triton kernels."""


def cases(operator: str, arch: int) -> list[Case]:
    """An operator's kernels for an architecture, each with its configurations."""
    return import_module(f"ttt_kernels.{operator}.triton_aot").cases(arch)


Place = tuple[str, int, int]
"""Of a case: its operator, architecture (80 is sm_80) and index."""


def _compile(place: Place) -> Report:
    operator, arch, index = place
    return aot.compile_case(cases(operator, arch)[index], arch)


def reports(places: Sequence[Place]) -> Iterator[Report]:
    """Compiles cases in as many processes as there are processors; gives their reports in order."""
    workers = max(1, min(len(os.sched_getaffinity(0)), len(places)))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(_compile, places)


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m ttt_kernels.compile", description=__doc__)
    parser.add_argument("--arch", nargs="+", default=["sm_80", "sm_90", "sm_100"],
                        choices=["sm_80", "sm_90", "sm_100"], help="architectures")  # fmt: skip
    every = tuple(dict.fromkeys((*OPERATORS, *aot_cuda.OPERATORS)))
    parser.add_argument("--operator", nargs="+", default=every, choices=every)
    parser.add_argument("--kernel", default="", help="only kernels whose name has this in it")
    parser.add_argument("--variant", default="", help="only variants (dtype and the like) that begin so")
    return parser.parse_args(given)


def _line(kernel: str, variant: str, config: str, arch: str, report: Report, problems: Sequence[str]) -> str:
    return (
        f"{kernel:28} {variant:14} {config:30} {arch:7} {report.registers:9} {report.spilled:7} {report.shared:7} "
        f"{report.products()}{'  <- ' + ', '.join(problems) if problems else ''}"
    )


def _print_cuda(options: argparse.Namespace) -> tuple[int, int]:
    """Prints the chosen kernels of the CUDA extension; returns how many there are, and how many have problems."""
    file = aot_cuda.built()
    if file is None:
        print(f"no CUDA kernels: {extension.load_cuda()[1]}")
        return 0, 0
    count, failed = 0, 0
    for kernel in aot_cuda.kernels(file):
        arch = kernel.arch.removesuffix("a")
        if (
            kernel.operator in options.operator
            and arch in options.arch
            and options.kernel in kernel.name
            and kernel.variant.startswith(options.variant)
        ):
            problems = kernel.report.problems(int(arch.removeprefix("sm_")), None)
            count, failed = count + 1, failed + bool(problems)
            print(_line(kernel.name, kernel.variant, "CUDA C++", kernel.arch, kernel.report, problems))
    return count, failed


def main(given: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = _arguments(given)
    if find_spec("triton") is None:
        print("the triton package is not installed: nothing to compile", file=sys.stderr)
        return 2
    # Interpreted kernels cannot be compiled.
    os.environ["TRITON_INTERPRET"] = "0"
    print(f"{'kernel':28} {'variant':14} {'configuration':30} {'arch':7} registers spilled  shared products")
    chosen = {
        (operator, arch, index): case
        for arch in (int(name.removeprefix("sm_")) for name in options.arch)
        for operator in options.operator
        if operator in OPERATORS
        for index, case in enumerate(cases(operator, arch))
        if options.kernel in case.name and case.variant.startswith(options.variant)
    }
    failed = 0
    for ((_, arch, _), case), report in zip(chosen.items(), reports(list(chosen)), strict=True):
        problems = report.problems(arch, case.narrow)
        failed += bool(problems)
        print(_line(case.name, case.variant, str(case.config), f"sm_{arch}", report, problems), flush=True)
    of_cuda, failed_of_cuda = _print_cuda(options)
    failed += failed_of_cuda
    print(f"{len(chosen) + of_cuda} kernels compiled, {failed} with problems")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
