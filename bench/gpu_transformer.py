"""The full-attention Transformer that TTT-E2E is compared with, by the fastest means that torch has.

Its attention is torch's fused kernel, the fastest of those that run; between attention and the products stand this
library's kernels, or plain torch compiled by torch.compile. It reads a whole sequence at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import sdpa_kernel
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from bench.attention_contenders import FUSED
from bench.timing import timed
from engine import TTTModel
from ttt_kernels import linear_cross_entropy, rms_norm, rope, swiglu

STYLES = ("kernels", "compiled")
"""What stands between attention and products: this library's kernels, or plain torch, compiled."""


RANKED = 32768
"""Tokens by which fused kernels are ranked: of more the slowest would take too long."""


@dataclass(frozen=True)
class Attention:
    """A fused kernel of torch's, and the seconds of all that were tried, in the order of their names."""

    name: str
    seconds: dict[str, float]

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention of (B, T, H, D) each."""
        with sdpa_kernel([FUSED[self.name]]):
            o = functional.scaled_dot_product_attention(
                *(t.transpose(1, 2) for t in (q, k, v)), is_causal=True
            )
        return o.transpose(1, 2)


def fastest_attention(model: TTTModel, batch: int, length: int, *, learns: bool) -> Attention:
    """torch's fused kernel that takes least time for one block's attention, with its backward where `learns`.

    Of longer texts RANKED tokens tell. Raises RuntimeError where none runs.
    """
    config, device = model.config, model.final_norm.device
    shape = (batch, min(length, RANKED), 3, config.num_heads, config.head_dim)
    # Values are a part of what one product gives; queries and keys have been normed and rotated since.
    q, k, v = torch.randn(shape, device=device).to(config.torch_dtype).unbind(2)
    q, k, v = (t.requires_grad_(learns) for t in (q.contiguous(), k.contiguous(), v))
    found: dict[str, float] = {}
    for name in FUSED:
        attend = Attention(name, {})

        def once(attend: Attention = attend) -> None:
            o = attend(q, k, v)
            if learns:
                torch.autograd.grad(o.sum(), (q, k, v))

        try:
            once()
            found[name] = min(timed(once, device)[1] for _ in range(2))
        except RuntimeError:
            # Not on this device, or not for such heads.
            continue
    if not found:
        raise RuntimeError("torch has no fused attention for such heads here")
    return Attention(min(found, key=lambda name: found[name]), found)


class Transformer:
    """The model's own parameters, read by other means than the engine's."""

    def __init__(self, model: TTTModel, attention: Attention, style: str = "kernels") -> None:
        assert model.config.suffix_layers == 0
        assert model.config.window is None
        assert style in STYLES
        self.model = model
        self.attention = attention
        self.config = model.config
        self._ops: type[_Kernels] = _Kernels if style == "kernels" else _Plain
        self._block: Callable[..., Tensor] = self._one
        if style == "compiled":
            self._block = torch.compile(self._one, dynamic=False)

    @torch.no_grad()
    def logits(self, tokens: Tensor, weights: list[dict[str, Tensor]]) -> Tensor:
        """Logits (B, V) for the token after tokens (B, T), and of no other: what comes before generation."""
        x = self._hidden(tokens, weights, keep=lambda block, w, x, turn: block(w, x, turn))
        return functional.linear(self._normed(x[:, -1]), weights[-1]["head"]).float()

    def loss(self, tokens: Tensor, *, recompute: bool, blocks: int | None = None) -> Tensor:
        """Mean next-token loss of tokens (B, T + 1), by the first `blocks` blocks alone (None: by all).

        With `recompute` a block keeps its input and what its attention gave, and computes the rest again.
        """
        keep = _keeping_attention if recompute else _keeping_all
        *every, head = self.weights()
        weights = [*every[:blocks], head]
        x = self._normed(self._hidden(tokens[:, :-1], weights, keep))
        return linear_cross_entropy(x.flatten(0, 1), weights[-1]["head"], tokens[:, 1:].flatten())

    def weights(self) -> list[dict[str, Tensor]]:
        """Matrices in the compute dtype, block by block, then the head; recorded by autograd where it is enabled."""
        dtype = self.config.torch_dtype
        blocks = [
            {name: p if p.dim() == 1 else p.to(dtype) for name, p in block.named_parameters()}
            for block in self.model.blocks
        ]
        return [*blocks, {"head": self.model.head_weight.to(dtype)}]

    def _hidden(
        self, tokens: Tensor, weights: list[dict[str, Tensor]], keep: Callable[..., Tensor]
    ) -> Tensor:
        table = weights[-1]["head"] if self.config.tie_embeddings else self.model.embed.weight
        x = functional.embedding(tokens, table).to(self.config.torch_dtype)
        turn = self._ops.turn(self.config.rope_theta, self.config.head_dim, tokens.shape[1], x.device)
        for w in weights[:-1]:
            x = keep(self._block, w, x, turn)
        return x

    def _normed(self, x: Tensor) -> Tensor:
        return _Kernels.norm(x.contiguous(), self.model.final_norm, self.config.norm_eps, None)

    def _one(self, w: dict[str, Tensor], x: Tensor, turn: Any) -> Tensor:
        """x (B, T, d) through a block."""
        ops, eps = self._ops, self.config.norm_eps
        heads = (3, self.config.num_heads, self.config.head_dim)
        h = ops.norm(x, w["seq_norm"], eps, None)
        q, k, v = functional.linear(h, w["w_qkv"]).unflatten(-1, heads).unbind(2)
        q, k = (ops.rotate(ops.norm(t, w[n], eps, None), turn) for t, n in ((q, "q_norm"), (k, "k_norm")))
        o = functional.linear(self.attention(q, k, v).flatten(2), w["w_o"])
        x = ops.norm(o, w["seq_post_norm"], eps, x)
        y = ops.mlp(ops.norm(x, w["mlp_norm"], eps, None), w["w_gate"], w["w_up"], w["w_down"])
        return ops.norm(y, w["mlp_post_norm"], eps, x)


class _Kernels:
    """What stands between, by this library's operators."""

    @staticmethod
    def turn(theta: float, head_dim: int, length: int, device: torch.device) -> Any:
        return theta, torch.arange(length, device=device)

    @staticmethod
    def norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> Tensor:
        return rms_norm(x, weight, eps=eps, residual=residual)

    @staticmethod
    def rotate(x: Tensor, turn: Any) -> Tensor:
        theta, positions = turn
        return rope(x, positions, theta=theta)

    @staticmethod
    def mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        return swiglu(x, gate, up, down)


