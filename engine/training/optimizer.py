"""The published recipe (arXiv 2512.23675): clipping by global norm, AdamW, warm-up and cosine.

The formulas are those of optax, which the official implementation uses: `clip_by_global_norm`, `adamw`,
`warmup_cosine_decay_schedule`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.distributed.tensor import DTensor

from engine.model import TTTModel

EPS = 1e-8
"""Added to the root of the second moment."""


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions:
    """Hyper-parameters of the outer optimizer. Raises `ValueError` for a value that cannot be used."""

    lr: float
    """Peak of the learning rate, reached after the warm-up."""
    warmup_steps: int
    """Updates over which the rate rises linearly from `init_lr`; 0: none."""
    decay_steps: int
    """Updates after which the rate is `end_lr`, those of the warm-up included."""
    init_lr: float = 0.0
    end_lr: float = 1e-5
    b1: float = 0.9
    b2: float = 0.95
    clip: float = 1.0
    """Bound on the global norm of the gradient."""
    weight_decay: float = 0.1
    """Times the learning rate: the share of every parameter that an update takes away."""
    decay_embeddings: bool = True
    """Whether `weight_decay` is for the embedding too."""

    def __post_init__(self) -> None:
        for field in ("lr", "clip"):
            self._check_number(field, above=True)
        for field in ("init_lr", "end_lr", "weight_decay"):
            self._check_number(field)
        for field in ("b1", "b2"):
            self._check_number(field, below=1.0)
        self._check_integer("warmup_steps", 0)
        self._check_integer("decay_steps", self.warmup_steps + 1)
        if not isinstance(self.decay_embeddings, bool):
            raise _refused("decay_embeddings", self.decay_embeddings, "True or False")

    def _check_number(self, field: str, *, above: bool = False, below: float = math.inf) -> None:
        value = getattr(self, field)
        number = value if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
        if not 0 <= number < below or (above and number == 0):
            accepted = "a finite number " + ("above 0" if above else "of at least 0")
            raise _refused(field, value, accepted if below == math.inf else f"{accepted} and below {below:g}")

    def _check_integer(self, field: str, low: int) -> None:
        value = getattr(self, field)
        if not isinstance(value, int) or isinstance(value, bool) or value < low:
            raise _refused(field, value, f"an integer of at least {low}")


def learning_rate(options: OptimizerOptions, step: int) -> float:
    """The rate of update `step`, 0 being the first: a linear warm-up, then a cosine down to `end_lr`.

    Raises `ValueError` for a negative step.
    """
    if step < 0:
        raise _refused("step", step, "an integer of at least 0")
    warmup = options.warmup_steps
    if step < warmup:
        return options.init_lr + (options.lr - options.init_lr) * step / warmup
    length = options.decay_steps - warmup
    cosine = 0.5 * (1.0 + math.cos(math.pi * min(step - warmup, length) / length))
    return options.end_lr + (options.lr - options.end_lr) * cosine


def make_optimizer(model: TTTModel, options: OptimizerOptions) -> torch.optim.AdamW:
    """AdamW over all parameters of `model`; make it after the model was sharded, if it is to be.

    Every group's `lr` is that of the first update; before each later one the caller sets it to
    `learning_rate(options, step)`.
    """
    embedding = model.embed.weight
    groups = [{"params": list(model.parameters()), "weight_decay": options.weight_decay}]
    if not options.decay_embeddings:
        others = [parameter for parameter in model.parameters() if parameter is not embedding]
        groups = [
            {"params": [embedding], "weight_decay": 0.0},
            {"params": others, "weight_decay": options.weight_decay},
        ]
    optimizer = torch.optim.AdamW(
        groups, lr=learning_rate(options, 0), betas=(options.b1, options.b2), eps=EPS, fused=True
    )
    optimizer.register_step_post_hook(_count_change)
    return optimizer


def _count_change(optimizer: torch.optim.Optimizer, *_: object) -> None:
    # The fused update does not count as a change in place, by which the engine knows that the weights it has
    # converted for inference are out of date.
    for group in optimizer.param_groups:
        increment_version(group["params"])


@torch.no_grad()
def clip_(parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scales the gradients, in place, to a global norm of `max_norm` where it is not below that.

    Returns the norm before, 0-dim, on the gradients' device, nothing waited for. Works on the gradients of a
    sharded model, whose norm is then that over all processes. Parameters without a gradient count as zero.
    """
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.nn.utils.get_total_norm(grads)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    # torch's own clipping divides by the norm plus 1e-6.
    torch._foreach_mul_(grads, torch.where(norm < max_norm, 1.0, max_norm / norm))
    return norm


def _refused(field: str, value: object, accepted: str) -> ValueError:
    return ValueError(f"{field}={value!r} is not accepted: it must be {accepted}")
