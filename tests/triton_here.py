"""Where the tests of Triton kernels run them: on a GPU where there is one, else in Triton's interpreter."""

import numpy
import pytest
import torch

triton = pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton 3.6 makes integers of arrays in a way that NumPy 2.4 refuses.
_OLD = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
_NUMPY = tuple(map(int, numpy.__version__.split(".")[:2]))
needs_triton = pytest.mark.skipif(
    DEVICE == "cpu" and _OLD and _NUMPY >= (2, 4),
    reason="the interpreter of Triton 3.6 needs NumPy below 2.4",
)
