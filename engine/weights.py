"""A model's weights as products read them: matrices in the compute dtype, norms in fp32."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from engine.config import TTTConfig
    from engine.model import TTTModel

Fast = tuple[tuple[Tensor, Tensor, Tensor], ...]
"""(gate, up, down) of every suffix block, each with a leading batch dimension."""


@dataclass(frozen=True)
class MLPWeights:
    """One MLP branch: the norms around it, and its matrices where they are not fast weights."""

    norm: Tensor
    post_norm: Tensor
    gate: Tensor | None = None
    up: Tensor | None = None
    down: Tensor | None = None

    @property
    def matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        """(gate, up, down) of a static MLP."""
        assert self.gate is not None
        assert self.up is not None
        assert self.down is not None
        return self.gate, self.up, self.down


@dataclass(frozen=True)
class BlockWeights:
    """One block; `fast` is there in suffix blocks only."""

    seq_norm: Tensor
    w_qkv: Tensor
    q_norm: Tensor
    k_norm: Tensor
    w_o: Tensor
    seq_post_norm: Tensor
    mlp: MLPWeights
    fast: MLPWeights | None


@dataclass(frozen=True)
class SuffixWeights:
    """All that an inner step reads but the fast matrices: the last blocks, the final norm and the head."""

    suffix: tuple[BlockWeights, ...]
    final_norm: Tensor
    head: Tensor


@dataclass(frozen=True)
class Weights(SuffixWeights):
    """A whole model but its fast matrices."""

    embed: Tensor
    prefix: tuple[BlockWeights, ...]


W = TypeVar("W", bound=SuffixWeights | BlockWeights)


@dataclass(frozen=True)
class _Cached:
    """Weights, and what they were made of.

    parameters: kept, so that none can be freed and another take its place. numbers: of each its identity, its address
    and its count of changes.
    """

    config: TTTConfig
    parameters: list[Tensor]
    numbers: list[int]
    weights: Weights


_cache: weakref.WeakKeyDictionary[TTTModel, _Cached] = weakref.WeakKeyDictionary()


def collect(model: TTTModel) -> Weights:
    """The weights in the model's compute dtype, recorded by autograd where it is enabled."""
    return converted(stored(model), model.config.torch_dtype)


def suffix_of(weights: Weights) -> SuffixWeights:
    """The part that an inner step reads."""
    return SuffixWeights(weights.suffix, weights.final_norm, weights.head)


def stored(model: TTTModel) -> Weights:
    """The parameters themselves, in the dtypes that they are kept in."""

    def block(b: Any) -> BlockWeights:
        return BlockWeights(
            seq_norm=b.seq_norm,
            w_qkv=b.w_qkv,
            q_norm=b.q_norm,
            k_norm=b.k_norm,
            w_o=b.w_o,
            seq_post_norm=b.seq_post_norm,
            mlp=MLPWeights(b.mlp_norm, b.mlp_post_norm, b.w_gate, b.w_up, b.w_down),
            fast=MLPWeights(b.fast_norm, b.fast_post_norm) if b.has_fast else None,
        )

    blocks = tuple(block(b) for b in model.blocks)
    return Weights(
        embed=model.embed.weight,
        head=model.head_weight,
        final_norm=model.final_norm,
        prefix=blocks[: model.config.prefix_layers],
        suffix=blocks[model.config.prefix_layers :],
    )


def converted(weights: W, dtype: torch.dtype) -> W:
    """Matrices in `dtype`; norms stay what they are. Tied embeddings are converted once."""
    made: dict[Tensor, Tensor] = {}

    def convert(t: Tensor) -> Tensor:
        if t.dim() == 1:
            return t
        if t not in made:
            made[t] = t.to(dtype)
        return made[t]

    return mapped(weights, convert)


def mapped(weights: W, change: Callable[[Tensor], Tensor]) -> W:
    """The same structure with other tensors; `change` sees them in a fixed order."""
    return cast(W, _mapped(weights, change))


def tensors(weights: SuffixWeights | BlockWeights) -> list[Tensor]:
    """All tensors, in the order in which `mapped` sees them."""
    found: list[Tensor] = []

    def note(t: Tensor) -> Tensor:
        found.append(t)
        return t

    mapped(weights, note)
    return found


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        return tuple(_mapped(v, change) for v in value)
    if value is None:
        return None
    # Not by vars(), which torch.compile of torch 2.11 does not trace on a frozen dataclass.
    return type(value)(**{f.name: _mapped(getattr(value, f.name), change) for f in fields(value)})


_changes = attrgetter("_version")


def for_inference(model: TTTModel) -> Weights:
    """As `collect`, without a graph, and converted only once for as long as no parameter changes."""
    parameters = _parameters(model)
    try:
        # Every decoded token asks, so nothing here is a loop of Python's.
        now = [*map(id, parameters), *map(Tensor.data_ptr, parameters), *map(_changes, parameters)]
    except RuntimeError:
        # Tensors made in inference mode have no count of changes: nothing is kept of them.
        return mapped(collect(model), Tensor.detach)
    cached = _cache.get(model)
    if cached is None or cached.numbers != now or cached.config != model.config:
        cached = _Cached(model.config, parameters, now, mapped(collect(model), Tensor.detach))
        _cache[model] = cached
    return cached.weights


def _parameters(module: torch.nn.Module) -> list[Tensor]:
    """As `module.parameters()`, those in several places as often; in a third of the time."""
    found: list[Tensor] = [p for p in module._parameters.values() if p is not None]
    for child in module._modules.values():
        if child is not None:
            found += _parameters(child)
    return found


def initial_fast(model: TTTModel, batch_size: int) -> Fast:
    """The fast weights that every sequence starts from, (B, ...) each; recorded by autograd where enabled."""

    def repeated(t: Tensor) -> Tensor:
        return t.unsqueeze(0).expand(batch_size, *t.shape)

    return tuple(
        (repeated(b.fast_gate), repeated(b.fast_up), repeated(b.fast_down))
        for b in cast(Any, model.blocks)
        if b.has_fast
    )
