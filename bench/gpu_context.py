"""What the measurements of one process share: a device, a dtype, and the model at hand."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from bench.memory import release_memory
from engine import TTTConfig, TTTModel
from engine.config import DTYPES
from engine.model import INIT_STD


class Wrong(Exception):
    """A result that is not what the formulas give: no speed of it is reported."""


class Context:
    """Keeps one model, since a large one is long in the making, and what was checked already."""

    def __init__(self, device: torch.device, dtype: str) -> None:
        self.device = device
        self.dtype = dtype
        self.torch_dtype = DTYPES[dtype]
        self.checked: dict[object, dict[str, float]] = {}
        self._key: object = None
        self._model: TTTModel | None = None

    def model(self, config: TTTConfig, dtype: torch.dtype) -> TTTModel:
        """A model of the configuration whose matrices are stored in `dtype`; that before it is let go."""
        # What makes no difference to parameters may differ: other lengths have other rotations.
        key = (replace(config, window=None, rope_theta=1.0), dtype)
        if self._model is None or self._key != key:
            self.release()
            self._key, self._model = key, random_model(config, dtype, self.device)
        return self._model if self._model.config == config else with_config(self._model, config)

    def release(self) -> None:
        """Lets the model go, and gives its memory back."""
        self._model = None
        release_memory(self.device)


def random_model(config: TTTConfig, dtype: torch.dtype, device: torch.device) -> TTTModel:
    """A model with the initial distribution of `TTTModel`, drawn on the device itself."""
    model = TTTModel(config, dtype=dtype, device="meta").to_empty(device=device)
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, INIT_STD, generator=generator)
    return model


def with_config(model: TTTModel, config: TTTConfig) -> TTTModel:
    """A model of another configuration with the same parameters, in the same memory."""
    other = TTTModel(config, dtype=model.embed.weight.dtype, device="meta")
    other.load_state_dict(model.state_dict(), assign=True)
    return other


def random_tokens(config: TTTConfig, batch: int, length: int, device: torch.device) -> Tensor:
    """(batch, length) int64, equally likely; none that begins a text, as a target of which nobody would learn."""
    classes = config.vocab_size if config.bos_token_id is None else config.bos_token_id
    generator = torch.Generator(device).manual_seed(1)
    return torch.randint(classes, (batch, length), generator=generator, device=device)
