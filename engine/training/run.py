"""A training run as plain, checked values: what the training loop reads instead of a configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from engine.config import TTTConfig
from engine.loss import METHODS
from engine.training import read
from engine.training.optimizer import OptimizerOptions
from engine.training.options import DatasetOptions
from engine.training.unused import ignored_keys, refuse_other_results
from engine.training.values import Values
from engine.training.wandb_run import WandbOptions

AUTO = "auto"
"""`Run.method`: left open, for `fit` to choose; a run takes the default."""


@dataclass(frozen=True)
class Run:
    """One training run, as `run_from_config` checked it."""

    model: TTTConfig
    exp_name: str
    log_dir: Path
    checkpoint_dir: Path
    resume_checkpoint_dir: Path | None
    """Folder of the checkpoints to start from; None where `load_part` is none."""
    resume_step: int | None
    """None: the latest."""
    load_part: str
    """none, params or all."""
    eval_mode: bool
    """Evaluate only."""
    total_steps: int
    break_step: int | None
    """The last step before training stops early."""
    save_milestone_freq: int
    """Steps between checkpoints; 0: only the last step's."""
    seq_length: int
    """Tokens of a sequence; with an inner loop a multiple of `model.mini_batch_size`."""
    global_batch_size: int
    """Sequences of an outer step over all processes; a multiple of `accum_steps`."""
    accum_steps: int
    eval_batch_size: int
    """Sequences that are evaluated at a time, at most; never more than are trained on at a time."""
    model_seed: int
    data_seed: int
    dataset: DatasetOptions
    optimizer: OptimizerOptions
    wandb: WandbOptions | None
    """None: no logging there."""
    truncate_steps: int | None
    """Through at most so many inner steps goes the gradient; None: through all."""
    method: str
    """auto, rollback, snapshots or graph."""
    checkpoint_blocks: bool | None
    """Whether blocks are computed again in the backward pass; None: where it pays."""
    device: str
    backend: str | None
    """The kernels'; None: the best that can run."""
    param_dtype: str
    """A name of `engine.config.DTYPES`."""
    raw: dict[str, Any] = field(repr=False)
    """The whole configuration, interpolations resolved, without the key of Weights & Biases."""


def run_from_config(cfg: DictConfig) -> tuple[Run, list[str]]:
    """The run that a configuration of the groups in `engine.training.schema` describes, and notices for its user.

    The notices are sentences, of keys that were set and have no effect. Raises `ValueError` that names the
    key, its value and what is accepted.
    """
    values = Values(cfg)
    inner_loop = values.choice("training.train_mode", ("pretrain", "meta")) == "meta"
    exp_name = values.get("training.exp_name")
    if not exp_name:
        raise ValueError("training.exp_name is missing: choose a +experiment=..., or name the run")
    refuse_other_results(cfg)
    model = read.model(values, inner_loop)
    load_part = values.choice("training.load_part", ("none", "params", "all"))
    break_step = values.integer("training.break_step", -1)
    dataset = read.dataset(values)
    run = Run(
        model=model,
        exp_name=exp_name,
        log_dir=values.folder("training.exp_dir") / values.get("training.exp_folder") / exp_name,
        checkpoint_dir=values.folder("checkpoint.checkpoint_dir"),
        resume_checkpoint_dir=None if load_part == "none" else read.resume_checkpoint_dir(values, load_part),
        resume_step=values.optional_integer("training.resume_step", 0),
        load_part=load_part,
        eval_mode=values.get("training.eval_mode"),
        total_steps=values.integer("training.total_steps", 1),
        break_step=break_step if break_step > 0 else None,
        save_milestone_freq=values.integer("training.save_milestone_freq", 0),
        seq_length=read.seq_length(values, inner_loop),
        global_batch_size=read.global_batch_size(values),
        accum_steps=values.integer("training.accum_steps", 1),
        eval_batch_size=values.integer("training.eval_batch_size", 1),
        model_seed=values.integer("training.model_seed", 0),
        data_seed=values.integer("training.data_seed", 0),
        dataset=dataset,
        optimizer=read.optimizer(values),
        wandb=read.wandb(values),
        truncate_steps=values.optional_integer("training.truncate_steps", 1),
        method=values.choice("training.method", (AUTO, *METHODS)),
        checkpoint_blocks=values.get("training.checkpoint_blocks"),
        device=read.device(values),
        backend=read.backend(values),
        param_dtype=read.dtype(values, "model.param_dtype"),
        raw=_raw(cfg, dataset),
    )
    return run, _notices(cfg, run)


def _raw(cfg: DictConfig, dataset: DatasetOptions) -> dict[str, Any]:
    raw = cast(dict[str, Any], OmegaConf.to_container(cfg, resolve=True))
    raw["training"]["dataset_path"] = None if dataset.path is None else str(dataset.path)
    if raw["training"]["wandb_key"] is not None:
        raw["training"]["wandb_key"] = "(not shown)"
    return raw


def _notices(cfg: DictConfig, run: Run) -> list[str]:
    notices = []
    if ignored := ignored_keys(cfg):
        notices.append(f"ignored, since they have no meaning here: {', '.join(ignored)}")
    if run.load_part == "none" and (name := cfg.training.resume_exp_name):
        notices.append(f"nothing is loaded from {name}: training.load_part is none")
    return notices
