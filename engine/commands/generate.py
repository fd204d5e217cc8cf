"""`python -m engine generate`: continue a prompt."""

from __future__ import annotations

import argparse
import codecs
import sys
from dataclasses import replace
from pathlib import Path

import torch

from engine.config import DTYPES, TTTConfig
from engine.device import checked_device
from engine.generate import stream
from engine.model import TTTModel
from engine.text import read_text
from engine.tokenizers import Tokenizer, load_tokenizer

HELP = "continue a prompt"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--model", metavar="FOLDER", help="a saved model: config.json and model.safetensors")
    model.add_argument(
        "--preset",
        metavar="NAME",
        help=f"random weights of a preset's shapes: {', '.join(TTTConfig.presets())}",
    )
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", metavar="TEXT")
    prompt.add_argument("--prompt-file", metavar="FILE", help="UTF-8 text")
    parser.add_argument(
        "--tokenizer",
        metavar="NAME",
        help="bytes, llama3, or the path of a tokenizer.model "
        "(default: bytes for a vocabulary of 256, else llama3)",
    )
    parser.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="(default: %(default)s)")
    parser.add_argument(
        "--temperature", type=float, default=0.8, metavar="X", help="0: greedy (default: %(default)s)"
    )
    parser.add_argument("--top-k", type=int, metavar="N", help="keep the N likeliest tokens (default: all)")
    parser.add_argument("--top-p", type=float, metavar="X", help="keep a nucleus of this mass (default: all)")
    parser.add_argument("--seed", type=int, metavar="N", help="of the sampling (default: another every time)")
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of computation (default: the model's)")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="(default: %(default)s)")
    parser.add_argument(
        "--backend", metavar="NAME", help="reference, cpu, ... (default: the best that can run)"
    )
    parser.add_argument("--load-state", metavar="FILE", help="go on from what a saved state has read")
    parser.add_argument("--save-state", metavar="FILE", help="save what has been read and written")


def run(args: argparse.Namespace) -> int:
    """Prints what follows the prompt, token by token; 0. Raises `ValueError` for bad input."""
    text = args.prompt if args.prompt is not None else read_text(args.prompt_file)
    model = load_model(args)
    tokenizer = matching_tokenizer(args.tokenizer, model.config.vocab_size)
    state = model.load_state(args.load_state) if args.load_state else model.init_state()
    if args.save_state and not Path(args.save_state).absolute().parent.is_dir():
        raise ValueError(f"--save-state: there is no folder for {args.save_state!r}")
    write = TextWriter(tokenizer)
    for token in stream(
        model,
        prompt_tokens(text, tokenizer, starts=not args.load_state),
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        seed=args.seed,
        stop_token=tokenizer.eos_token_id,
        state=state,
        backend=args.backend,
    ):
        write(int(token))
    write.end()
    if args.save_state:
        state.save(args.save_state)
    return 0


def load_model(args: argparse.Namespace) -> TTTModel:
    """The model that `--model` or `--preset` names, on `--device`, computing in `--dtype`."""
    device = checked_device(args.device)
    if args.model is None:
        dtype = args.dtype or "float32"
        model = TTTModel(
            TTTConfig.preset(args.preset, compute_dtype=dtype), dtype=DTYPES[dtype], device=device
        )
        print(f"{args.preset}: random weights, so what follows is not language", file=sys.stderr)
    elif args.dtype is None:
        model = TTTModel.from_pretrained(args.model, device=device)
    else:
        model = TTTModel.from_pretrained(args.model, dtype=DTYPES[args.dtype], device=device)
        model.config = replace(model.config, compute_dtype=args.dtype)
    return model


def matching_tokenizer(name: str | None, vocab_size: int) -> Tokenizer:
    """The tokenizer of that name (None: by the vocabulary); a ValueError where it is another vocabulary's."""
    tokenizer = load_tokenizer(name or ("bytes" if vocab_size == 256 else "llama3"))
    if tokenizer.vocab_size != vocab_size:
        raise ValueError(
            f"tokenizer: its vocabulary of {tokenizer.vocab_size} is not the model's, which is {vocab_size}"
        )
    return tokenizer


def prompt_tokens(text: str, tokenizer: Tokenizer, *, starts: bool) -> torch.Tensor:
    """The prompt's tokens, (T,); with the begin-of-text token where the text starts here and there is one."""
    tokens = torch.from_numpy(tokenizer.encode(text))
    if starts and tokenizer.bos_token_id is not None and tokens.numel():
        tokens = torch.cat((tokens.new_tensor([tokenizer.bos_token_id]), tokens))
    return tokens


class TextWriter:
    """Writes tokens to stdout as text, each character as soon as its last byte is there."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def __call__(self, token: int) -> None:
        sys.stdout.write(self.decoder.decode(self.tokenizer.decode_bytes([token])))
        sys.stdout.flush()

    def end(self) -> None:
        sys.stdout.write(self.decoder.decode(b"", final=True) + "\n")
        sys.stdout.flush()
