"""`python bench/kernels.py inner_step`: one mini-batch from hidden states to new fast weights, as prefill does it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from bench import inner_step_problem, kernel_choice, options
from bench.inner_step_problem import Inputs, Problem
from bench.kernel_contenders import OWN, Contender, Work, own
from bench.kernel_problem import Truth, verdicts
from engine.blocks import suffix_forward
from engine.config import DTYPES, TTTConfig
from engine.inner import (
    FastWeights,
    by_block,
    flat,
    inner_forward,
    inner_gradient,
    inner_update_,
    masked_mean,
)
from engine.ops import Ops
from engine.weights import for_inference
from engine.window import Window
from ttt_kernels.clipped_sgd import operator as clipped_sgd
from ttt_kernels.linear_ce import operator as linear_ce
from ttt_kernels.matmul import operand
from ttt_kernels.rms_norm import operator as rms_norm
from ttt_kernels.rope import operator as rope
from ttt_kernels.swa import operator as swa
from ttt_kernels.swiglu import operator as swiglu

__all__ = ["BEYOND_OUTPUTS", "CEILING", "COLUMN", "ORDERS", "Problem", "own", "verdicts"]

CEILING = "products"
COLUMN = "mini-batch"
BEYOND_OUTPUTS = False
ORDERS = ("forward",)
BASELINES: dict[str, tuple[str, ...]] = {"autograd": ("autograd",)}
# The best backend of each operator, which is no single one where some have no kernel.
MIXED = "default"
# Measured on a CPU in float32, rounded up: matrices of all logits, and of all scores, that are alive at once.
LOGITS, SCORES = 4, 6


class Step(Contender):
    """This library on one backend."""

    orders = ORDERS

    def __init__(self, backend: str) -> None:
        self.backend = None if backend == MIXED else backend

    def prepare(self, problem: Problem, x: Inputs, order: str) -> Work:
        ops, config, weights = Ops(x.model, self.backend), problem.config, for_inference(x.model)

        @torch.no_grad()
        def step() -> tuple[Tensor, ...]:
            read = inner_forward(ops, config, weights, x.fast, x.x, x.positions, x.targets, x.windows)
            grads = inner_gradient(ops, config, weights, x.fast, read, x.targets)
            inner_update_(ops, config, x.fast, grads, config.inner_lr)
            return read.nll, *grads, *flat(x.fast.masters)

        return step


class Past:
    """Keys and values of earlier tokens that autograd may stand beside; see `engine.blocks.Cache`."""

    def __init__(self, window: Window, keys: int) -> None:
        rows = slice(window.length - keys, window.length)
        self.k, self.v = window.k[:, rows], window.v[:, rows]

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All that the queries see, the new ones last."""
        return torch.cat((self.k, k), 1), torch.cat((self.v, v), 1)


class Autograd(Contender):
    """The reference formulas and torch's loss, differentiated by autograd with respect to the fast weights."""

    orders = ORDERS

    def estimated_bytes(self, problem: Problem, order: str) -> int:
        config, rows = problem.config, problem.batch * problem.mini_batch
        keys = problem.window + problem.mini_batch
        scores = config.suffix_layers * config.num_heads * keys
        return rows * 4 * (LOGITS * config.vocab_size + SCORES * scores)

    def prepare(self, problem: Problem, x: Inputs, order: str) -> Work:
        ops, config, weights = Ops(x.model, "reference"), problem.config, for_inference(x.model)
        caches = [Past(window, problem.window - 1) for window in x.windows]
        head = operand(weights.head)

        def losses(fast: FastWeights) -> Tensor:
            arguments = (weights.suffix, fast.copies, x.x, x.positions, caches, config.window)
            out, _ = suffix_forward(ops, *arguments)
            hidden, _ = ops.norm(out, weights.final_norm)
            logits = operand(hidden.flatten(0, 1)) @ head.T
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            nll = functional.cross_entropy(wide, x.targets.flatten(), reduction="none")
            return nll.view(x.targets.shape)

        def step() -> tuple[Tensor, ...]:
            leaves = [m.detach().requires_grad_() for m in flat(x.fast.masters)]
            nll = losses(FastWeights.of(by_block(leaves), config))
            grads = torch.autograd.grad(masked_mean(nll, x.targets, config).sum(), leaves)
            with torch.no_grad():
                inner_update_(ops, config, x.fast, grads, config.inner_lr)
            return nll.detach(), *grads, *flat(x.fast.masters)

        return step


