"""The parts of a `Run`, each from the keys that describe it; `ValueError`s name the key."""

from __future__ import annotations

from pathlib import Path

import torch

from engine.config import DTYPES, TTTConfig
from engine.training.optimizer import OptimizerOptions
from engine.training.options import DatasetOptions
from engine.training.values import Values, refused
from engine.training.wandb_run import WandbOptions
from ttt_kernels import backends

STDLIB = "stdlib"

_DTYPE_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"} | {
    name: name for name in DTYPES
}

_MODEL_KEYS = {
    "name": "model.name",
    "vocab_size": "model.vocab_size",
    "hidden_size": "model.hidden_size",
    "intermediate_size": "model.intermediate_size",
    "num_layers": "model.num_hidden_layers",
    "num_heads": "model.num_attention_heads",
    "suffix_layers": "model.suffix_len",
    "mini_batch_size": "model.mini_batch_size",
    "window": "model.sliding_window_size",
    "rope_theta": "model.rope_theta",
    "bos_token_id": "model.bos_token_id",
    "norm_eps": "model.rms_norm_eps",
    "tie_embeddings": "model.tie_word_embeddings",
    "compute_dtype": "model.compute_dtype",
}
_INNER_LOOP_KEYS = {
    "inner_lr": "training.optimizer_inner.lr",
    "inner_clip": "training.optimizer_inner.clip_gradient",
    "ilr_init": "training.ilr_init",
    "ilr_warmup_steps": "training.ilr_warmup_steps",
}


def model(values: Values, inner_loop: bool) -> TTTConfig:
    attention = values.choice("model.seq_modeling_block", ("self_attention", "SWA"))
    keys = _MODEL_KEYS | (_INNER_LOOP_KEYS if inner_loop else {})
    fields = {field: values.get(key) for field, key in keys.items()}
    fields["compute_dtype"] = dtype(values, "model.compute_dtype")
    if inner_loop:
        values.integer("model.suffix_len", 1)
    else:
        fields["suffix_layers"] = 0
    if attention == "self_attention":
        fields["window"] = None
    try:
        return TTTConfig.from_dict(fields)
    except ValueError as error:
        field, _, rest = str(error).partition("=")
        raise ValueError(f"{keys.get(field, field)}={rest}") from error


def dtype(values: Values, key: str) -> str:
    return _DTYPE_NAMES[values.choice(key, _DTYPE_NAMES)]


def resume_checkpoint_dir(values: Values, load_part: str) -> Path:
    folder = values.folder("checkpoint.resume_checkpoint_dir")
    # Without a name the default is the folder of all experiments.
    nameless = values.folder("deploy_paths.checkpoint") / values.get("training.exp_folder")
    if not values.get("training.resume_exp_name") and folder == nameless:
        raise ValueError(
            f"training.load_part={load_part} starts from another experiment: name it by "
            "training.resume_exp_name, or its folder by checkpoint.resume_checkpoint_dir"
        )
    return folder


def seq_length(values: Values, inner_loop: bool) -> int:
    length = values.integer("training.seq_length", 1)
    size = values.get("model.mini_batch_size")
    if inner_loop and length % size:
        raise refused("training.seq_length", length, f"a multiple of model.mini_batch_size={size}")
    return length


def global_batch_size(values: Values) -> int:
    size = values.integer("training.global_batch_size", 1)
    steps = values.integer("training.accum_steps", 1)
    if size % steps:
        raise refused("training.global_batch_size", size, f"a multiple of training.accum_steps={steps}")
    return size


def dataset(values: Values) -> DatasetOptions:
    dummy = values.get("training.dummy_dataset")
    name, path = values.get("training.dataset_name"), values.get("training.dataset_path")
    if name == STDLIB:
        if path is not None:
            raise refused("training.dataset_path", path, f"null with training.dataset_name={STDLIB}")
    elif not dummy:
        if path is not None:
            path = values.folder("training.dataset_path")
        elif not name:
            raise ValueError("training.dataset_name is missing: choose a +experiment=..., or set it")
        elif values.get("deploy_paths.data").get(name) is None:
            key = f"deploy_paths.data.{name}"
            added = key if name in values.get("deploy_paths.data") else f"+{key}"
            raise ValueError(f"{key} is missing: set {added}=FOLDER to where that data set lies")
        else:
            path = values.folder(f"deploy_paths.data.{name}")
    return DatasetOptions(
        name=name or ("dummy" if dummy else path.name),
        path=None if dummy else path,
        split=values.get("training.data_split"),
        eval_split=values.get("training.eval_split"),
        tokenizer=values.get("training.tokenizer"),
        dummy=dummy,
    )


def optimizer(values: Values) -> OptimizerOptions:
    prefix = "training.optimizer_outer"
    warmup = values.integer(f"{prefix}.lr_warmup_steps", 0)
    decay = values.integer(f"{prefix}.lr_decay_steps", 1)
    if decay <= warmup:
        raise refused(f"{prefix}.lr_decay_steps", decay, f"more than {prefix}.lr_warmup_steps={warmup}")
    return OptimizerOptions(
        init_lr=values.number(f"{prefix}.init_lr"),
        end_lr=values.number(f"{prefix}.end_lr"),
        lr=values.number(f"{prefix}.lr", positive=True),
        warmup_steps=warmup,
        decay_steps=decay,
        b1=values.number(f"{prefix}.b1", below=1),
        b2=values.number(f"{prefix}.b2", below=1),
        clip=values.number(f"{prefix}.clip_gradient", positive=True),
        weight_decay=values.number(f"{prefix}.weight_decay"),
        decay_embeddings=values.get(f"{prefix}.emb_wd"),
    )


def wandb(values: Values) -> WandbOptions | None:
    mode = values.choice("training.wandb_mode", ("online", "offline", "disabled"))
    project = values.get("training.wandb_project")
    asked = values.get("training.log_wandb")
    if asked is None:
        asked = project is not None
    if not asked or mode == "disabled":
        return None
    if not project:
        raise refused("training.wandb_project", project, "a project's name with training.log_wandb=true")
    return WandbOptions(
        entity=values.get("training.wandb_entity"),
        project=project,
        key=values.get("training.wandb_key"),
        mode=mode,
    )


def device(values: Values) -> str:
    name = values.get("training.device")
    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(name).type
    except RuntimeError as error:
        raise refused("training.device", name, "null or a device of torch, such as cpu or cuda") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise refused("training.device", name, "null or another device: torch finds no GPU here")
    return name


def backend(values: Values) -> str | None:
    name = values.get("training.ttt_backend")
    if name is None:
        return None
    table = backends()
    values.choice("training.ttt_backend", tuple(table))
    if not table[name]["available"]:
        can = ", ".join(other for other, entry in table.items() if entry["available"])
        raise refused("training.ttt_backend", name, f"one of {can} here: {table[name]['reason']}")
    return name
