"""Compiles every Triton kernel and configuration ahead of time: `python -m ttt_kernels.compile`.

Prints, for each, its registers, spilled bytes, shared memory and the instructions of its matrix products. Exit status
1 where one spills, needs more shared memory than the chip has, or does not use the tensor cores that it could; 2
without Triton. No GPU is needed.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from importlib.util import find_spec
from multiprocessing import get_context

from ttt_kernels import aot
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
    parser.add_argument("--operator", nargs="+", default=OPERATORS, choices=OPERATORS)
    parser.add_argument("--kernel", default="", help="only kernels whose name has this in it")
    parser.add_argument("--variant", default="", help="only variants (dtype and the like) that begin so")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    options = _arguments(given)
    if find_spec("triton") is None:
        print("the triton package is not installed: nothing to compile", file=sys.stderr)
        return 2
    # Interpreted kernels cannot be compiled.
    os.environ["TRITON_INTERPRET"] = "0"
    print(f"{'kernel':28} {'variant':14} {'configuration':30} {'arch':6} registers spilled  shared products")
    chosen = {
        (operator, arch, index): case
        for arch in (int(name.removeprefix("sm_")) for name in options.arch)
        for operator in options.operator
        for index, case in enumerate(cases(operator, arch))
        if options.kernel in case.name and case.variant.startswith(options.variant)
    }
    failed = 0
    for ((_, arch, _), case), report in zip(chosen.items(), reports(list(chosen)), strict=True):
        problems = report.problems(arch, case.narrow)
        failed += bool(problems)
        print(
            f"{case.name:28} {case.variant:14} {case.config!s:30} {f'sm_{arch}':6} {report.registers:9} "
            f"{report.spilled:7} {report.shared:7} {report.products()}"
            f"{'  <- ' + ', '.join(problems) if problems else ''}",
            flush=True,
        )
    print(f"{len(chosen)} kernels compiled, {failed} with problems")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
