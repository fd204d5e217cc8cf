"""What the launches of one call of clipped SGD share: its tuples of tensors, numbers, and the products' parts."""

import struct
from typing import Any

import torch
from torch import Tensor

from ttt_kernels import triton_launch
from ttt_kernels.clipped_sgd.reference import Tensors
from ttt_kernels.clipped_sgd.rows import rows_of
from ttt_kernels.clipped_sgd.triton_configs import configs, divided


def located(tensors: Tensors | None) -> tuple[tuple[Tensor, ...], tuple[int, ...]] | None:
    """Tensors (B, ...) as kernels take them, with the strides of their sequences; None where there are none."""
    if not tensors:
        return None
    rows = [rows_of(t) for t in tensors]
    return tuple(rows), tuple(row.stride(0) for row in rows)


def number(value: Tensor | float | None) -> Tensor | int | None:
    """A number as kernels take it: on the GPU as it is, which nobody waits for, else the bits of its float64."""
    if isinstance(value, Tensor) and value.device.type != "cpu":
        return value
    return None if value is None else struct.unpack("<q", struct.pack("<d", float(value)))[0]


class Call:
    """Launches over all elements of a tuple of tensors (B, ...), with the parts of its inner products."""

    def __init__(self, like: Tensors, max_norm: float | None) -> None:
        first = like[0]
        self.counts = tuple(t.shape[1:].numel() for t in like)
        self.steps, self.chunks = divided(self.counts)
        self.sequences, self.device = first.shape[0], first.device
        self.max_norm = number(max_norm)
        self.partial = first.new_empty((self.sequences, 4, self.chunks), dtype=torch.float64)
        self._key = (first.dtype, len(like))

    def products(self, grads: Any, cotangents: Any = None, of_copies: Any = None, upper: Any = None) -> None:
        """Sums the parts of the inner products of tuples, which may be missing."""
        from ttt_kernels.clipped_sgd import triton_sums

        tuples = {"t_g": grads, "t_l": cotangents, "t_c": of_copies, "t_u": upper}
        self._run("products", triton_sums.products, {**tuples, "p_partial": self.partial})

    def run(self, name: str, kernel: Any, in_place: bool = False, **arguments: Any) -> None:
        """Launches a kernel that makes factors of the products; what is written in place cannot be timed."""
        shared = {"p_partial": self.partial, "max_norm": self.max_norm}
        self._run(name, kernel, {**arguments, **shared}, in_place)

    def of_rate(self, lr: Tensor, second: bool) -> Tensor:
        """What one sum over all sequences is, as lr."""
        from ttt_kernels.clipped_sgd import triton_kernels

        there = lr.device == self.device
        found = torch.empty((), dtype=lr.dtype if there else torch.float64, device=self.device)
        triton_launch.launch(
            "clipped_sgd.of_rate", triton_kernels.of_rate, lambda _: 1, configs("of_rate"), (), self.device,
            {
                "p_partial": self.partial, "p_sum": found, "max_norm": self.max_norm,
                "sequences": self.sequences, "chunks": self.chunks, "SECOND": second,
            },
        )  # fmt: skip
        return found.to(lr)

    def _run(self, name: str, kernel: Any, arguments: dict[str, Any], in_place: bool = False) -> None:
        if self.sequences == 0:
            return
        choices = configs(name)[:1] if in_place else configs(name)
        shared = {"counts": self.counts, "steps": self.steps, "chunks": self.chunks}
        triton_launch.launch(
            f"clipped_sgd.{name}", kernel, lambda _: self.sequences * self.chunks, choices, self._key, self.device,
            {**arguments, **shared},
        )  # fmt: skip
