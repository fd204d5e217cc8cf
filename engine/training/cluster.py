"""What a process of a run over several of them has to know about the others."""

from __future__ import annotations

import importlib
import os


def submitted() -> bool:
    """Whether submitit started this process on a cluster."""
    return "SUBMITIT_EXECUTOR" in os.environ


def export_ranks() -> None:
    """Sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as torchrun does, in a submitted job."""
    helpers = importlib.import_module("submitit.helpers")
    # What the submitting shell happened to have exported is that shell's. All GPUs of the node stay visible:
    # LOCAL_RANK counts them.
    helpers.TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)


def rank() -> int:
    """This process's number among those of the run, from 0."""
    return int(os.environ.get("RANK", "0"))
