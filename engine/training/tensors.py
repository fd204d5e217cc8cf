"""What of a model and its optimizer a checkpoint holds: tensors by name, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from engine.model import TTTModel

PARAMETER = "parameter."
"""Begins the names of parameters; those of the optimizer's state begin with that of its kind."""
_MOMENTS = ("exp_avg", "exp_avg_sq")


def parameters(model: TTTModel) -> dict[str, Tensor]:
    """The parameters, sharded if the model is, detached: of the same memory."""
    return {PARAMETER + name: parameter.detach() for name, parameter in model.named_parameters()}


def _names(model: TTTModel, optimizer: torch.optim.AdamW) -> dict[nn.Parameter, str]:
    """Names of the optimizer's parameters, in its order."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    ordered = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if set(ordered) != set(names):
        raise ValueError(
            "optimizer: its parameters are not the model's; it has to be made for this model, after sharding"
        )
    return {parameter: names[parameter] for parameter in ordered}


# torch's own collection of an optimizer's state makes an update where there was none yet, and counts it.
def optimizer_state(model: TTTModel, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """Moments and number of updates of every parameter; zeros where there was no update yet."""
    tensors: dict[str, Tensor] = {}
    for parameter, name in _names(model, optimizer).items():
        state = optimizer.state.get(parameter) or {"step": torch.zeros(())} | {
            key: torch.zeros_like(parameter) for key in _MOMENTS
        }
        tensors |= {f"{key}.{name}": state[key] for key in ("step", *_MOMENTS)}
    return tensors


def optimizer_layout(model: TTTModel, optimizer: torch.optim.AdamW) -> dict[str, Tensor]:
    """Tensors of the shapes and dtypes of `optimizer_state`."""
    tensors: dict[str, Tensor] = {}
    for parameter, name in _names(model, optimizer).items():
        tensors |= dict.fromkeys((f"{key}.{name}" for key in _MOMENTS), parameter.detach())
        tensors[f"step.{name}"] = torch.zeros(())
    return tensors


def set_optimizer_state(model: TTTModel, optimizer: torch.optim.AdamW, tensors: Mapping[str, Tensor]) -> None:
    """Gives the optimizer the state that is in `tensors`; its hyper-parameters stay."""
    state = {
        index: {key: tensors[f"{key}.{name}"] for key in ("step", *_MOMENTS)}
        for index, name in enumerate(_names(model, optimizer).values())
    }
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def differences(folder: Path, wanted: Mapping[str, Tensor], everything: bool) -> Iterator[str]:
    """How the tensors of the checkpoint in `folder` differ from the `wanted` ones.

    Those that are too many count among the parameters only, unless `everything` is wanted.
    """
    stored = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    for name, tensor in wanted.items():
        found = stored.get(name)
        if not isinstance(found, TensorStorageMetadata):
            yield f"tensor {name} is missing"
            continue
        have, want = (
            f"{tuple(shape)} {dtype}"
            for shape, dtype in ((found.size, found.properties.dtype), (tensor.shape, tensor.dtype))
        )
        if have != want:
            yield f"tensor {name} is {have}, expected {want}"
    for name in stored:
        if name not in wanted and (everything or name.startswith(PARAMETER)):
            yield f"tensor {name} has no place in the model"
