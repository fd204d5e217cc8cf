"""A model as a folder: `config.json` and `model.safetensors`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from engine.config import DTYPES, TTTConfig
from engine.files import atomic_write

if TYPE_CHECKING:
    from engine.model import TTTModel

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
_PACKAGED = Path(__file__).parent / "models"


def packaged() -> list[str]:
    """Names of the trained models that come with the package."""
    return sorted(path.name for path in _PACKAGED.iterdir() if path.is_dir())


def save_pretrained(model: TTTModel, folder: str | os.PathLike[str]) -> None:
    """Writes `model` into `folder`, made if need be, in the dtypes that its parameters have.

    Both files are written beside their places first, so that a failure leaves what was there. Raises
    `ValueError` where `folder` is a file.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: a model is saved as a folder of two files")
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}
    with atomic_write(folder / CONFIG_FILE) as config, atomic_write(folder / WEIGHTS_FILE) as weights:
        config.write_text(json.dumps(model.config.to_dict(), indent=2) + "\n", encoding="utf-8")
        save_file(tensors, weights, metadata={"format": "pt"})


def from_pretrained(
    cls: type[TTTModel],
    folder: str | os.PathLike[str],
    dtype: torch.dtype | None,
    device: torch.device | str | None,
) -> TTTModel:
    """The model saved in `folder`, its embeddings and matrices in `dtype` (None: as stored), on `device`.

    Where there is no such folder, `folder` may be the name of a model in the package. Raises `ValueError` that names
    the file and what is wrong with it: absent, damaged, or not fitting the other.
    """
    name, folder = os.fspath(folder), Path(folder)
    if not folder.is_dir():
        if name not in packaged():
            raise ValueError(
                f"{folder} is not a folder; expected one with {CONFIG_FILE} and {WEIGHTS_FILE}, or the name of a "
                f"model in the package: {', '.join(packaged())}"
            )
        folder = _PACKAGED / name
    config = _read_config(folder / CONFIG_FILE)
    tensors = _read_tensors(folder / WEIGHTS_FILE)
    stored = tensors["embed.weight"].dtype if "embed.weight" in tensors else torch.float32
    if stored not in DTYPES.values():
        raise ValueError(
            f"{folder / WEIGHTS_FILE}: embed.weight is {stored}; expected one of " + ", ".join(DTYPES)
        )
    _check_tensors(folder / WEIGHTS_FILE, cls(config, dtype=stored, device="meta"), tensors)
    model = cls(config, dtype=dtype or stored, device="meta")
    wanted = {name: parameter.dtype for name, parameter in model.named_parameters()}
    model.load_state_dict(
        {name: tensor.to(device=device, dtype=wanted[name]) for name, tensor in tensors.items()}, assign=True
    )
    return model


def _read_config(path: Path) -> TTTConfig:
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"expected a JSON object, found {type(values).__name__}")
        return TTTConfig.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or not a safetensors file: {error}") from error


def _check_tensors(path: Path, model: TTTModel, tensors: dict[str, torch.Tensor]) -> None:
    expected = dict(model.named_parameters())
    if missing := [name for name in expected if name not in tensors]:
        raise ValueError(f"{path}: missing tensors: {', '.join(missing)}")
    if unexpected := [name for name in tensors if name not in expected]:
        raise ValueError(f"{path}: tensors that the configuration has no place for: {', '.join(unexpected)}")
    for name, parameter in expected.items():
        found, want = (f"{tuple(t.shape)} {t.dtype}" for t in (tensors[name], parameter))
        if found != want:
            raise ValueError(f"{path}: {name} is {found}; expected {want}")
