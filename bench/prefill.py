"""
How fast models read: tokens and operations per second, memory and loss, and how time moves with position.

Without arguments: the tiny preset reads this Python's own standard library, in under two minutes.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

import numpy as np

from bench import options
from bench.contest import all_agree, measure_all
from bench.flops import prefill_flops_per_token
from bench.machine import describe, peak_rate
from bench.measure import Job, in_child
from bench.output import write_json
from bench.plot import plot_positions
from bench.report import print_report
from engine.commands.positions import check_plot
from engine.config import DTYPES, TTTConfig
from engine.device import checked_device

COMPARISONS = ("reference", "full-attention", "sliding-window")
PIECES = 16


@dataclass(frozen=True)
class Contender:
    """A model to be measured with a backend."""

    model: str
    backend: str
    config: TTTConfig

    @property
    def label(self) -> str:
        """What messages call it."""
        return f"{self.model}, {self.backend}"


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        return run(args)
    except (ValueError, OSError) as error:
        print(f"bench/prefill.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    options.add_model_arguments(parser, "tiny")
    options.add_reading_arguments(parser, "8192 with tiny, else 4096")
    parser.add_argument(
        "--compare",
        default="reference,full-attention",
        metavar="LIST",
        help=f"what else to measure, of {', '.join(COMPARISONS)}; or all, or none (default: %(default)s). "
        "reference is the same model on the reference backend, the others are Transformers on the chosen one",
    )
    parser.add_argument(
        "--plot", metavar="FILE", help="draw time per token against position (.png, .svg or .pdf)"
    )
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    """0; 1 where a backend disagrees with the reference or a model failed. `ValueError` for bad input."""
    context = args.context if args.context is not None else 8192 if args.preset == "tiny" else 4096
    options.at_least_one(
        context=context, batch=args.batch, repeat=args.repeat, window=args.window, mini_batch=args.mini_batch
    )
    device = checked_device(args.device)
    dtype = options.chosen_dtype(args.dtype, device)
    backend = options.chosen_backend(args.backend, dtype, device)
    overrides = {"window": args.window, "mini_batch_size": args.mini_batch}
    config = TTTConfig.preset(
        args.preset,
        compute_dtype=dtype,
        **{name: value for name, value in overrides.items() if value is not None},
    )
    contenders = chosen_contenders(args.compare, config, backend, context)
    tokenizer_name, tokenizer = options.chosen_tokenizer(args.tokenizer, config.vocab_size)
    for option, path in (("--json", args.json), ("--plot", args.plot)):
        if path is not None:
            options.check_writable(option, path)
    if args.plot is not None:
        check_plot(args.plot)
    tokens = options.read_tokens(args.text, tokenizer, args.batch, context + 1)

    machine = describe(device)
    common = {
        "preset": args.preset,
        "context": context,
        "batch": args.batch,
        "dtype": dtype,
        "device": str(device),
        "mini_batch": config.mini_batch_size,
        "text": args.text or "standard library",
        "tokenizer": tokenizer_name,
        "machine": machine,
    }
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "tokens.npy"))
        np.save(path, tokens.numpy())
        jobs = [
            Job(
                "measure",
                c.config.to_dict(),
                c.backend,
                str(device),
                path,
                args.repeat,
                pieces(config, context),
            )
            for c in contenders
        ]
        work = list(zip(contenders, jobs, strict=True))
        if not all_agree(
            [(c, replace(j, task="check")) for c, j in work if c.backend != "reference"], in_child
        ):
            return 1
        # Before and after: a machine that is shared does not keep one speed.
        peak = peak_rate(DTYPES[dtype], device)
        results = measure_all(work, in_child)
        peak = max(peak, peak_rate(DTYPES[dtype], device))
    runs = [common | row(contender, result, jobs[0], args.batch, peak) for contender, result in results]
    print_report(runs)
    if args.json is not None:
        write_json(args.json, runs)
    if args.plot is not None:
        plot_positions(
            runs, args.plot, f"{args.preset}, {dtype}, {machine['cpu']}, {machine['threads']} threads"
        )
    return 0 if len(results) == len(work) else 1


def chosen_contenders(compare: str, config: TTTConfig, backend: str, context: int) -> list[Contender]:
    """The model itself, and those that `--compare` names."""
    names = options.chosen_names("--compare", compare, COMPARISONS)
    contenders = [Contender("ttt-e2e", backend, config)]
    if "reference" in names and backend != "reference":
        contenders.append(Contender("ttt-e2e", "reference", config))
    if "full-attention" in names:
        contenders.append(Contender("full-attention", backend, config.as_full_attention(context)))
    if "sliding-window" in names:
        contenders.append(Contender("sliding-window", backend, config.as_sliding_window()))
    return contenders


def pieces(config: TTTConfig, context: int) -> tuple[int, ...]:
    """Some sixteen equal pieces of whole mini-batches, and what is left."""
    mini_batches = -(-context // config.mini_batch_size)
    length = config.mini_batch_size * -(-mini_batches // PIECES)
    return tuple(min(length, context - start) for start in range(0, context, length))


def row(contender: Contender, result: dict[str, Any], job: Job, batch: int, peak: float) -> dict[str, Any]:
    """One object of the JSON, beside what all of them have in common."""
    flops_per_token = prefill_flops_per_token(contender.config, sum(job.pieces))
    flops_per_s = result["tokens_per_s"] * flops_per_token
    times = result.pop("seconds_by_position")
    return {
        "model": contender.model,
        "backend": contender.backend,
        "window": contender.config.window,
        **result,
        "flops_per_token": flops_per_token,
        "flops_per_s": flops_per_s,
        "peak_flops_per_s": peak,
        "share_of_peak": flops_per_s / peak,
        "position": list(accumulate(job.pieces)),
        "seconds_per_token_by_position": [
            time / (length * batch) for time, length in zip(times, job.pieces, strict=True)
        ],
    }


if __name__ == "__main__":
    sys.exit(main())