class _Plain(_Kernels):
    """The same as formulas that torch.compile fuses; statistics and angles in float32."""

    @staticmethod
    def turn(theta: float, head_dim: int, length: int, device: torch.device) -> Any:
        exponents = torch.arange(0, head_dim, 2, device=device, dtype=torch.float64) / head_dim
        angles = torch.arange(length, device=device, dtype=torch.float64)[:, None, None] * theta**-exponents
        return angles.cos().float(), angles.sin().float()

    @staticmethod
    def norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None) -> Tensor:
        wide = x.float()
        y = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight
        return (y if residual is None else y + residual).to(x.dtype)

    @staticmethod
    def rotate(x: Tensor, turn: Any) -> Tensor:
        cos, sin = turn
        a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(x.dtype)

    @staticmethod
    def mlp(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
        hidden = functional.silu(functional.linear(x, gate)) * functional.linear(x, up)
        return functional.linear(hidden, down)


def _keeping_all(block: Callable[..., Tensor], w: dict[str, Tensor], x: Tensor, turn: Any) -> Tensor:
    return block(w, x, turn)


_FUSED_OPERATORS = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
)


def _keeping_attention(block: Callable[..., Tensor], w: dict[str, Tensor], x: Tensor, turn: Any) -> Tensor:
    kept = [getattr(torch.ops.aten, name).default for name in _FUSED_OPERATORS]
    contexts = partial(create_selective_checkpoint_contexts, kept)
    return cast(Tensor, checkpoint(block, w, x, turn, use_reentrant=False, context_fn=contexts))
