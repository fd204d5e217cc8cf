"""
How fast models learn: time and memory of a training step (a loss and every parameter's gradient; no optimizer).

Each model's gradients are first compared with those of the reference formulas in float64, on a short problem; no speed
of wrong ones is reported. Without arguments: the tiny preset on this Python's own standard library, beside plain
automatic differentiation and a full-attention Transformer.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from bench import options
from bench.contest import all_agree, measure_in_turns
from bench.flops import training_flops_per_token
from bench.machine import describe, peak_rate
from bench.output import write_json
from bench.train_child import Job, in_child
from bench.train_report import print_comparison, print_lengths
from engine.config import DTYPES, TTTConfig
from engine.device import checked_device
from engine.loss import DEFAULT_METHOD, DEFAULT_SNAPSHOT_EVERY, METHODS, Method

BASELINES = ("full-attention", "sliding-window")
COMPARISONS = ("reference", *reversed(METHODS), *BASELINES)


@dataclass(frozen=True)
class Contender:
    """A model to be measured with a backend, and how it gets its gradient, on sequences of `context` tokens.

    snapshot_every: mini-batches between two snapshots, of the method of that name.
    """

    model: str
    backend: str
    config: TTTConfig
    context: int
    method: Method
    snapshot_every: int
    checkpoint_blocks: bool

    @property
    def chosen_method(self) -> Method | None:
        """The method, where there is an inner loop to go back through."""
        return self.method if self.config.suffix_layers else None

    @property
    def label(self) -> str:
        """What messages call it."""
        method = [] if self.chosen_method is None else [self.chosen_method]
        return ", ".join([self.model, *method, self.backend, f"{self.context} tokens"])


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        return run(args)
    except (ValueError, OSError) as error:
        print(f"bench/train.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    options.add_model_arguments(parser, "tiny")
    options.add_reading_arguments(parser, "2048 with tiny, else 4096")
    parser.add_argument("--vocab", type=int, metavar="N", help="classes (default: the preset's)")
    parser.add_argument(
        "--method",
        default=DEFAULT_METHOD,
        choices=METHODS,
        help="how the model gets at the fast weights of every step (default: %(default)s)",
    )
    parser.add_argument(
        "--snapshot-every",
        type=int,
        metavar="N",
        help=f"mini-batches between two snapshots, with the method of that name (default: {DEFAULT_SNAPSHOT_EVERY}, or "
        "half of those that there are if that is less)",
    )
    parser.add_argument(
        "--no-checkpoint-blocks",
        dest="checkpoint_blocks",
        action="store_false",
        help="keep all that the blocks without fast weights compute, instead of computing it again (all models)",
    )
    parser.add_argument(
        "--compare",
        metavar="LIST",
        help=f"what else to measure, of {', '.join(COMPARISONS)}; or all, or none (default: "
        "reference,full-attention, or none with --lengths). reference is the same model by automatic "
        "differentiation of the reference backend with nothing computed again, a method's name is the same model "
        "by that method, the last two are Transformers; these on the chosen backend",
    )
    parser.add_argument(
        "--lengths", metavar="LIST", help="measure the model alone, at each of these contexts instead of one"
    )
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    """0; 1 where a gradient disagrees with the reference or a model failed. `ValueError` for bad input."""
    options.at_least_one(
        context=args.context, batch=args.batch, repeat=args.repeat, window=args.window,
        mini_batch=args.mini_batch, vocab=args.vocab, snapshot_every=args.snapshot_every,
    )  # fmt: skip
    device = checked_device(args.device)
    dtype = options.chosen_dtype(args.dtype, device)
    backend = options.chosen_backend(args.backend, dtype, device)
    config = chosen_config(args, dtype)
    contenders = chosen_contenders(args, config, backend)
    tokenizer_name, tokenizer = options.chosen_tokenizer(args.tokenizer, config.vocab_size)
    if args.json is not None:
        options.check_writable("--json", args.json)
    longest = max(c.context for c in contenders)
    tokens = options.read_tokens(args.text, tokenizer, args.batch, longest + 1)

    with tempfile.TemporaryDirectory() as folder:
        work = [(c, job(c, tokens, device, folder)) for c in contenders]
        if not all_agree([(c, replace(j, task="check")) for c, j in to_be_checked(work)], in_child):
            return 1
        # Before and after: a machine that is shared does not keep one speed.
        peak = peak_rate(DTYPES[dtype], device)
        results = measure_in_turns(work, in_child, args.repeat)
        peak = max(peak, peak_rate(DTYPES[dtype], device))
    common = {
        "preset": args.preset,
        "batch": args.batch,
        "dtype": dtype,
        "device": str(device),
        "mini_batch": config.mini_batch_size,
        "vocab": config.vocab_size,
        "text": args.text or "standard library",
        "tokenizer": tokenizer_name,
        "machine": describe(device),
    }
    runs = [common | row(contender, rounds, args.batch, peak) for contender, rounds in results]
    if args.lengths is None:
        print_comparison(runs, own_was_measured=bool(results) and results[0][0] is contenders[0])
    else:
        print_lengths(runs)
    if args.json is not None:
        write_json(args.json, runs)
    return 0 if len(results) == len(work) else 1


def chosen_config(args: argparse.Namespace, dtype: str) -> TTTConfig:
    """The preset with what the options change."""
    overrides = {"window": args.window, "mini_batch_size": args.mini_batch, "vocab_size": args.vocab}
    overrides = {name: value for name, value in overrides.items() if value is not None}
    bos = TTTConfig.preset(args.preset).bos_token_id
    if args.vocab is not None and bos is not None and bos >= args.vocab:
        # A vocabulary without it.
        overrides["bos_token_id"] = None
    return TTTConfig.preset(args.preset, compute_dtype=dtype, **overrides)


def chosen_contenders(args: argparse.Namespace, config: TTTConfig, backend: str) -> list[Contender]:
    """The model itself, then those that `--compare` names; or the model at each of `--lengths`."""
    if args.lengths is not None and (args.context is not None or args.compare not in (None, "none")):
        raise ValueError(
            "--lengths measures the model alone, at those contexts: not with --context or --compare"
        )
    default = 2048 if args.preset == "tiny" else 4096
    contexts = [default if args.context is None else args.context]
    if args.lengths is not None:
        contexts = chosen_lengths(args.lengths)
    for context in contexts:
        if context % config.mini_batch_size:
            option = "--context" if args.lengths is None else "--lengths"
            raise ValueError(
                f"{option}={context} is not accepted: it must be a multiple of the mini-batch size "
                f"{config.mini_batch_size}"
            )
    own = [
        Contender(
            "ttt-e2e", backend, config, context, args.method, chosen_stretch(args, config, context),
            args.checkpoint_blocks,
        )
        for context in contexts
    ]  # fmt: skip
    if args.lengths is not None:
        return own
    compare = "reference,full-attention" if args.compare is None else args.compare
    contenders = own
    for name in options.chosen_names("--compare", compare, COMPARISONS):
        contender = compared(name, own[0])
        if contender not in contenders:
            contenders.append(contender)
    return contenders


def compared(name: str, own: Contender) -> Contender:
    """What `--compare` calls by that name."""
    if name == "reference":
        return replace(own, backend="reference", method="graph", checkpoint_blocks=False)
    if name == "full-attention":
        return replace(own, model=name, config=own.config.as_full_attention(own.context))
    if name == "sliding-window":
        return replace(own, model=name, config=own.config.as_sliding_window())
    return replace(own, method=next(method for method in METHODS if method == name))


def chosen_stretch(args: argparse.Namespace, config: TTTConfig, context: int) -> int:
    """Mini-batches between two snapshots: without an option, so many that there are two."""
    if args.snapshot_every is not None:
        return int(args.snapshot_every)
    return min(DEFAULT_SNAPSHOT_EVERY, max(1, context // config.mini_batch_size // 2))


def chosen_lengths(given: str) -> list[int]:
    """The numbers in a list with commas, each at least 1."""
    try:
        lengths = [int(part) for part in given.split(",")]
    except ValueError:
        raise ValueError(f"--lengths={given!r} is not accepted: it must be integers with commas") from None
    for length in lengths:
        options.at_least_one(lengths=length)
    return lengths


def job(contender: Contender, tokens: torch.Tensor, device: torch.device, folder: str) -> Job:
    """The measurement of a contender; its tokens are written into `folder`."""
    path = str(Path(folder, f"{contender.context}.npy"))
    np.save(path, tokens[:, : contender.context + 1].numpy())
    return Job(
        "measure", contender.config.to_dict(), contender.backend, contender.method, contender.snapshot_every,
        contender.checkpoint_blocks, str(device), path,
    )  # fmt: skip


def to_be_checked(work: list[tuple[Contender, Job]]) -> list[tuple[Contender, Job]]:
    """Those that are not the oracle itself; of a model at several contexts one, since all are checked at one length."""
    different = {
        replace(contender, context=0, snapshot_every=1): (contender, job) for contender, job in reversed(work)
    }
    return [
        (c, j)
        for c, j in reversed(different.values())
        if (c.backend, c.chosen_method) != ("reference", "graph")
    ]


def row(contender: Contender, rounds: list[dict[str, Any]], batch: int, peak: float) -> dict[str, Any]:
    """One object of the JSON, beside what all of them have in common: the best time, the most memory."""
    flops_per_token = training_flops_per_token(contender.config, contender.context)
    seconds = [found["seconds"] for found in rounds]
    tokens_per_s = batch * contender.context / min(seconds)
    flops_per_s = tokens_per_s * flops_per_token
    return {
        "model": contender.model,
        "method": contender.chosen_method,
        "snapshot_every": contender.snapshot_every if contender.chosen_method == "snapshots" else None,
        "backend": contender.backend,
        "checkpoint_blocks": contender.checkpoint_blocks,
        "context": contender.context,
        "window": contender.config.window,
        "tokens_per_s": tokens_per_s,
        "seconds": seconds,
        **{
            name: max(found[name] for found in rounds) for name in ("extra_memory_bytes", "peak_memory_bytes")
        },
        "loss": rounds[-1]["loss"],
        "flops_per_token": flops_per_token,
        "flops_per_s": flops_per_s,
        "peak_flops_per_s": peak,
        "share_of_peak": flops_per_s / peak,
    }


if __name__ == "__main__":
    sys.exit(main())
