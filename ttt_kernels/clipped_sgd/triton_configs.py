"""How clipped SGD's Triton kernels divide their work: blocks of elements, and chunks of blocks."""

from collections.abc import Sequence

from ttt_kernels.tuning import Config, interpreted

CHUNKS = 496
"""About as many chunks has a sequence: four programs of eight warps on each multiprocessor of an H200."""
_BLOCK = 2048
_PARTS = 512
"""At least as many as most sequences have chunks."""


def configs(kernel: str) -> tuple[Config, ...]:
    """What a kernel can be launched with, the safest first; all have the same sums but for their last bits."""
    if kernel == "of_rate":
        return (Config((("PARTS", 2 if interpreted() else _PARTS),), 4, 1),)
    if interpreted():
        return (Config((("BLOCK", 32), *((("PARTS", 2),) if kernel != "products" else ())), 4, 1),)
    sizes = (("BLOCK", _BLOCK), *((("PARTS", _PARTS),) if kernel != "products" else ()))
    # Sums of four products in float64 need many registers of a thread.
    return Config(sizes, 8, 1), Config(sizes, 16 if kernel == "products" else 4, 1)


def divided(counts: Sequence[int]) -> tuple[int, int]:
    """Blocks of a chunk, and chunks of a sequence, given its elements in each tensor.

    That does not depend on the number of sequences, so that one has the same sums in every batch.
    """
    size, most = (32, 3) if interpreted() else (_BLOCK, CHUNKS)
    steps = max(1, -(-sum(counts) // (size * most)))
    return steps, max(1, sum(-(-count // (size * steps)) for count in counts))
