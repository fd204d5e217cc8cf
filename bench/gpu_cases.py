"""A call of every operator as the engine makes it in one mini-batch of a model, of any size and on any device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench import attention_problem, kernels_swiglu, linear_ce_problem
from bench.flops import visible_pairs
from bench.operator_example import Example, flat, like
from engine.config import TTTConfig
from ttt_kernels.registry import OPERATORS

IGNORED = -100


@dataclass(frozen=True)
class Sizes:
    """B sequences of `tokens`, each of which sees `window` keys; d, i, heads of D, V classes, S fast blocks."""

    batch: int
    tokens: int
    window: int
    hidden: int
    intermediate: int
    heads: int
    head_dim: int
    vocab: int
    fast_blocks: int

    @classmethod
    def of(cls, config: TTTConfig) -> Sizes:
        """A mini-batch in the middle of one long sequence."""
        assert config.window is not None
        return cls(
            1, config.mini_batch_size, config.window, config.hidden_size, config.intermediate_size,
            config.num_heads, config.head_dim, config.vocab_size, config.suffix_layers,
        )  # fmt: skip


@dataclass(frozen=True)
class Case:
    """An example, and what is known of it.

    products: order -> useful operations of its matrix products, two per multiply-add; an order that is not there has
    none, or nobody counted them.
    heads: of so many heads of attention the truth is computed, since formulas have all scores at once; None: of all.
    """

    example: Example
    products: dict[str, int]
    heads: int | None = None


def names() -> list[str]:
    """What `case` can make; every operator is there."""
    return list(_MAKERS)


def case(
    name: str, sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int, heads: int | None = None
) -> Case:
    """The case of that name with standard normal values.

    Weights of norms and what the inner update works on are float32 at least, as the engine has them.
    """
    return _MAKERS[name](_Draw(sizes, dtype, device, seed, heads))


class _Draw:
    def __init__(
        self, sizes: Sizes, dtype: torch.dtype, device: torch.device, seed: int, heads: int | None
    ) -> None:
        self.sizes, self.dtype, self.device, self.heads = sizes, dtype, device, heads
        self.wide = torch.promote_types(dtype, torch.float32)
        self._generator = torch.Generator(device).manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        values = torch.randn(shape, generator=self._generator, device=self.device) * scale
        return values.to(dtype or self.dtype)

    def classes(self, count: int) -> Tensor:
        shape = (count,)
        return torch.randint(self.sizes.vocab, shape, generator=self._generator, device=self.device)


def _attention(x: _Draw) -> Case:
    s = x.sizes
    keys = s.tokens + s.window - 1
    q = x.normal(s.batch, s.tokens, s.heads, s.head_dim)
    k, v = (x.normal(s.batch, keys, s.heads, s.head_dim) for _ in range(2))
    params = (s.window, s.head_dim**-0.5, keys - s.tokens, True)
    pairs = s.batch * s.heads * visible_pairs(s.tokens, keys, s.window)
    products = {
        order.replace("-", "_"): count * 2 * s.head_dim * pairs
        for order, count in attention_problem.PRODUCTS.items()
    }
    return Case(Example(OPERATORS["swa"], (q, k, v, None, None), params), products, x.heads)


def _attention_twin(x: _Draw) -> Case:
    """With tangents of the mini-batch's own keys, as the meta-gradient has them."""
    s = x.sizes
    base = _attention(x).example
    start = base.params[2]
    dots = [like(t, 30 + i) for i, t in enumerate(base.inputs[:3])]
    dots = [dots[0], *(t[:, start:].contiguous() for t in dots[1:])]
    params = (*base.params[:2], start)
    pairs = s.batch * s.heads * visible_pairs(s.tokens, s.tokens + s.window - 1, s.window)
    own = s.batch * s.heads * visible_pairs(s.tokens, s.tokens, s.window)
    # Scores and output, each with what q's tangent adds; and with what those of the last keys and values do.
    products = {"forward": 2 * s.head_dim * (4 * pairs + 2 * own)}
    return Case(Example(OPERATORS["swa_jvp"], (*base.inputs, *dots), params), products, x.heads)


def _mlp_tensors(x: _Draw, grouped: bool) -> tuple[Tensor, ...]:
    s = x.sizes
    own = (s.batch,) if grouped else ()
    return (
        x.normal(s.batch, s.tokens, s.hidden),
        *(x.normal(*own, s.intermediate, s.hidden, scale=s.hidden**-0.5) for _ in range(2)),
        x.normal(*own, s.hidden, s.intermediate, scale=s.intermediate**-0.5),
    )


def _mlp(grouped: bool) -> Callable[[_Draw], Case]:
    def made(x: _Draw) -> Case:
        products = {
            order.replace("-", "_"): count * _mlp_product(x.sizes)
            for order, count in kernels_swiglu.PRODUCTS.items()
        }
        return Case(Example(OPERATORS["swiglu"], _mlp_tensors(x, grouped), ()), products)

    return made


