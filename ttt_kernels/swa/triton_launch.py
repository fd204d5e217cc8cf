"""What the launches of attention's Triton kernels share: their arguments, and how many programs there are."""

from typing import Any

import torch
from torch import Tensor

from ttt_kernels import triton_launch, tuning
from ttt_kernels.swa.triton_configs import configs, pieces
from ttt_kernels.swa.visible import first_keys

_WIDEST_TILE = 256
"""At least as many rows as any tile has."""


def located(t: Tensor) -> tuple[Tensor, int, int, int]:
    """(B, T, H, D) with unit stride in D, as kernels take it: with its strides of B, T and H.

    Within a tile kernels count in 32 bits, so rows that lie very far apart are copied together.
    """
    if (t.stride(3) != 1 and t.shape[3] > 1) or t.stride(1) * _WIDEST_TILE >= 2**31:
        t = t.contiguous()
    return t, t.stride(0), t.stride(1), t.stride(2)


def located_or_none(t: Tensor | None) -> tuple[Tensor, int, int, int] | None:
    """`located` a tensor that may be missing or, where nobody wanted it, without elements."""
    return None if t is None or t.numel() == 0 else located(t)


class Call:
    """A call of attention: its sizes, which keys its queries see, and launches of its kernels."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        key_lengths: Tensor | None,
        cu_seqlens: Tensor | None,
        window: int | None,
        scale: float,
    ) -> None:
        b, tq, heads, d = q.shape
        tk, kv_heads = k.shape[1], k.shape[2]
        first, self.end = None, None
        if cu_seqlens is not None:
            first = first_keys(q, k, None, cu_seqlens, window)[0]
            keys = torch.arange(tk, device=q.device)
            self.end = torch.searchsorted(first, keys, right=True).to(torch.int32)
            first = first.to(torch.int32)
        self.arguments: dict[str, Any] = {
            "p_lengths": None if key_lengths is None else key_lengths.contiguous(), "p_first": first,
            "scale": scale, "Tq": tq, "Tk": tk,
            "window": min(window or tk, tk), "heads": heads, "group": heads // kv_heads,
            "D": d,
        }  # fmt: skip
        self.dtype, self.device = q.dtype, q.device
        self.query_heads, self.key_heads = b * heads, b * kv_heads
        full = self.query_heads * -(-tq // 64) >= _MANY
        self.key = (q.dtype, d, heads // kv_heads, _span(self.arguments["window"]), tq <= _FEW, full)

    def by_queries(self, name: str, kernel: Any, **arguments: Any) -> None:
        """Launches a kernel that has a program per block of queries and head."""
        self._run(name, kernel, arguments, "BQ", self.arguments["Tq"], self.query_heads)

    def by_keys(self, name: str, kernel: Any, keys: int, **arguments: Any) -> None:
        """Launches a kernel that has a program per block of `keys` keys and head of keys."""
        self._run(name, kernel, {"p_end": self.end, **arguments}, "BK", keys, self.key_heads)

    def _run(
        self, name: str, kernel: Any, arguments: dict[str, Any], side: str, length: int, heads: int
    ) -> None:
        head_dim = self.arguments["D"]
        given = {**self.arguments, **arguments, "PIECES": pieces(name, head_dim, self.dtype)}

        triton_launch.launch(
            f"swa.{name}",
            kernel,
            lambda sizes: -(-length // sizes[side]) * heads,
            configs(name, head_dim, self.dtype, tuning.capability(self.device)),
            self.key,
            self.device,
            given,
        )


_FEW = 128
"""Up to as many queries, tiles of queries are rather empty."""
_MANY = 128
"""As many blocks of 64 queries keep every multiprocessor of a large device busy."""


def _span(window: int) -> str:
    """How many tiles of keys a block of queries visits, roughly."""
    return "short" if window <= 256 else "middle" if window <= 1024 else "long"
