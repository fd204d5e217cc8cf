"""A model's weights as products read them: matrices in the compute dtype, norms in fp32."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

if TYPE_CHECKING:
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
class Weights:
    """A whole model but its fast matrices."""

    embed: Tensor
    head: Tensor
    final_norm: Tensor
    prefix: tuple[BlockWeights, ...]
    suffix: tuple[BlockWeights, ...]


_Key = tuple[Any, ...]
_cache: weakref.WeakKeyDictionary[TTTModel, tuple[_Key, Weights]] = weakref.WeakKeyDictionary()


def collect(model: TTTModel) -> Weights:
    """The weights in the model's compute dtype, recorded by autograd where it is enabled."""
    dtype = model.config.torch_dtype

    def block(b: Any) -> BlockWeights:
        return BlockWeights(
            seq_norm=b.seq_norm,
            w_qkv=b.w_qkv.to(dtype),
            q_norm=b.q_norm,
            k_norm=b.k_norm,
            w_o=b.w_o.to(dtype),
            seq_post_norm=b.seq_post_norm,
            mlp=MLPWeights(
                b.mlp_norm, b.mlp_post_norm, b.w_gate.to(dtype), b.w_up.to(dtype), b.w_down.to(dtype)
            ),
            fast=MLPWeights(b.fast_norm, b.fast_post_norm) if b.has_fast else None,
        )

    blocks = tuple(block(b) for b in model.blocks)
    embed = model.embed.weight.to(dtype)
    return Weights(
        embed=embed,
        head=embed if model.config.tie_embeddings else model.head_weight.to(dtype),
        final_norm=model.final_norm,
        prefix=blocks[: model.config.prefix_layers],
        suffix=blocks[model.config.prefix_layers :],
    )


def for_inference(model: TTTModel) -> Weights:
    """As `collect`, without a graph, and converted only once for as long as no parameter changes."""
    parameters = tuple(model.parameters())
    # Tensors made in inference mode have no count of changes: nothing is kept of them.
    if any(p.is_inference() for p in parameters):
        return _detached(collect(model))
    # The parameters themselves, so that none can be freed and another take its address.
    key = (model.config, *parameters, *((p.data_ptr(), p._version) for p in parameters))
    cached = _cache.get(model)
    if cached is None or not _same(cached[0], key):
        cached = (key, _detached(collect(model)))
        _cache[model] = cached
    return cached[1]


def _same(a: _Key, b: _Key) -> bool:
    return len(a) == len(b) and all(
        x is y if isinstance(x, Tensor) else x == y for x, y in zip(a, b, strict=True)
    )


def _detached(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, tuple):
        return tuple(_detached(v) for v in value)
    if value is None:
        return None
    return type(value)(**{name: _detached(v) for name, v in vars(value).items()})


def initial_fast(model: TTTModel, batch_size: int) -> Fast:
    """The fast weights that every sequence starts from, (B, ...) each; recorded by autograd where enabled."""

    def repeated(t: Tensor) -> Tensor:
        return t.unsqueeze(0).expand(batch_size, *t.shape)

    return tuple(
        (repeated(b.fast_gate), repeated(b.fast_up), repeated(b.fast_down))
        for b in cast(Any, model.blocks)
        if b.has_fast
    )