def _mlp_twin(x: _Draw) -> Case:
    tensors = _mlp_tensors(x, True)
    dots = (like(tensors[0], 30), *(like(t, 31 + i) * t.shape[-1] ** -0.5 for i, t in enumerate(tensors[1:])))
    # Three, and for the tangents of the three two each.
    products = {"forward": 9 * _mlp_product(x.sizes)}
    return Case(Example(OPERATORS["swiglu_jvp"], (*tensors, *dots), ()), products)


def _mlp_product(s: Sizes) -> int:
    return 2 * s.batch * s.tokens * s.hidden * s.intermediate


def _head_tensors(x: _Draw) -> tuple[Tensor, ...]:
    s = x.sizes
    rows = s.batch * s.tokens
    weight = x.normal(s.vocab, s.hidden, scale=2 * s.hidden**-0.5)
    return x.normal(rows, s.hidden), weight, x.classes(rows)


def _head_product(s: Sizes) -> int:
    return 2 * s.batch * s.tokens * s.hidden * s.vocab


def _loss(x: _Draw) -> Case:
    products = {
        order.replace("-", "_"): count * _head_product(x.sizes)
        for order, count in linear_ce_problem.PRODUCTS.items()
    }
    return Case(Example(OPERATORS["linear_ce"], _head_tensors(x), (IGNORED, True)), products)


def _loss_and_slope(x: _Draw) -> Case:
    example = Example(OPERATORS["linear_ce_slope"], (*_head_tensors(x), []), (IGNORED, True))
    return Case(example, {"forward": 2 * _head_product(x.sizes)})


def _loss_twin(x: _Draw) -> Case:
    h, weight, target = _head_tensors(x)
    dots = (like(h, 30), like(weight, 31) * weight.shape[-1] ** -0.5)
    example = Example(OPERATORS["linear_ce_jvp"], (h, weight, target, *dots), (IGNORED,))
    return Case(example, {"forward": 3 * _head_product(x.sizes)})


def _norm_weight(x: _Draw, width: int) -> Tensor:
    return 1 + x.normal(width, scale=0.1, dtype=x.wide)


def _norm(residual: bool) -> Callable[[_Draw], Case]:
    def made(x: _Draw) -> Case:
        s = x.sizes
        values = x.normal(s.batch, s.tokens, s.hidden)
        added = x.normal(s.batch, s.tokens, s.hidden) if residual else None
        inputs = (values, _norm_weight(x, s.hidden), added)
        return Case(Example(OPERATORS["rms_norm"], inputs, (1e-6,)), {})

    return made


def _norm_of_heads(x: _Draw) -> Case:
    s = x.sizes
    values = x.normal(s.batch, s.tokens, s.heads, s.head_dim)
    return Case(Example(OPERATORS["rms_norm"], (values, _norm_weight(x, s.head_dim), None), (1e-6,)), {})


def _norm_twin(x: _Draw) -> Case:
    base = _norm(True)(x).example
    dots = [like(t, 30 + i) for i, t in enumerate(flat(base.inputs))]
    return Case(Example(OPERATORS["rms_norm_jvp"], (*base.inputs, *dots), (1e-6,)), {})


def _rotation(x: _Draw) -> Case:
    s = x.sizes
    positions = torch.arange(10**5, 10**5 + s.tokens, device=x.device)
    inputs = (x.normal(s.batch, s.tokens, s.heads, s.head_dim), positions)
    return Case(Example(OPERATORS["rope"], inputs, (5e5, True)), {})


def _update(x: _Draw) -> Case:
    s = x.sizes
    shapes = [(s.intermediate, s.hidden), (s.intermediate, s.hidden), (s.hidden, s.intermediate)]
    weights, grads = (
        [x.normal(s.batch, *shape, dtype=x.wide) for _ in range(s.fast_blocks) for shape in shapes]
        for _ in range(2)
    )
    # Where the weights are, as where the engine trains by graphs: its gradient would wait for a copy to the processor.
    rate = torch.tensor(0.3, dtype=torch.float64, device=x.device)
    copies = None if x.wide == x.dtype else x.dtype
    return Case(Example(OPERATORS["clipped_sgd"], (weights, grads, rate), (1.0, copies)), {})


_MAKERS: dict[str, Callable[[_Draw], Case]] = {
    "swa": _attention,
    "swa_jvp": _attention_twin,
    "swiglu": _mlp(True),
    "swiglu shared": _mlp(False),
    "swiglu_jvp": _mlp_twin,
    "linear_ce": _loss,
    "linear_ce_slope": _loss_and_slope,
    "linear_ce_jvp": _loss_twin,
    "rms_norm": _norm(False),
    "rms_norm residual": _norm(True),
    "rms_norm heads": _norm_of_heads,
    "rms_norm_jvp": _norm_twin,
    "rope": _rotation,
    "clipped_sgd": _update,
}
