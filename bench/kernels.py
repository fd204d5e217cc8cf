"""
How fast an operator is at every order: time, useful operations, memory and error, beside what else could be called.

Results are compared with float64 before anything is timed, and no speed of a wrong result is reported.

An operator is a module as kernels_swiglu.py is one: `ORDERS`, `CEILING` (what bounds its speed, one of
kernel_ceiling.py), `COLUMN` (the name of what problems grow in), `BEYOND_OUTPUTS` (whether memory beyond the results is
told too), `Problem`, `add_arguments`, `problems`, `contenders`,
`contender`, `own`, `truths`, `verdicts`, `describe_check` and `title`.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch

from bench import (
    kernels_attention,
    kernels_clipped_sgd,
    kernels_inner_step,
    kernels_linear_ce,
    kernels_rms_norm,
    kernels_rope,
    kernels_swiglu,
    options,
)
from bench.kernel_ceiling import CEILINGS, Ceiling
from bench.kernel_child import Job, in_child
from bench.kernel_report import add_ratios, print_report
from bench.machine import describe
from bench.output import progress, write_json
from bench.plot import plot_lengths
from bench.table import size, tokens
from engine.commands.positions import check_plot
from engine.config import DTYPES
from engine.device import available_bytes, checked_device

OPERATORS: dict[str, ModuleType] = {
    "attention": kernels_attention,
    "swiglu": kernels_swiglu,
    "linear_cross_entropy": kernels_linear_ce,
    "rms_norm": kernels_rms_norm,
    "rope": kernels_rope,
    "clipped_sgd": kernels_clipped_sgd,
    "inner_step": kernels_inner_step,
}
KERNEL_DTYPES = ("float32", "bfloat16", "float16")
# The rest is for what was not foreseen, and for others on the machine.
SHARE_OF_MEMORY = 0.6


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        return run(args, OPERATORS[args.operator])
    except (ValueError, OSError) as error:
        print(f"bench/kernels.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="operator", required=True)
    for name, operator in OPERATORS.items():
        command = commands.add_parser(name, description=operator.__doc__)
        operator.add_arguments(command)
        options.add_common_arguments(command, None, KERNEL_DTYPES)
        command.add_argument(
            "--orders",
            nargs="+",
            choices=operator.ORDERS,
            default=operator.ORDERS,
            help="what to measure; all is forward, backward and double-backward together, through autograd "
            "(default: everything)",
        )
        command.add_argument("--repeat", type=int, default=3, metavar="N", help="timed calls (default: 3)")
        command.add_argument(
            "--plot", metavar="FILE", help="draw time and memory against length (.png, .svg or .pdf)"
        )
    return parser.parse_args(argv)


def run(args: argparse.Namespace, operator: ModuleType) -> int:
    """0; 1 where a result is wrong or a backend of this library failed. `ValueError` for bad input."""
    options.at_least_one(repeat=args.repeat)
    device = checked_device(args.device)
    dtype = options.chosen_dtype(args.dtype, device)
    problems = operator.problems(args, dtype)
    names = operator.contenders(args, dtype, device)
    for option, path in (("--json", args.json), ("--plot", args.plot)):
        if path is not None:
            options.check_writable(option, path)
    if args.plot is not None:
        check_plot(args.plot)
        if len(problems) < 2:
            raise ValueError("--plot needs two lengths or more")
    ceiling = CEILINGS[operator.CEILING]

    # Before and after: a machine that is shared does not keep one speed.
    top = ceiling.measure(DTYPES[dtype], device)
    results = [
        (problem, name, order, result)
        for problem in problems
        for name, order, result in measure(operator, problem, names, args, device)
    ]
    top = max(top, ceiling.measure(DTYPES[dtype], device))
    common = {
        "operator": args.operator,
        "device": str(device),
        "repeat": args.repeat,
        ceiling.key: top,
        "machine": describe(device),
    }
    rows = [
        common | row(operator, problem, name, order, result, ceiling, top)
        for problem, name, order, result in results
    ]
    add_ratios(rows)
    print_report(rows, operator.title(problems[0]), ceiling, operator.COLUMN)
    if args.json is not None:
        write_json(args.json, rows)
    if args.plot is not None:
        plot_lengths(rows, args.plot, operator.title(problems[0]), operator.COLUMN)
    bad = [r for r in rows if r["status"] == "wrong" or (r["own"] and r["status"] != "measured")]
    return 1 if bad else 0


def measure(
    operator: ModuleType,
    problem: Any,
    names: Sequence[str],
    args: argparse.Namespace,
    device: torch.device,
) -> list[tuple[str, str, dict[str, Any]]]:
    """Contender, order and result of all that a length has."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "truths.pt"))
        torch.save(operator.truths(problem, args.orders), path)
        for name in names:
            progress(f"{tokens(problem.length)} {name} ")
            skipped = skips(operator.contender(name), problem, args.orders, device)
            orders = [order for order in args.orders if order in operator.contender(name).orders]
            wanted = tuple(order for order in orders if order not in skipped)
            results = {order: {"reason": reason} for order, reason in skipped.items()}
            job = Job(operator.__name__, name, asdict(problem), str(device), wanted, args.repeat, path)
            try:
                results |= in_child(job) if wanted else {}
            except RuntimeError as error:
                results |= {order: {"reason": str(error)} for order in wanted}
            progress("\n")
            found += [(name, order, results[order]) for order in orders]
    return found


def skips(contender: Any, problem: Any, orders: Sequence[str], device: torch.device) -> dict[str, str]:
    """The orders that are not even tried, and why."""
    refusal = contender.refusal(problem)
    if refusal is not None:
        return dict.fromkeys(orders, refusal)
    limit = SHARE_OF_MEMORY * available_bytes(device)
    needs = {order: contender.estimated_bytes(problem, order) for order in orders}
    return {
        order: f"would need about {size(need)}, more than {SHARE_OF_MEMORY:.0%} of what is free"
        for order, need in needs.items()
        if need > limit
    }


def row(
    operator: ModuleType,
    problem: Any,
    name: str,
    order: str,
    result: dict[str, Any],
    ceiling: Ceiling,
    top: float,
) -> dict[str, Any]:
    """One object of the JSON, beside what all of them have in common."""
    seconds = result.get("seconds")
    status = "skipped" if "reason" in result else "wrong" if seconds is None else "measured"
    useful = ceiling.useful(problem, order)
    found = {
        "contender": name,
        "own": operator.own(name),
        "order": order,
        "status": status,
        "length": problem.length,
        **asdict(problem),
        ceiling.unit: useful,
        "check": operator.describe_check(problem),
        **result,
    }
    if seconds is not None:
        best = min(seconds)
        found |= {
            "seconds_best": best,
            "seconds_median": statistics.median(seconds),
            f"{ceiling.unit}_per_s": useful / best,
            ceiling.share: useful / best / top,
        }
    return found


if __name__ == "__main__":
    sys.exit(main())
