"""Operators of End-to-End Test-Time Training (arXiv 2512.23675) for anyone's model code."""

from ttt_kernels.backends import backends, use_backend
from ttt_kernels.clipped_sgd import ClippedSGD, clipped_sgd
from ttt_kernels.linear_ce import linear_cross_entropy, linear_cross_entropy_jvp
from ttt_kernels.rms_norm import rms_norm, rms_norm_jvp
from ttt_kernels.rope import rope
from ttt_kernels.swa import sliding_window_attention, sliding_window_attention_jvp
from ttt_kernels.swiglu import swiglu, swiglu_jvp

__all__ = [
    "ClippedSGD",
    "backends",
    "clipped_sgd",
    "linear_cross_entropy",
    "linear_cross_entropy_jvp",
    "rms_norm",
    "rms_norm_jvp",
    "rope",
    "sliding_window_attention",
    "sliding_window_attention_jvp",
    "swiglu",
    "swiglu_jvp",
    "use_backend",
]
