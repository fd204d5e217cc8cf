"""Operators of End-to-End Test-Time Training (arXiv 2512.23675) for anyone's model code."""

from ttt_kernels.backends import backends, use_backend
from ttt_kernels.rms_norm import rms_norm

__all__ = ["backends", "rms_norm", "use_backend"]
