"""Several processes, each with sequences of its own: who is there, and a model sharded over them."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from engine.device import checked_device
from engine.model import TTTModel

T = TypeVar("T")

_ENVIRONMENT = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@dataclass(frozen=True)
class World:
    """Which of how many processes this is, and the device it computes on."""

    rank: int
    size: int
    device: torch.device


def setup(device: str) -> World:
    """Joins the processes that torchrun started; without its environment variables this is the only one.

    Args:
        device: as torch names it. With several processes on `cuda`, each takes the GPU of its local rank.

    Raises:
        ValueError: a device that cannot be used here, or an environment that is not torchrun's.
    """
    if not any(name in os.environ for name in _ENVIRONMENT):
        return World(0, 1, checked_device(device))
    try:
        rank, size, local_rank = (int(os.environ[name]) for name in _ENVIRONMENT)
    except (KeyError, ValueError) as error:
        found = ", ".join(f"{name}={os.environ.get(name)!r}" for name in _ENVIRONMENT)
        raise ValueError(f"environment: {found}; torchrun sets all three to integers") from error
    if size == 1:
        return World(0, 1, checked_device(device))
    kind, _, index = device.partition(":")
    on_gpu = kind == "cuda"
    if on_gpu and index:
        raise ValueError(f"device={device!r} is one for all {size} processes; accepted is 'cuda'")
    own = checked_device(f"cuda:{local_rank}" if on_gpu else device)
    if on_gpu:
        torch.cuda.set_device(own)
    dist.init_process_group("nccl" if on_gpu else "gloo", rank=rank, world_size=size)
    return World(rank, size, own)


def cleanup() -> None:
    """Leaves the other processes, if there are any."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """Which process this is; 0 where it is the only one."""
    return dist.get_rank() if dist.is_initialized() else 0


def gather(value: T) -> list[T]:
    """The `value` of every process, by rank; no process goes on before all are here."""
    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def mean(value: float, world: World) -> float:
    """Mean of `value` over all processes."""
    if world.size == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64, device=world.device)
    dist.all_reduce(total)
    return total.item() / world.size


def shard(model: TTTModel, world: World) -> None:
    """Spreads parameters, gradients and so the optimizer's state over the processes (FSDP2), in place.

    `model.loss` then gathers all parameters for as long as it and its backward take, and leaves in every
    process its part of the gradient's mean over processes. Parameters of the same initial values have to be
    there in every process. The model's other methods cannot be used while it is sharded. Does nothing where
    there is one process.

    Raises:
        ValueError: parameters of several dtypes.
    """
    if world.size == 1:
        return
    dtypes = sorted({str(parameter.dtype) for parameter in model.parameters()})
    if len(dtypes) > 1:
        raise ValueError(
            f"model: its parameters are {' and '.join(dtypes)}; sharding accepts one dtype: store them in float32 "
            "and choose that of computation by compute_dtype"
        )
    # One group for the whole model: an inner step reads all blocks, and the meta-gradient reads them again.
    fully_shard(model, mesh=init_device_mesh(world.device.type, (world.size,)), reshard_after_forward=False)
    register_fsdp_forward_method(model, "loss")
    gathered: Any = model.loss
    sharded: Any = model

    @functools.wraps(gathered)
    def loss(*args: Any, **kwargs: Any) -> Any:
        out = gathered(*args, **kwargs)
        # Sharding again is left to the backward, and there will be none.
        if not torch.is_grad_enabled():
            sharded.reshard()
        return out

    sharded.loss = loss
