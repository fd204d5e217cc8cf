"""Every registered operator with an example, for the promises that all of them make (test_every_operator.py).

A new operator adds its example here; what is special to it is tested in a file of its own.
"""

from typing import Any

import torch
from harness import EVERY_BACKEND, draw
from torch import Tensor

from bench.operator_example import Example, flat, like
from ttt_kernels.registry import OPERATORS

__all__ = ["EXAMPLES", "KERNELS", "Example", "flat"]

KERNELS = tuple(name for name in EVERY_BACKEND if name != "reference")


def _draw(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    return [draw(*shape, seed=seed + i) for i, shape in enumerate(shapes)]


def _with_tangents(name: str, example: Example, params: tuple[Any, ...]) -> Example:
    names = list(example.operator.inputs)
    given = [example.inputs[names.index(n)] for n in example.operator.differentiable]
    dots = [None if v is None else like(v, 30 + i) for i, v in enumerate(given)]
    return Example(OPERATORS[f"{name}_jvp"], (*example.inputs, *dots), params)


def _with_last_tangents(example: Example, start: int) -> Example:
    """Attention with tangents of the keys and values from `start` on."""
    *given, q_dot, k_dot, v_dot = _with_tangents("swa", example, ()).inputs
    return Example(OPERATORS["swa_jvp"], (*given, q_dot, k_dot[:, start:], v_dot[:, start:]), (4, 0.4, start))


def _of_x(example: Example) -> Example:
    """A norm whose weight has no tangent, as an inner step's."""
    *inputs, x_dot, _, residual_dot = example.inputs
    return Example(example.operator, (*inputs, x_dot, None, residual_dot), example.params)


def _examples() -> dict[str, Example]:
    attention = _draw((1, 5, 2, 4), (1, 8, 1, 4), (1, 8, 1, 4))
    lengths = torch.tensor([7])
    mlp = [t * 0.5 for t in _draw((2, 3, 4), (2, 6, 4), (2, 6, 4), (2, 4, 6))]
    # In 16 bits the errors of fewer rows are a matter of luck.
    head = (*_draw((12, 3), (11, 3)), torch.tensor([0, 10, -100, 7, 7, 3, 9, 1, 5, 10, 2, 8]))
    fast = [_draw((2, 3, 4), (2, 7), seed=s) for s in (0, 5)]
    rate = torch.tensor(0.3, dtype=torch.float64)
    normed = _draw((3, 2, 10), (10,), (3, 2, 10))
    of = OPERATORS
    examples = {
        "swa": Example(of["swa"], (*attention, lengths, None), (4, 0.4, 0, True)),
        "swiglu": Example(of["swiglu"], tuple(mlp), ()),
        "swiglu shared": Example(of["swiglu"], (mlp[0], *(t[0] for t in mlp[1:])), ()),
        "linear_ce": Example(of["linear_ce"], head, (-100, True)),
        "linear_ce_slope": Example(of["linear_ce_slope"], (*head, []), (-100, True)),
        "rms_norm": Example(of["rms_norm"], (*normed[:2], None), (1e-2,)),
        "rms_norm residual": Example(of["rms_norm"], tuple(normed), (1e-2,)),
        "rope": Example(of["rope"], (draw(2, 3, 2, 6, seed=0), torch.tensor([0, 5, 10**6])), (1e4, True)),
        "rope halves": Example(of["rope"], (draw(2, 3, 2, 6, seed=0), torch.arange(6).view(2, 3)), (1e4, False)),
        "clipped_sgd": Example(of["clipped_sgd"], (*fast, rate), (2.0, None)),
        "clipped_sgd unclipped": Example(of["clipped_sgd"], (*fast, rate), (100.0, torch.bfloat16)),
    }  # fmt: skip
    return examples | {
        "swa_jvp": _with_tangents("swa", examples["swa"], (4, 0.4, 0)),
        "swa_jvp of the last keys": _with_last_tangents(examples["swa"], 3),
        "swiglu_jvp": _with_tangents("swiglu", examples["swiglu"], ()),
        "linear_ce_jvp": _with_tangents("linear_ce", examples["linear_ce"], (-100,)),
        "rms_norm_jvp": _with_tangents("rms_norm", examples["rms_norm residual"], (1e-2,)),
        "rms_norm_jvp of x": _of_x(_with_tangents("rms_norm", examples["rms_norm"], (1e-2,))),
    }


EXAMPLES = _examples()
