"""
Everything about one GPU in one command: is it right, and how fast is it, beside what the chip and others can do.

Operators and golden cases are checked first; no speed of what is wrong or unchecked is reported. Results are kept as
soon as they are measured, under bench/results/<gpu>/: the same command goes on where it was interrupted or ran out of
time, as long as sources, hardware and versions are the same.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))

import torch

from bench import options
from bench.gpu_jobs import run_group, run_side_by_side
from bench.gpu_official import PACKAGES, PYTHON
from bench.gpu_plan import STAGES, Measurement, Settings, in_order, plan
from bench.gpu_prefill import PARTS
from bench.gpu_report import write_report
from bench.gpu_store import CHECKOUT, Store, folder_name, identity
from bench.output import progress
from engine import TTTConfig
from engine.device import checked_device
from ttt_kernels.backends import available

DEFAULTS = {field.name: field.default for field in fields(Settings)}
CHECKED_FIRST = ("operators", "prefill", "decode", "train", "official")
KEPT_APART = (
    "device",
    "dtype",
    "presets",
    "train_presets",
    "lengths",
    "tokens_per_batch",
    "long_preset",
    "long",
)
"""Settings with other values of which results have nothing to do with each other."""


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    try:
        return run(args)
    except (ValueError, OSError) as error:
        print(f"bench/gpu.py: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", metavar="NAME", help="(default: cuda)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="(default: the fastest)")
    parser.add_argument(
        "--stages",
        default="all",
        metavar="LIST",
        help=f"of {', '.join(STAGES)} (default: all). What needs green checks brings them along",
    )
    parser.add_argument("--again", action="store_true", help="measure what these stages have once more")
    parser.add_argument("--minutes", type=float, default=7.5, metavar="N", help="time for all (default: 7.5)")
    presets = {
        "presets": "models to read, to write and to take shapes from",
        "train-presets": "models to train",
    }
    for name, words in presets.items():
        default = ",".join(DEFAULTS[name.replace("-", "_")])
        parser.add_argument(
            f"--{name}", default=default, metavar="LIST", help=f"{words} (default: {default})"
        )
    parser.add_argument(
        "--lengths", default=",".join(map(str, DEFAULTS["lengths"])), metavar="LIST",
        help="tokens of a sequence (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--tokens-per-batch", type=int, default=DEFAULTS["tokens_per_batch"], metavar="N",
        help="of a training step (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--long-preset", default=DEFAULTS["long_preset"], metavar="NAME",
        help="the model that reads one long text (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--long", type=int, default=DEFAULTS["long"], metavar="N", help="its tokens (default: %(default)s)"
    )
    parser.add_argument(
        "--no-compiled-baselines", dest="compiled_baselines", action="store_false",
        help="not to try torch.compile on the baselines",
    )  # fmt: skip
    parser.add_argument(
        "--official", metavar="FOLDER",
        help="a checkout of github.com/test-time-training/e2e, to be measured beside this. It needs "
        f"Python {'.'.join(map(str, PYTHON))}, a GPU that JAX can use and, in the same environment, "
        + ", ".join(PACKAGES.values()),
    )  # fmt: skip
    parser.add_argument("--output", metavar="FOLDER", help="(default: bench/results/ and the GPU's name)")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    """0; 1 where a check is red or a measurement failed; 130 where it was interrupted."""
    deadline = time.time() + 60 * args.minutes
    device = checked_device(args.device)
    settings = chosen_settings(args, device)
    facts = identity(device)
    folder = Path(args.output) if args.output else CHECKOUT / "bench" / "results" / folder_name(facts)
    folder.mkdir(parents=True, exist_ok=True)
    values = asdict(settings)
    store = Store(folder, facts, {name: _as_json(values[name]) for name in KEPT_APART})
    if store.moved is not None:
        progress(f"results of other sources, hardware or settings are now in {store.moved}\n")
    measurements = plan(settings)
    asked = set(options.chosen_names("--stages", args.stages, STAGES))
    for m in measurements:
        if args.again and m.stage in asked:
            store.forget(m.key)
    interrupted = False
    try:
        measure(measurements, settings, store, deadline)
    except KeyboardInterrupt:
        interrupted = True
        progress("\ninterrupted; the same command goes on from here\n")
    everything = plan(Settings(**{**values, "stages": STAGES}))
    print(write_report(folder, store, everything))
    if interrupted:
        return 130
    bad = {"failed", "wrong"}
    return int(any(store.results.get(m.key, {}).get("status") in bad or red(store, m) for m in measurements))


def measure(measurements: Sequence[Measurement], settings: Settings, store: Store, deadline: float) -> None:
    """Does what the store does not have yet, the most important first."""
    groups = in_order([m for m in measurements if not done(m, store)])
    side_by_side = [g for g in groups if g[0].parallel]
    run_side_by_side(side_by_side, settings, deadline, store.put)
    for group in groups:
        if group[0].parallel:
            continue
        wanted = []
        for m in group:
            reason = refusal(m, measurements, store)
            if reason is None:
                wanted.append(m)
            else:
                store.put(m.key, {"status": "refused", "reason": reason})
        run_group(wanted, settings, deadline, store.put)


def done(m: Measurement, store: Store) -> bool:
    """Whether it need not be made again; kernels are compiled again where Triton does not have them any more."""
    return store.measured(m.key) and (not m.task.startswith("compile") or has_compiled())


def has_compiled() -> bool:
    """Whether Triton's cache is there."""
    from triton import knobs

    return Path(knobs.cache.dir).is_dir()


