"""`python bench/kernels.py attention`: causal attention over a sliding window, all orders of its gradients."""

from __future__ import annotations

import argparse

import torch

from bench import kernel_choice, options
from bench.attention_contenders import FUSED, contender
from bench.attention_problem import TAIL, Problem, truths, verdicts
from bench.kernel_contenders import own
from bench.kernel_problem import ORDERS
from engine.config import DTYPES
from ttt_kernels.swa import operator

__all__ = [
    "BEYOND_OUTPUTS",
    "CEILING",
    "COLUMN",
    "ORDERS",
    "Problem",
    "contender",
    "own",
    "truths",
    "verdicts",
]

CEILING = "products"
COLUMN = "T"
BEYOND_OUTPUTS = False

BASELINES: dict[str, tuple[str, ...]] = {
    "sdpa": tuple(FUSED),
    "math": ("sdpa-math",),
    "tiles": ("sdpa-tiles",),
    "flex": ("flex",),
}
# flex_attention compiles for half a minute at every length on a CPU, and has no backward there.
DEFAULT_BASELINES = {"cpu": ("sdpa", "math", "tiles")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--length",
        type=int,
        nargs="+",
        default=[1024, 2048],
        metavar="N",
        help="queries, and as many keys (default: 1024 2048)",
    )
    parser.add_argument("--window", default="512", metavar="N|none", help="(default: 512)")
    parser.add_argument("--heads", type=int, default=12, metavar="N", help="(default: 12)")
    parser.add_argument("--kv-heads", type=int, metavar="N", help="(default: as many as --heads)")
    parser.add_argument("--head-dim", type=int, default=64, metavar="N", help="(default: 64)")
    kernel_choice.add_arguments(
        parser,
        f"of {', '.join(BASELINES)}; or all, or none (default: all, but no flex on a CPU). sdpa: torch's fused "
        "kernels, with a mask tensor for the window; math: its formulas, which alone differentiate twice; tiles: "
        "its fused kernel, block by block; flex: flex_attention, compiled",
    )


def problems(args: argparse.Namespace, dtype: str) -> list[Problem]:
    """One for each length; `ValueError` for bad input."""
    kv_heads = args.heads if args.kv_heads is None else args.kv_heads
    window = _window(args.window)
    options.at_least_one(
        window=window, batch=args.batch, heads=args.heads, kv_heads=kv_heads, head_dim=args.head_dim
    )
    for length in args.length:
        options.at_least_one(length=length)
    if args.heads % kv_heads:
        raise ValueError(f"--heads={args.heads} is not a multiple of --kv-heads={kv_heads}")
    return [
        Problem(args.batch, length, args.heads, kv_heads, args.head_dim, window, dtype)
        for length in sorted(set(args.length))
    ]


def contenders(args: argparse.Namespace, dtype: str, device: torch.device) -> list[str]:
    """Names, this library's backends first; `ValueError` for a backend or baseline that cannot be used."""
    example = torch.empty(0, 1, 1, args.head_dim, dtype=DTYPES[dtype], device=device)
    return [*kernel_choice.own_names(operator, args.backend, example), *_baselines(args.baselines, device)]


def describe_check(problem: Problem) -> dict[str, int | None]:
    """How results were compared with float64, for the JSON."""
    short = problem.short()
    return {
        "all_rows_at_length": short.length,
        "all_rows_at_window": short.window,
        "last_rows_at_full_length": min(TAIL, problem.length),
    }


def title(problem: Problem) -> str:
    """The settings that all lengths share."""
    heads = f"{problem.heads} heads"
    if problem.kv_heads != problem.heads:
        heads += f" ({problem.kv_heads} of keys)"
    window = "no window" if problem.window is None else f"window {problem.window}"
    return f"attention, {problem.dtype}, batch {problem.batch}, {heads} of {problem.head_dim}, {window}"


def _window(text: str) -> int | None:
    if text == "none":
        return None
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"--window={text!r} is not accepted; it is a number of keys, or none") from None


def _baselines(names: list[str] | None, device: torch.device) -> list[str]:
    found = kernel_choice.baseline_names(
        names, BASELINES, DEFAULT_BASELINES.get(device.type, tuple(BASELINES))
    )
    # A CPU has one of torch's fused kernels only.
    return [name for name in found if device.type != "cpu" or name not in ("sdpa-efficient", "sdpa-cudnn")]
