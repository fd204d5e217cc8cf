"""The weights and caches that one decoding step goes through."""

from dataclasses import dataclass, fields
from functools import cached_property

from torch import Tensor

from ttt_kernels.checks import shape

FAST = ("fast_norm", "fast_gate", "fast_up", "fast_down", "fast_post_norm")
CACHES = ("k_cache", "v_cache")


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """One block's tensors. Matrices are (out, in), of the activations' dtype; norms float32 beside bfloat16
    and float16, else of that dtype. d is the hidden size, i the intermediate one, H the number of heads and D
    their width; B the number of sequences.
    """

    seq_norm: Tensor
    """(d,)"""
    w_qkv: Tensor
    """(3d, d), the rows of q, then k, then v."""
    q_norm: Tensor
    """(D,)"""
    k_norm: Tensor
    """(D,)"""
    w_o: Tensor
    """(d, d)"""
    seq_post_norm: Tensor
    """(d,)"""
    mlp_norm: Tensor
    """(d,)"""
    w_gate: Tensor
    """(i, d)"""
    w_up: Tensor
    """(i, d)"""
    w_down: Tensor
    """(d, i)"""
    mlp_post_norm: Tensor
    """(d,)"""
    k_cache: Tensor
    """(B, capacity, H, D): normalized and rotated keys, written in place."""
    v_cache: Tensor
    """(B, capacity, H, D)"""
    fast_norm: Tensor | None = None
    """(d,); this and the following are None in a block without a fast MLP."""
    fast_gate: Tensor | None = None
    """(B, i, d), each sequence's own."""
    fast_up: Tensor | None = None
    """(B, i, d)"""
    fast_down: Tensor | None = None
    """(B, d, i)"""
    fast_post_norm: Tensor | None = None
    """(d,)"""

    @property
    def has_fast(self) -> bool:
        """Whether the block has a fast MLP."""
        return self.fast_gate is not None


@dataclass(frozen=True, eq=False)
class Stack:
    """A whole Transformer and the caches of B sequences. Whoever replaces a tensor makes a new stack; what
    tensors hold may change.

    Raises `ValueError` for a tensor whose shape does not fit the others, or a fast MLP with gaps.
    """

    layers: tuple[LayerWeights, ...]
    final_norm: Tensor
    """(d,)"""
    head: Tensor
    """(V, d)"""
    n_heads: int
    eps: float
    """Of every norm."""

    def __post_init__(self) -> None:
        if self.head.dim() != 2 or self.n_heads < 1 or self.head.shape[1] % (2 * self.n_heads):
            raise ValueError(
                f"decode: head has shape {shape(self.head)}; accepted is (V, d) with d an even multiple of "
                f"n_heads={self.n_heads}"
            )
        if not self.layers:
            raise ValueError("decode: layers is empty; accepted is at least one layer")
        self._check("final_norm", self.final_norm, (self.hidden_size,))
        for index, layer in enumerate(self.layers):
            self._check_layer(f"layers[{index}].", layer)

    @cached_property
    def hidden_size(self) -> int:
        """d"""
        return self.head.shape[1]

    @cached_property
    def intermediate_size(self) -> int:
        """i"""
        return self.layers[0].w_gate.shape[0]

    @cached_property
    def head_dim(self) -> int:
        """D"""
        return self.hidden_size // self.n_heads

    @cached_property
    def batch_size(self) -> int:
        """B"""
        return self.layers[0].k_cache.shape[0]

    @cached_property
    def n_prefix(self) -> int:
        """How many layers come before the first one with a fast MLP."""
        return next((n for n, layer in enumerate(self.layers) if layer.has_fast), len(self.layers))

    @cached_property
    def capacities(self) -> tuple[int, ...]:
        """How many rows the caches of each layer have."""
        return tuple(layer.k_cache.shape[1] for layer in self.layers)

    def _check_layer(self, where: str, layer: LayerWeights) -> None:
        d, i, n = self.hidden_size, self.intermediate_size, self.batch_size
        heads = (self.n_heads, self.head_dim)
        expected = {
            "w_qkv": (3 * d, d), "w_o": (d, d), "w_gate": (i, d), "w_up": (i, d), "w_down": (d, i),
            "q_norm": heads[1:], "k_norm": heads[1:],
            "fast_gate": (n, i, d), "fast_up": (n, i, d), "fast_down": (n, d, i),
        }  # fmt: skip
        for name in (field.name for field in fields(layer)):
            tensor = getattr(layer, name)
            if tensor is None or name in CACHES:
                continue
            self._check(where + name, tensor, expected.get(name, (d,)))
        if len({getattr(layer, name) is None for name in FAST}) > 1:
            raise ValueError(f"decode: {where} has some of {', '.join(FAST)}; accepted are all or none")
        for name in CACHES:
            cache = getattr(layer, name)
            self._check(where + name, cache, (n, layer.k_cache.shape[1], *heads))

    def _check(self, name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
        if tensor.shape != expected or tensor.device != self.head.device:
            raise ValueError(
                f"decode: {name} has shape {shape(tensor)} on {tensor.device}; accepted is {expected} on "
                f"{self.head.device}"
            )
