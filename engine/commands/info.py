"""`python -m engine info`: the presets, one configuration or a saved model, and what can run here."""

from __future__ import annotations

import argparse

from engine.config import TTTConfig
from engine.model import FAST_MATRICES, TTTModel
from ttt_kernels import backends

HELP = "show the presets and what can run here, or one preset or saved model"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `info`."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--preset", metavar="NAME", help="one of " + ", ".join(TTTConfig.presets()))
    which.add_argument("folder", nargs="?", metavar="FOLDER", help="a model saved by save_pretrained")


def run(args: argparse.Namespace) -> int:
    """Prints the configuration of a preset or of a saved model; without either, presets and backends."""
    if args.folder is not None:
        _print_model(TTTModel.from_pretrained(args.folder))
    elif args.preset is not None:
        _print_model(TTTModel(TTTConfig.preset(args.preset), device="meta"))
    else:
        _print_presets()
        print()
        _print_backends()
    return 0


def _print_model(model: TTTModel) -> None:
    for field, value in model.config.to_dict().items():
        print(f"{field:18} {value}")
    fast = sum(p.numel() for name, p in model.named_parameters() if name.rpartition(".")[2] in FAST_MATRICES)
    print(f"{'parameters':18} {model.num_parameters:,}, of which {fast:,} change while reading")
    if not model.embed.weight.is_meta:
        print(f"{'fingerprint':18} {model.fingerprint()}")


def _print_presets() -> None:
    print("preset       parameters  hidden  layers  heads  window  mini-batch")
    for name in TTTConfig.presets():
        config = TTTConfig.preset(name)
        count = TTTModel(config, device="meta").num_parameters
        print(
            f"{name:8} {count:14,} {config.hidden_size:7} {config.num_layers:7} {config.num_heads:6} "
            f"{config.window:7} {config.mini_batch_size:11}"
        )


def _print_backends() -> None:
    print("backend    what can run here")
    for name, entry in backends().items():
        if entry["available"]:
            instructions = f", {entry['instruction_set']}" if "instruction_set" in entry else ""
            print(f"{name:10} available{instructions}")
        else:
            print(f"{name:10} missing: {entry['reason']}")
