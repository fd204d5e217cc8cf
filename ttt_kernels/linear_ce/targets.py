"""What a target may be."""

from torch import Tensor


def check(target: Tensor, classes: int, ignore_index: int) -> None:
    """Every target is a class or `ignore_index`.

    Raises:
        ValueError: one is neither; the message names it.
    """
    bad = ((target < 0) | (target >= classes)) & (target != ignore_index)
    if bad.any():
        raise ValueError(
            f"linear_cross_entropy: target holds {int(target[bad][0])}; accepted are the classes 0 to "
            f"{classes - 1} of weight and ignore_index {ignore_index}"
        )