def refusal(m: Measurement, measurements: Sequence[Measurement], store: Store) -> str | None:
    """Why a speed would mean nothing: a check that is red, or that was not made."""
    if m.stage not in CHECKED_FIRST:
        return None
    checks = [c for c in measurements if c.task in ("operator check", "golden check")]
    for check in checks:
        if m.needs is not None and check.arguments.get("name") not in m.needs:
            continue
        found = store.results.get(check.key, {"status": "skipped", "reason": "no time left"})
        if red(store, check):
            return f"{check.key}: red"
        if found["status"] != "measured":
            return f"{check.key}: not made ({found.get('reason', found['status'])})"
    return None


def red(store: Store, m: Measurement) -> bool:
    """Whether it is a check that found something wrong."""
    return store.results.get(m.key, {}).get("green") is False


def chosen_settings(args: argparse.Namespace, device: torch.device) -> Settings:
    """What the options mean; `ValueError` for what cannot be."""
    if not args.minutes > 0:
        raise ValueError(f"--minutes={args.minutes} is not accepted; it is more than 0")
    stages = options.chosen_names("--stages", args.stages, STAGES)
    if any(stage in CHECKED_FIRST for stage in stages):
        stages = ["checks", *stages]
    lengths = _numbers("--lengths", args.lengths)
    dtype = options.chosen_dtype(args.dtype, device)
    for option, given in (("--presets", args.presets), ("--train-presets", args.train_presets)):
        options.chosen_names(option, given, TTTConfig.presets())
    presets, train_presets = (
        tuple(dict.fromkeys(options.chosen_names("", given, TTTConfig.presets())))
        for given in (args.presets, args.train_presets)
    )
    if args.long_preset not in presets:
        raise ValueError(f"--long-preset={args.long_preset!r} is not among --presets={args.presets}")
    options.at_least_one(tokens_per_batch=args.tokens_per_batch, long=args.long)
    for name in (*presets, *train_presets):
        size = TTTConfig.preset(name).mini_batch_size
        for length in lengths:
            if length % size:
                raise ValueError(f"--lengths: {length} is not a multiple of the mini-batch of {name}, {size}")
    size = PARTS * TTTConfig.preset(args.long_preset).mini_batch_size
    if args.long % size:
        raise ValueError(
            f"--long={args.long} is not a multiple of {size}: {PARTS} parts of mini-batches of {args.long_preset}"
        )
    if args.official is not None and not (Path(args.official) / "ttt" / "model").is_dir():
        raise ValueError(
            f"--official={args.official!r} is no checkout of the official code: it has no ttt/model"
        )
    usual = [name for name in available() if name != "reference"]
    on_device = [name for name in usual if (name == "cpu") == (device.type == "cpu")]
    return Settings(
        device=str(device), dtype=dtype, stages=tuple(dict.fromkeys(stages)), backends=tuple(on_device),
        presets=presets, train_presets=train_presets, lengths=lengths, tokens_per_batch=args.tokens_per_batch,
        long_preset=args.long_preset, long=args.long, compiled_baselines=args.compiled_baselines,
        official=None if args.official is None else os.path.abspath(args.official),
    )  # fmt: skip


def _numbers(option: str, given: str) -> tuple[int, ...]:
    try:
        found = tuple(sorted({int(part) for part in given.split(",")}))
    except ValueError:
        raise ValueError(f"{option}={given!r} is not accepted: it must be integers with commas") from None
    for number in found:
        options.at_least_one(**{option.removeprefix("--"): number})
    return found


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
