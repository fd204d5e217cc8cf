"""Configurations of training runs, composed as the command composes them."""

from __future__ import annotations

from copy import deepcopy
from functools import cache
from typing import Any

from hydra import compose, initialize
from omegaconf import DictConfig, OmegaConf

from engine.training.experiments import experiments, models, trainings
from engine.training.groups import CONFIG_NAME, register
from engine.training.schema import Config


def composed(*overrides: str, hydra: bool = False) -> DictConfig:
    register()
    with initialize(version_base=None):
        return compose(CONFIG_NAME, list(overrides), return_hydra_config=hydra)


def experiment(name: str, **changes: Any) -> DictConfig:
    """That experiment, with changes such as `training__seq_length=8` (`training.seq_length=8`).

    Put together without Hydra, which takes it longer.
    """
    cfg = deepcopy(_experiment(name))
    for key, value in changes.items():
        OmegaConf.update(cfg, key.replace("__", "."), value)
    return cfg


@cache
def _experiment(name: str) -> DictConfig:
    node = experiments()[name]
    training, model, own = node["defaults"]
    assert own == "_self_"
    cfg = OmegaConf.merge(
        OmegaConf.structured(Config),
        {
            "training": trainings()[training["override /training"]],
            "model": models()[model["override /model"]],
        },
        {"training": node["training"], "model": node["model"]},
    )
    assert isinstance(cfg, DictConfig)
    return cfg
