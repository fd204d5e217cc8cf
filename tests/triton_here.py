"""Where the tests of Triton kernels run them: on a GPU where there is one, else in Triton's interpreter."""

import pytest
import torch
from harness import EVERY_BACKEND

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_triton = pytest.mark.skipif(
    "triton" not in EVERY_BACKEND, reason="the interpreter of Triton 3.6 needs NumPy below 2.4"
)
