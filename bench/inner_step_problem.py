"""The inner step that is measured: a mini-batch in the middle of a text, and what is right, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from bench.flops import inner_step_flops_per_token
from bench.kernel_problem import Prepares, Truth, generator, truth
from engine import TTTConfig, TTTModel
from engine.config import DTYPES
from engine.inner import FastWeights
from engine.window import Window

# Long enough for several blocks of queries and for a window that hides keys of the mini-batch itself.
CHECK_TOKENS, CHECK_WINDOW, CHECK_VOCAB = 160, 96, 512


class Inputs(NamedTuple):
    """A mini-batch after the prefix blocks, (B, b, d), its targets, and a state full of what came before."""

    model: TTTModel
    x: Tensor
    positions: Tensor
    targets: Tensor
    windows: list[Window]
    fast: FastWeights


@dataclass(frozen=True)
class Problem:
    """One inner step of `batch` sequences; the model is that of the preset but for what is named here."""

    preset: str
    batch: int
    mini_batch: int
    window: int
    suffix_layers: int
    vocab: int
    dtype: str

    @property
    def length(self) -> int:
        return self.mini_batch

    @property
    def config(self) -> TTTConfig:
        """Its model, without the blocks before those with fast weights; every target counts."""
        return TTTConfig.preset(
            self.preset,
            num_layers=self.suffix_layers,
            suffix_layers=self.suffix_layers,
            mini_batch_size=self.mini_batch,
            window=self.window,
            vocab_size=self.vocab,
            bos_token_id=None,
            compute_dtype=self.dtype,
        )

    def flops(self, order: str) -> int:
        """Useful operations, two per multiply-add; every query sees a whole window."""
        return round(self.batch * self.mini_batch * inner_step_flops_per_token(self.config, self.window))

    def inputs(self, device: torch.device) -> Inputs:
        """Standard normal values, in memory as prefill has it after many mini-batches."""
        source, config = generator(), self.config
        model = TTTModel(config, dtype=DTYPES[self.dtype], device=device)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=source).to(device, config.torch_dtype)

        x = draw(self.batch, self.mini_batch, config.hidden_size)
        targets = torch.randint(self.vocab, (self.batch, self.mini_batch), generator=source).to(device)
        state = model.init_state(self.batch)
        for window in state.suffix:
            # Full, so that the step moves its rows as every step of a long text does.
            window.extend(draw(*window.k.shape), draw(*window.v.shape))
        first = state.suffix[0].length
        positions = torch.arange(first, first + self.mini_batch, device=device)
        return Inputs(model, x, positions, targets, state.suffix, state.fast)

    def short(self) -> Problem:
        """The same step with a short mini-batch and window, and few classes."""
        return replace(
            self,
            mini_batch=min(self.mini_batch, CHECK_TOKENS),
            window=min(self.window, CHECK_WINDOW),
            vocab=min(self.vocab, CHECK_VOCAB),
        )


def truths(formulas: Prepares, problem: Problem, orders: Sequence[str]) -> dict[str, dict[str, Truth]]:
    """Losses, gradients and new weights of the `short` and of the `whole` problem, by the reference in float64."""
    short = problem.short()
    found = {"short": {"forward": _step(formulas, short)}}
    return found | {"whole": found["short"] if short == problem else {"forward": _step(formulas, problem)}}


def _step(formulas: Prepares, problem: Problem) -> Truth:
    def results(dtype: str) -> list[Tensor]:
        at = replace(problem, dtype=dtype)
        return list(formulas.prepare(at, at.inputs(torch.device("cpu")), "forward")())

    # Weights and activations are rounded to the dtype here, so that this is part of what the formulas are off.
    return truth(results("float64"), results(problem.dtype), torch.finfo(DTYPES[problem.dtype]).eps)
