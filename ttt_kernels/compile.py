"""Compiles every Triton kernel and configuration ahead of time: `python -m ttt_kernels.compile`.

Prints, for each, its registers, spilled bytes, shared memory and the instructions of its matrix products. Exit status
1 where one spills, needs more shared memory than the chip has, or does not use the tensor cores that it could; 2
without Triton. No GPU is needed.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec

from ttt_kernels import aot
from ttt_kernels.aot import Case


def _swa(arch: int) -> list[Case]:
    from ttt_kernels.swa.triton_aot import cases

    return cases(arch)


OPERATORS: dict[str, Callable[[int], list[Case]]] = {"swa": _swa}
"""Operator -> its kernels for an architecture, each with its configurations."""


def _arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m ttt_kernels.compile", description=__doc__)
    parser.add_argument("--arch", nargs="+", default=["sm_80", "sm_90", "sm_100"],
                        choices=["sm_80", "sm_90", "sm_100"], help="architectures")  # fmt: skip
    parser.add_argument("--operator", nargs="+", default=list(OPERATORS), choices=list(OPERATORS))
    parser.add_argument("--kernel", default="", help="only kernels whose name has this in it")
    parser.add_argument("--variant", default="", help="only variants (dtype, head_dim) that begin so")
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
    count = failed = 0
    for arch in options.arch:
        number = int(arch.removeprefix("sm_"))
        for case in (c for operator in options.operator for c in OPERATORS[operator](number)):
            if options.kernel not in case.name or not case.variant.startswith(options.variant):
                continue
            report = aot.compile_case(case, number)
            problems = report.problems(number, case.narrow)
            count, failed = count + 1, failed + bool(problems)
            print(
                f"{case.name:28} {case.variant:14} {case.config!s:30} {arch:6} {report.registers:9} "
                f"{report.spilled:7} {report.shared:7} {report.products()}"
                f"{'  <- ' + ', '.join(problems) if problems else ''}",
                flush=True,
            )
    print(f"{count} kernels compiled, {failed} with problems")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
