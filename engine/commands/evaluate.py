"""`python -m engine evaluate`: loss by position in the text, of one saved model or of several side by side."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.commands.positions import check_plot, format_positions, plot_positions
from engine.data import Sequences, open_store
from engine.device import checked_device
from engine.files import atomic_write
from engine.model import TTTModel
from engine.training.evaluation import evaluate

HELP = "loss by position in the text, of saved models"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `evaluate`."""
    parser.add_argument(
        "models",
        nargs="+",
        metavar="FOLDER",
        help="saved models; those of one name are taken as seeds of one model, and averaged",
    )
    parser.add_argument(
        "--dataset",
        default="stdlib",
        metavar="NAME",
        help="stdlib, text or a token store's (default: stdlib)",
    )
    parser.add_argument("--path", metavar="FOLDER", help="of the text files or of the token store")
    parser.add_argument("--split", default="val", metavar="NAME", help="(default: %(default)s)")
    parser.add_argument(
        "--tokenizer", metavar="NAME", help="of text: bytes, llama3, or a file (default: bytes)"
    )
    parser.add_argument("--length", type=int, default=8192, metavar="N", help="tokens (default: %(default)s)")
    parser.add_argument("--sequences", type=int, metavar="N", help="read only the first N (default: all)")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="at a time (default: %(default)s)")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="(default: %(default)s)")
    parser.add_argument("--backend", metavar="NAME", help="(default: the best that can run)")
    parser.add_argument("--json", metavar="FILE", help="write every model's loss at every position")
    parser.add_argument("--plot", metavar="FILE", help="draw the losses (.png, .svg or .pdf)")


def run(args: argparse.Namespace) -> int:
    """Prints a table of nats per token by position; 0. Raises `ValueError` for bad input."""
    for name, value in (("length", args.length), ("batch", args.batch), ("sequences", args.sequences)):
        if value is not None and value < 1:
            raise ValueError(f"--{name}={value} is not accepted: it must be at least 1")
    if args.plot is not None:
        check_plot(args.plot)
    device = checked_device(args.device)
    store = open_store(args.dataset, args.path, args.split, args.tokenizer)
    sequences = Sequences(store, args.length)
    results = [_result(folder, sequences, device, args) for folder in args.models]
    facts = {"data": store.name, "length": args.length, "sequences": results[0]["sequences"]}
    print(
        f"nats per token, {facts['sequences']} sequences of {args.length} tokens of {store.name}, by position:\n"
    )
    print(format_positions(results))
    if args.json is not None:
        with atomic_write(args.json) as path:
            path.write_text(json.dumps([facts | result for result in results]) + "\n", encoding="utf-8")
    if args.plot is not None:
        with atomic_write(args.plot) as path:
            plot_positions(results, path, Path(args.plot).suffix[1:])
    return 0


def _result(
    folder: str, sequences: Sequences, device: torch.device, args: argparse.Namespace
) -> dict[str, Any]:
    model = TTTModel.from_pretrained(folder, device=device)
    vocabulary = sequences.store.vocabulary
    if vocabulary is not None and vocabulary.size > model.config.vocab_size:
        raise ValueError(
            f"{sequences.store.name} has tokens of a vocabulary of {vocabulary.size}; accepted are those of "
            f"{folder}, {model.config.vocab_size}"
        )

    def nll(tokens: Tensor) -> Tensor:
        state = model.init_state(len(tokens))
        return model.prefill(tokens, state, backend=args.backend).nll[:, 1:]

    result = evaluate(nll, model.config, sequences, args.batch, device, limit=args.sequences, show=True)
    return {
        "model": model.config.name,
        "folder": str(folder),
        "window": model.config.window,
        "mini_batch": model.config.mini_batch_size if model.config.suffix_layers else None,
        "loss": result.loss,
        "sequences": result.sequences,
        "nll_by_position": [round(value, 6) for value in result.nll.tolist()],
    }
