"""The device that a command is to run on."""

from __future__ import annotations

import torch


def checked_device(name: str) -> torch.device:
    """The torch device of that name; a ValueError where there is no such device here."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"device={name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device
