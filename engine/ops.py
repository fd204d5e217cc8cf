"""The operators of one call of the engine, on the backends chosen for it.

Each goes through its operator's `forward` and `backward` (ttt_kernels/registry.py): the kernels themselves where
nothing records, registered operators where a graph is built, so the same inner step serves inference and,
differentiated once more, the meta-gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ttt_kernels import matmul
from ttt_kernels.clipped_sgd import operator as clipped_sgd
from ttt_kernels.clipped_sgd.update import update_
from ttt_kernels.linear_ce import operator as linear_ce
from ttt_kernels.linear_ce import slope_operator as linear_ce_slope
from ttt_kernels.registry import unrecorded
from ttt_kernels.rms_norm import jvp_operator as rms_norm_jvp
from ttt_kernels.rms_norm import operator as rms_norm
from ttt_kernels.rope import heads as fused_heads
from ttt_kernels.rope import operator as rope
from ttt_kernels.swa import jvp_operator as swa_jvp
from ttt_kernels.swa import operator as swa
from ttt_kernels.swa.rest import recorded
from ttt_kernels.swiglu import FACTORED
from ttt_kernels.swiglu import jvp_operator as swiglu_jvp
from ttt_kernels.swiglu import operator as swiglu
from ttt_kernels.swiglu.reference import Factors

if TYPE_CHECKING:
    from engine.model import TTTModel

IGNORED = -100
"""Target of a position whose next token does not count."""


class Ops:
    """Forward and explicit backward of everything that a block, the head and the inner update need."""

    def __init__(self, model: TTTModel, backend: str | None) -> None:
        self.model = model
        config = model.config
        like = torch.empty(0, 1, 1, config.head_dim, dtype=config.torch_dtype, device=model.final_norm.device)
        operators = (rms_norm, rope, swiglu, swa, linear_ce, clipped_sgd)
        self._asked = backend
        self._backend = {op.name: op.select(backend, like) for op in operators}
        by_triton = self._backend["rms_norm"] == self._backend["rope"] == "triton"
        self._fuses_heads = by_triton and fused_heads.serves(config.head_dim)
        self._eps = config.norm_eps
        self._theta = config.rope_theta
        self._scale = config.head_dim**-0.5

    @property
    def backends(self) -> tuple[str, ...]:
        """The backend of every operator."""
        return tuple(self._backend.values())

    @property
    def recordable(self) -> bool:
        """Whether a CUDA graph may record them: the reference may look at what a tensor holds."""
        return "reference" not in self.backends

    @property
    def takes_known(self) -> bool:
        """Whether `nll_and_slope` takes known results."""
        return self._backend["linear_ce"] != "reference"

    def norm(self, x: Tensor, weight: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """RMSNorm over the last dimension, plus the residual; also its reciprocal root mean squares."""
        y, rstd = rms_norm.forward(x, weight, residual, self._eps, backend=self._backend["rms_norm"])
        return y, rstd

    def norm_backward(self, dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
        """Gradient of x only."""
        arguments, backend = (dy, x, weight, None, rstd, self._eps), self._backend["rms_norm"]
        return rms_norm.backward(*arguments, needs=(True, False, False), backend=backend)[0]

    def norm_jvp(
        self,
        x: Tensor,
        weight: Tensor,
        residual: Tensor | None,
        x_dot: Tensor,
        residual_dot: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`norm` and its tangent."""
        arguments = (x, weight, residual, x_dot, None, residual_dot, self._eps)
        y, y_dot, _ = rms_norm_jvp.forward(*arguments, backend=self._backend["rms_norm"])
        return y, y_dot

    def rope(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotates interleaved pairs of x (B, T, H, D)."""
        return rope.forward(x, positions, self._theta, True, backend=self._backend["rope"])[0]

    def rope_backward(self, dy: Tensor, x: Tensor, positions: Tensor) -> Tensor:
        """Gradient of x."""
        backend = self._backend["rope"]
        return rope.backward(dy, x, positions, self._theta, True, needs=(True,), backend=backend)[0]

    def heads(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        q_norm: Tensor,
        k_norm: Tensor,
        positions: Tensor,
        into: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """q and k (B, T, H, D) normalized by head and rotated, v, and the norms' reciprocal root mean squares.

        `into`: where the new k and v may be left.
        """
        if self._fuses_heads and unrecorded((q, k, v, q_norm, k_norm)):
            return fused_heads.forward(q, k, v, positions, q_norm, k_norm, self._eps, self._theta, into)
        (q_normed, q_rstd), (k_normed, k_rstd) = self.norm(q, q_norm), self.norm(k, k_norm)
        return self.rope(q_normed, positions), self.rope(k_normed, positions), v, q_rstd, k_rstd

    def heads_backward(
        self,
        cotangents: tuple[Tensor, Tensor, Tensor],
        q: Tensor,
        k: Tensor,
        q_norm: Tensor,
        k_norm: Tensor,
        q_rstd: Tensor,
        k_rstd: Tensor,
        positions: Tensor,
    ) -> Tensor:
        """Gradients (B, T, 3, H, D) of what `heads` was given, from those of its first three results."""
        given = (q, k, positions, q_norm, k_norm, q_rstd, k_rstd)
        if self._fuses_heads and unrecorded((*cotangents, *given)):
            return fused_heads.backward(*cotangents, *given, self._theta)
        dq, dk, dv = cotangents
        dq = self.norm_backward(self.rope_backward(dq, q, positions), q, q_norm, q_rstd)
        dk = self.norm_backward(self.rope_backward(dk, k, positions), k, k_norm, k_rstd)
        return torch.stack((dq, dk, dv), 2)

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, window: int | None, *, for_backward: bool
    ) -> tuple[Tensor, Any]:
        """Attention over all given keys; also what its backward needs beside the arguments."""
        keep_rest = for_backward or recorded(q, k, v)
        arguments = (q, k, v, None, None, window, self._scale, 0, keep_rest)
        o, *saved = swa.forward(*arguments, backend=self._backend["swa"])
        return o, (o, *saved)

    def attention_backward(
        self, do: Tensor, q: Tensor, k: Tensor, v: Tensor, saved: Any, window: int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q and of the last keys and values, those that belong to the queries."""
        key_start = k.shape[1] - q.shape[1]
        arguments = (do, q, k, v, None, None, *saved, window, self._scale, key_start, True)
        dq, dk, dv = swa.backward(*arguments, needs=(True, True, True), backend=self._backend["swa"])
        return dq, dk, dv

    def attention_jvp(
        self, qkv: Sequence[Tensor], dots: Sequence[Tensor], window: int | None
    ) -> tuple[Tensor, Tensor]:
        """`attention` of (q, k, v) and its tangent, given those of q and of the last keys and values."""
        key_start = qkv[1].shape[1] - dots[1].shape[1]
        arguments = (*qkv, None, None, *dots, window, self._scale, key_start)
        o, o_dot, *_ = swa_jvp.forward(*arguments, backend=self._backend["swa"])
        return o, o_dot

    def mlp(self, x: Tensor, matrices: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """SwiGLU MLP of x (B, T, d); also its two pre-activations."""
        y, gate, up = swiglu.forward(x, *matrices, backend=self._backend["swiglu"])
        return y, gate, up

    def mlp_jvp(
        self,
        x: Tensor,
        matrices: Sequence[Tensor],
        x_dot: Tensor | None,
        dots: Sequence[Tensor | None] = (None, None, None),
    ) -> tuple[Tensor, Tensor]:
        """The result of `mlp` and its tangent along those of x and of the matrices; None is zero."""
        y, y_dot, *_ = swiglu_jvp.forward(x, *matrices, x_dot, *dots, backend=self._backend["swiglu"])
        return y, y_dot

    def mlp_backward(
        self,
        dy: Tensor,
        x: Tensor,
        matrices: Sequence[Tensor],
        gate: Tensor,
        up: Tensor,
        *,
        of_input: bool,
        of_weights: bool,
    ) -> tuple[Tensor | None, ...]:
        """Gradients of x and of the three matrices, those that are wanted."""
        needs = (of_input, of_weights, of_weights, of_weights)
        return swiglu.backward(dy, x, *matrices, gate, up, needs=needs, backend=self._backend["swiglu"])

    def mlp_backward_factored(
        self,
        dy: Tensor,
        x: Tensor,
        matrices: Sequence[Tensor],
        gate: Tensor,
        up: Tensor,
        *,
        of_input: bool,
    ) -> tuple[Tensor | None, Factors]:
        """Gradient of x where wanted, and those of the matrices as factors; builds no graph."""
        backward = FACTORED[self._backend["swiglu"]].backward
        dx, factors = backward(dy, x, *matrices, gate, up, (of_input, True, True, True))
        return dx, factors

    def mlp_gradients(self, factors: Factors, matrices: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of three matrices from their factors, in the matrices' shapes and dtype."""
        gate, up, down = FACTORED[self._backend["swiglu"]].weight_gradients(factors, *matrices)
        return gate, up, down

    def linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """x (..., in) times weight (out, in)."""
        return matmul.mm(x, weight.t())

    def linear_backward(self, dy: Tensor, weight: Tensor) -> Tensor:
        """Gradient of x."""
        return matmul.mm(dy, weight)

    def nll(self, hidden: Tensor, head: Tensor, targets: Tensor) -> Tensor:
        """Negative log-likelihoods of targets (...) from hidden (..., d), 0 where ignored."""
        keep_slope = torch.is_grad_enabled() and hidden.requires_grad
        arguments = (hidden.flatten(0, -2), head, targets.flatten(), IGNORED, keep_slope)
        nll: Tensor = linear_ce.forward(*arguments, backend=self._backend["linear_ce"])[0]
        return nll.view(targets.shape)

    def nll_and_slope(
        self,
        hidden: Tensor,
        head: Tensor,
        targets: Tensor,
        known: Sequence[Tensor] = (),
        *,
        of_slope: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `nll`; also each one's gradient with respect to its row of hidden, and the log-sum-exp of its logits.

        `known` are the three from an earlier call with the same values; without `of_slope` the second is a constant.
        """
        flat = [t.flatten(0, 1) for t in known]
        arguments = (hidden.flatten(0, -2), head, targets.flatten(), flat, IGNORED, of_slope)
        nll, slope, lse = linear_ce_slope.forward(*arguments, backend=self._backend["linear_ce"])
        return nll.view(targets.shape), slope.view(hidden.shape), lse.view(targets.shape)

    def update(
        self,
        weights: Sequence[Tensor],
        grads: Sequence[Tensor],
        lr: float | Tensor,
        clip: float,
        copy_dtype: torch.dtype | None,
    ) -> tuple[list[Tensor], Tensor, list[Tensor]]:
        """The clipped step: new weights, the gradient's norm per sequence, and the copies that products read."""
        arguments = (list(weights), list(grads), _rate(lr), clip or None, copy_dtype)
        new, norm, copies = clipped_sgd.forward(*arguments, backend=self._backend["clipped_sgd"])
        return list(new), norm, list(copies)

    def update_backward(
        self, d_weights: Sequence[Tensor], grads: Sequence[Tensor], lr: float | Tensor, clip: float
    ) -> list[Tensor]:
        """Cotangents of a clipped step's gradients, from those of its new weights; the old ones' are the same."""
        d_norm = torch.zeros_like(grads[0][:, 0, 0])
        # Of the old weights nothing is read.
        d_grads = clipped_sgd.backward(
            list(d_weights), d_norm, [], list(d_weights), list(grads), _rate(lr), clip or None, None,
            needs=(False, True, False), backend=self._backend["clipped_sgd"],
        )[1]  # fmt: skip
        return list(d_grads)

    def update_(
        self,
        weights: Sequence[Tensor],
        grads: Sequence[Tensor],
        lr: float | Tensor,
        clip: float,
        copies: Sequence[Tensor] | None,
    ) -> Tensor:
        """`update` in place, which returns the norm (B,); builds no graph."""
        # It has more backends than the step that is differentiated.
        return update_(weights, grads, lr=lr, max_norm=clip or None, copies=copies, backend=self._asked)


def _rate(lr: float | Tensor) -> Tensor:
    """A learning rate on the processor, wherever the weights are, unless it is a tensor: no device is waited for."""
    return lr if isinstance(lr, Tensor) else torch.tensor(lr, dtype=torch.float64, device="cpu")
