"""Options that several benchmarks share, and what they stand for."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from engine.config import DTYPES, TTTConfig
from engine.text import read_text, standard_library_text
from engine.tokenizers import Tokenizer, installed_llama3_model, load_tokenizer
from ttt_kernels.backends import refuse_on_cpu, select
from ttt_kernels.matmul import best_dtype

LLAMA3_VOCAB_SIZE = 128256


def add_model_arguments(parser: argparse.ArgumentParser, preset: str, dtype: str | None = None) -> None:
    """The options of every benchmark of a model, with this benchmark's defaults; no dtype is the fastest."""
    presets = ", ".join(TTTConfig.presets())
    parser.add_argument("--preset", default=preset, metavar="NAME", help=f"{presets} (default: {preset})")
    add_common_arguments(parser, dtype, tuple(DTYPES))
    parser.add_argument(
        "--backend", metavar="NAME", help="reference, cpu, ... (default: the best that can run)"
    )


def add_common_arguments(parser: argparse.ArgumentParser, dtype: str | None, dtypes: Sequence[str]) -> None:
    """The options of every benchmark; no dtype is the fastest."""
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="sequences at a time (default: 1)")
    parser.add_argument(
        "--dtype",
        default=dtype,
        choices=dtypes,
        help=f"(default: {dtype or 'that of the fastest products on this machine'})",
    )
    parser.add_argument("--device", default="cpu", metavar="NAME", help="(default: cpu)")
    parser.add_argument("--json", metavar="FILE", help="write the results as JSON")


def add_reading_arguments(parser: argparse.ArgumentParser, context: str) -> None:
    """The options of every benchmark that reads a text; `context` says in words how long it is by default."""
    parser.add_argument("--context", type=int, metavar="N", help=f"tokens to read (default: {context})")
    parser.add_argument("--window", type=int, metavar="N", help="attention window (default: the preset's)")
    parser.add_argument(
        "--mini-batch", type=int, metavar="N", help="tokens per inner step (default: the preset's)"
    )
    parser.add_argument(
        "--text", metavar="FILE", help="UTF-8 text to read (default: Python's standard library)"
    )
    parser.add_argument(
        "--tokenizer",
        metavar="NAME",
        help="bytes, llama3, or the path of a tokenizer.model "
        "(default: llama3 for its vocabulary where installed, else bytes)",
    )
    parser.add_argument("--repeat", type=int, default=3, metavar="N", help="the best of N runs (default: 3)")


def chosen_names(option: str, given: str, accepted: Sequence[str]) -> list[str]:
    """The names in a list with commas, or those that all and none stand for."""
    names = {"all": list(accepted), "none": []}.get(given, given.split(","))
    unknown = [name for name in names if name not in accepted]
    if unknown:
        raise ValueError(
            f"{option}={given!r}: {unknown[0]!r} is unknown; accepted: {', '.join(accepted)}, all, none"
        )
    return names


def chosen_dtype(name: str | None, device: torch.device) -> str:
    """The dtype of that name, or the one in which this machine's products are fastest."""
    if name is not None:
        return name
    best = torch.bfloat16 if device.type == "cuda" else best_dtype()
    return next(known for known, dtype in DTYPES.items() if dtype == best)


def chosen_backend(name: str | None, dtype: str, device: torch.device) -> str:
    """The backend of that name, or the best for the dtype there; a ValueError says why one cannot run."""
    example = torch.empty(0, dtype=DTYPES[dtype], device=device)
    return select("the model", name, (example,), {"cpu": refuse_on_cpu})


def chosen_tokenizer(name: str | None, vocab_size: int) -> tuple[str, Tokenizer]:
    """The tokenizer of that name; by default Llama 3's for its vocabulary where installed, else bytes."""
    if name is None:
        name = "bytes"
        if vocab_size >= LLAMA3_VOCAB_SIZE:
            try:
                installed_llama3_model()
                name = "llama3"
            except ValueError:
                print("tokenizer: bytes, since Llama 3's is not installed", file=sys.stderr)
    tokenizer = load_tokenizer(name)
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"tokenizer={name!r} has {tokenizer.vocab_size} tokens, the model's vocabulary only {vocab_size}"
        )
    return name, tokenizer


def read_tokens(path: str | None, tokenizer: Tokenizer, batch: int, length: int) -> torch.Tensor:
    """The first tokens of the file, or of the standard library's sources, as int64 (batch, length)."""
    needed = batch * length
    # Byte-pair tokens of source code are 3 to 4 bytes long.
    text = standard_library_text(8 * needed) if path is None else read_text(path)
    tokens = tokenizer.encode(text)
    if len(tokens) < needed:
        source = "the standard library" if path is None else repr(path)
        raise ValueError(
            f"text: {source} is too short: {len(tokens)} tokens, but {batch} x {length} are needed; "
            "choose a smaller --context or --batch"
        )
    return torch.from_numpy(tokens[:needed]).view(batch, length)


def check_writable(option: str, path: str) -> None:
    """A ValueError where a file could not be written, known before anything is measured."""
    folder = Path(path).absolute().parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ValueError(f"{option}={path!r}: {str(folder)!r} is not a folder that can be written to")
    if Path(path).is_dir():
        raise ValueError(f"{option}={path!r} is a folder")


def at_least_one(**values: int | None) -> None:
    """A ValueError that names the first value below 1."""
    for name, value in values.items():
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')}={value} is not accepted; it is at least 1")
