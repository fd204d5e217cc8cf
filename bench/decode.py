"""
How fast a model writes: tokens per second, and bytes of weights read against the machine's read bandwidth.

Times are of greedy decoding between two inner steps, Python included where the device waits for it; the backend is
that of decoding.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch

from bench import options
from bench.flops import decode_weight_bytes
from bench.machine import describe, read_bandwidth
from bench.output import write_json
from bench.table import format_table, rate, size
from bench.timing import synchronize
from engine import TTTConfig, TTTModel
from engine.config import DTYPES
from engine.device import checked_device
from ttt_kernels.backends import refuse_on_cpu, refuse_on_cuda, select

WARM_UP = 4
RUNS = 8


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    # Decoding reads each weight for one product, so its fastest dtype is a small one.
    options.add_model_arguments(parser, "125m", "bfloat16")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="tokens to decode (default: 64)")
    parser.add_argument(
        "--prompt", type=int, default=64, metavar="N", help="tokens to read before (default: 64)"
    )
    args = parser.parse_args(argv)
    try:
        return run(args)
    except (ValueError, OSError) as error:
        print(f"bench/decode.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace) -> int:
    options.at_least_one(tokens=args.tokens, prompt=args.prompt, batch=args.batch)
    device = checked_device(args.device)
    example = torch.empty(0, dtype=DTYPES[args.dtype], device=device)
    backend = select("decode", args.backend, (example,), {"cuda": refuse_on_cuda, "cpu": refuse_on_cpu})
    if args.json is not None:
        options.check_writable("--json", args.json)
    config = TTTConfig.preset(args.preset, compute_dtype=args.dtype)
    if args.prompt + WARM_UP + args.tokens > config.mini_batch_size:
        raise ValueError(
            f"--prompt={args.prompt} and --tokens={args.tokens} are too many: with {WARM_UP} of warm-up "
            f"they must fit into a mini-batch of {config.mini_batch_size}, so that no inner step is timed"
        )

    bandwidth = read_bandwidth(device)
    seconds_per_token = measure(config, args.batch, args.prompt, args.tokens, device, backend)
    # Before and after: a machine that is shared does not keep one speed.
    bandwidth = max(bandwidth, read_bandwidth(device))
    weight_bytes = decode_weight_bytes(config, config.torch_dtype, args.batch)
    result = {
        "model": "ttt-e2e",
        "backend": backend,
        "preset": args.preset,
        "batch": args.batch,
        "dtype": args.dtype,
        "device": str(device),
        "prompt": args.prompt,
        "tokens": args.tokens,
        "tokens_per_s": args.batch / seconds_per_token,
        "weight_bytes_per_step": weight_bytes,
        "weight_bytes_per_s": weight_bytes / seconds_per_token,
        "read_bandwidth_bytes_per_s": bandwidth,
        "share_of_bandwidth": weight_bytes / seconds_per_token / bandwidth,
        "machine": describe(device),
    }
    header = ("preset", "backend", "dtype", "tokens/s", "weights", "GB/s", "machine's GB/s", "share")
    row = (
        args.preset,
        backend,
        args.dtype,
        f"{args.batch / seconds_per_token:.1f}",
        size(weight_bytes),
        rate(weight_bytes / seconds_per_token),
        rate(bandwidth),
        f"{weight_bytes / seconds_per_token / bandwidth:.0%}",
    )
    print(format_table(header, [row]))
    if args.json is not None:
        write_json(args.json, [result])
    return 0


def measure(
    config: TTTConfig, batch: int, prompt: int, count: int, device: torch.device, backend: str
) -> float:
    """The median time of a decoding step of a random model, in seconds."""
    model = TTTModel(config, dtype=config.torch_dtype, device=device)
    return median_seconds(model, batch, prompt, count, backend)


def median_seconds(model: TTTModel, batch: int, prompt: int, count: int, backend: str | None) -> float:
    """The median, over runs of several tokens, of a greedy decoding step's time after a prompt and a warm-up, in
    seconds.

    Of `count` tokens, all but what is left over when they are divided among the runs. Within a run nobody waits for the
    device, as nobody does who generates.
    """
    device = model.final_norm.device
    state = model.init_state(batch)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.config.vocab_size, (batch, prompt), generator=generator).to(device)
    token = model.prefill(tokens, state).logits.argmax(dim=-1)

    def run(steps: int) -> float:
        nonlocal token
        synchronize(device)
        start = time.perf_counter()
        for _ in range(steps):
            token = model.decode(token, state, backend=backend).argmax(dim=-1)
        synchronize(device)
        return (time.perf_counter() - start) / steps

    run(WARM_UP)
    runs = min(RUNS, count)
    return statistics.median(run(count // runs) for _ in range(runs))


if __name__ == "__main__":
    sys.exit(main())