def add_arguments(parser: argparse.ArgumentParser) -> None:
    presets = ", ".join(TTTConfig.presets())
    parser.add_argument("--preset", default="125m", metavar="NAME", help=f"{presets} (default: 125m)")
    parser.add_argument(
        "--mini-batch", type=int, nargs="+", metavar="N", help="tokens of a step (default: the preset's)"
    )
    parser.add_argument("--window", type=int, metavar="N", help="(default: the preset's)")
    parser.add_argument(
        "--suffix-layers", type=int, metavar="N", help="blocks with fast weights (default: the preset's)"
    )
    parser.add_argument("--vocab", type=int, metavar="N", help="classes (default: the preset's)")
    kernel_choice.add_arguments(
        parser,
        f"of {', '.join(BASELINES)}; or all, or none (default: all). autograd: the reference formulas and torch's "
        "loss, differentiated by torch.autograd.grad with respect to the fast weights",
    )


def problems(args: argparse.Namespace, dtype: str) -> list[Problem]:
    """One for each mini-batch size; `ValueError` for bad input."""
    known = TTTConfig.preset(args.preset)
    window = known.window if args.window is None else args.window
    suffix = known.suffix_layers if args.suffix_layers is None else args.suffix_layers
    vocab = known.vocab_size if args.vocab is None else args.vocab
    sizes = [known.mini_batch_size] if args.mini_batch is None else sorted(set(args.mini_batch))
    options.at_least_one(batch=args.batch, window=window, suffix_layers=suffix, vocab=vocab)
    for size in sizes:
        options.at_least_one(mini_batch=size)
    assert window is not None
    return [Problem(args.preset, args.batch, size, window, suffix, vocab, dtype) for size in sizes]


def contenders(args: argparse.Namespace, dtype: str, device: torch.device) -> list[str]:
    """Names, this library's backends first; `ValueError` for a backend or baseline that cannot be used."""
    example = torch.empty(0, 1, 1, 64, dtype=DTYPES[dtype], device=device)
    operators = (rms_norm, rope, swiglu, swa, linear_ce, clipped_sgd)
    if args.backend is None:
        names = kernel_choice.fast_backends(operators, example) or [MIXED]
    else:
        names = list(dict.fromkeys(args.backend))
        for op in operators:
            for name in names:
                op.select(None if name == MIXED else name, example)
    return [
        *(OWN + name for name in names),
        *kernel_choice.baseline_names(args.baselines, BASELINES, tuple(BASELINES)),
    ]


def contender(name: str) -> Contender:
    """The contender of that name."""
    return Step(name.partition("/")[2]) if own(name) else Autograd()


def truths(problem: Problem, orders: Sequence[str]) -> dict[str, dict[str, Truth]]:
    """What is right: a short step and this one."""
    return inner_step_problem.truths(Step("reference"), problem, orders)


def describe_check(problem: Problem) -> dict[str, int]:
    """How results were compared with float64, for the JSON."""
    return {"all_values_at_mini_batch": problem.mini_batch}


def title(problem: Problem) -> str:
    """The settings that all sizes share."""
    blocks = f"{problem.suffix_layers} blocks, window {problem.window}, {problem.vocab} classes"
    return f"inner_step of {problem.preset}, {problem.dtype}, batch {problem.batch}, {blocks}"
