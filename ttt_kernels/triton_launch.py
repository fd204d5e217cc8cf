"""Where Triton kernels are launched."""

from contextlib import AbstractContextManager, nullcontext

import torch


def on(device: torch.device) -> AbstractContextManager[object]:
    """A context in which launches go to a device, which need not be the current one."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
