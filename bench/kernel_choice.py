"""Which contenders a run has: this library's backends, and baselines by name."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence

import torch

from bench.kernel_contenders import OWN
from engine.config import DTYPES
from ttt_kernels.backends import available
from ttt_kernels.registry import Operator


def add_arguments(parser: argparse.ArgumentParser, baselines: str) -> None:
    """--backend and --baselines; `baselines` tells what these are."""
    parser.add_argument(
        "--backend",
        nargs="+",
        metavar="NAME",
        help="reference, cpu, ... (default: all but reference that can run there)",
    )
    parser.add_argument("--baselines", nargs="+", metavar="NAME", help=f"what else to measure: {baselines}")


def chooser(
    operator: Operator, known: Mapping[str, tuple[str, ...]], default: Mapping[str, tuple[str, ...]]
) -> Callable[[argparse.Namespace, str, torch.device], list[str]]:
    """A function of arguments, dtype and device that names contenders, this library's backends first.

    `default` has the baselines of a kind of device, where these are not all that are known. The function raises
    `ValueError` for a backend or baseline that cannot be used.
    """

    def contenders(args: argparse.Namespace, dtype: str, device: torch.device) -> list[str]:
        example = torch.empty(0, dtype=DTYPES[dtype], device=device)
        usual = default.get(device.type, tuple(known))
        return [*own_names(operator, args.backend, example), *baseline_names(args.baselines, known, usual)]

    return contenders


def own_names(operator: Operator, names: Sequence[str] | None, example: torch.Tensor) -> list[str]:
    """This library's contenders for tensors like the example; `ValueError` for a backend that cannot serve."""
    if names is not None:
        return [OWN + operator.select(name, example) for name in dict.fromkeys(names)]
    return [OWN + name for name in fast_backends([operator], example) or ["reference"]]


def fast_backends(operators: Sequence[Operator], example: torch.Tensor) -> list[str]:
    """The backends but reference whose kernels serve all of the operators for tensors like the example."""

    def serves(name: str, operator: Operator) -> bool:
        # A backend that an operator says nothing about has no kernel for it.
        refusal = operator.refusals.get(name)
        return refusal is not None and refusal((example,)) is None

    return [name for name in available() if all(serves(name, op) for op in operators)]


def baseline_names(
    names: Sequence[str] | None, known: Mapping[str, tuple[str, ...]], default: Sequence[str]
) -> list[str]:
    """The contenders that the baselines of those names stand for; `ValueError` for an unknown one."""
    chosen = tuple(default) if names is None else tuple(dict.fromkeys(names))
    if names is not None:
        chosen = tuple(known) if chosen == ("all",) else () if chosen == ("none",) else chosen
    for name in chosen:
        if name not in known:
            raise ValueError(f"--baselines: {name!r} is unknown; accepted: {', '.join(known)}; all or none")
    return [full for name in chosen for full in known[name]]
