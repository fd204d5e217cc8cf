"""Everything that Hydra composes a run of, stored where it looks."""

from __future__ import annotations

from hydra.core.config_store import ConfigStore

from engine.training import schema
from engine.training.experiments import Node, experiments, models, trainings

CONFIG_NAME = "train"
"""The primary configuration."""

SLURM_LAUNCHER = "submitit_slurm"
"""The launcher that hydra-submitit-launcher brings."""

_BASES = {
    "training": schema.Training,
    "model": schema.Model,
    "backend": schema.Backend,
    "checkpoint": schema.Checkpoint,
    "deploy_paths": schema.DeployPaths,
}


def register() -> None:
    """Stores every group where Hydra finds it; again does no harm."""
    store = ConfigStore.instance().store
    store(name=CONFIG_NAME, node=_primary())
    for group, base in _BASES.items():
        store(group=group, name=f"base_{group}", node=base)
    store(group="backend", name="gpu", node={"defaults": ["base_backend", "_self_"], "backend": "gpu"})
    store(group="deploy", name="interactive", node=_interactive(), package="_global_")
    store(group="deploy", name="submitit", node=_submitit(), package="_global_")
    for size, node in models().items():
        store(group="model", name=size, node={"defaults": ["base_model", "_self_"]} | node)
    for path, node in trainings().items():
        _store("training", path, {"defaults": ["/training/base_training@_global_.training", "_self_"]} | node)
    for path, node in experiments().items():
        _store("experiment", path, node, package="_global_")


def _store(group: str, path: str, node: Node, package: str | None = None) -> None:
    folder, _, name = path.rpartition("/")
    ConfigStore.instance().store(group=f"{group}/{folder}", name=name, node=node, package=package)


def _primary() -> Node:
    log_dir = "${training.exp_dir}/${training.exp_folder}"
    return {
        "defaults": [
            *({group: f"base_{group}"} for group in _BASES),
            "_self_",
        ],
        "hydra": {
            "job": {"name": "train", "chdir": False},
            "run": {"dir": log_dir + "/${training.exp_name}"},
            "sweep": {"dir": log_dir, "subdir": "${training.exp_name}"},
            # It would hold the key of Weights & Biases; the run writes its configuration without.
            "output_subdir": None,
        },
    }


def _interactive() -> Node:
    return {"hydra": {"mode": "RUN"}}


def _submitit() -> Node:
    return {
        "defaults": [{"override /hydra/launcher": SLURM_LAUNCHER}, "_self_"],
        "hydra": {
            "mode": "MULTIRUN",
            "launcher": {
                "name": "ttt_e2e",
                "gpus_per_node": 8,
                "tasks_per_node": "${hydra.launcher.gpus_per_node}",
                "cpus_per_task": 12,
                "timeout_min": 3840,
                "signal_delay_s": 300,
                "max_num_timeout": 50,
            },
        },
    }
