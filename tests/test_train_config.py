"""The configuration of training: published recipes, and what of the official keys means what here."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf, open_dict
from train_config import composed, experiment

from engine import TTTConfig
from engine.training.experiments import KINDS, config_of, experiments
from engine.training.optimizer import OptimizerOptions
from engine.training.run import Run, run_from_config
from engine.training.wandb_run import WandbOptions

TINY = "tiny/pretrain-tiny-stdlib-e2e"
TINY_SWA = "tiny/pretrain-tiny-stdlib-swa"
TINY_FA = "tiny/pretrain-tiny-stdlib-fa"
DATA = {"deploy_paths__data__dclm_filter_8k": "/dclm", "deploy_paths__data__books3": "/books"}

# steps, warm-up, rate, sequence length, batch, warm-up of the inner rate and where it starts
PUBLISHED = {
    "125m/pretrain/pretrain-125m-e2e": (4800, 480, 3e-3, 8192, 64, 480, 0.1),
    "350m/pretrain/pretrain-350m-e2e": (13500, 1350, 1.5e-3, 8192, 64, 1350, 0.1),
    "760m/pretrain/pretrain-760m-e2e": (29000, 2900, 1.25e-3, 8192, 64, 2900, 0.1),
    "1b/pretrain/pretrain-1b-e2e": (50000, 5000, 1e-3, 8192, 64, 5000, 0.1),
    "3b/pretrain/pretrain-3b-e2e": (52000, 5200, 8e-4, 8192, 128, 5200, 0.1),
    "3b/pretrain/pretrain-3b-fa": (52000, 5200, 8e-4, 8192, 128, 0, 1.0),
    "125m/extension/ext-125m-fa-32K": (120, 12, 4e-4, 32768, 32, 0, 1.0),
    "350m/extension/ext-350m-swa-32K": (337, 33, 4e-4, 32768, 32, 0, 1.0),
    "760m/extension/ext-760m-e2e-32K": (725, 72, 4e-4, 32768, 32, 0, 1.0),
    "1b/extension/ext-1b-e2e-32K": (1250, 125, 4e-4, 32768, 32, 0, 1.0),
    "3b/extension/ext-3b-e2e-32K": (1300, 130, 4e-4, 32768, 64, 0, 1.0),
    "3b/extension/ext-3b-e2e-128K": (1300, 130, 4e-4, 131072, 16, 0, 1.0),
}


def run_of(name: str, **changes: Any) -> Run:
    return run_from_config(experiment(name, **DATA, **changes))[0]


def expected_model(name: str, run: Run) -> TTTConfig:
    size, kind = name.rpartition("/")[2].removeprefix("pretrain-").removeprefix("ext-").rsplit("-", 1)
    if kind not in KINDS:
        size, kind = size.rsplit("-", 1)
    config = config_of(size)
    if kind == "fa":
        return config.as_full_attention(run.seq_length)
    return config.as_sliding_window() if kind == "swa" else config


def check_model(name: str, run: Run) -> None:
    fields = ("name", "ilr_init", "ilr_warmup_steps", "compute_dtype")
    same = {field: getattr(run.model, field) for field in fields}
    assert run.model == dataclasses.replace(expected_model(name, run), **same)
    assert run.model.compute_dtype == ("float32" if "tiny" in name else "bfloat16")
    assert run.exp_name == name.rpartition("/")[2]


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_are_the_published_ones(name: str) -> None:
    run = run_of(name)
    steps, warmup, rate, length, batch, ilr_warmup, ilr_init = PUBLISHED[name]
    assert run.optimizer == OptimizerOptions(
        init_lr=0.0,
        end_lr=1e-5,
        lr=rate,
        warmup_steps=warmup,
        decay_steps=steps,
        b1=0.9,
        b2=0.95,
        clip=1.0,
        weight_decay=0.1,
        decay_embeddings=True,
    )
    assert (run.total_steps, run.seq_length, run.global_batch_size) == (steps, length, batch)
    assert (run.model.ilr_warmup_steps, run.model.ilr_init) == (ilr_warmup, ilr_init)
    assert (run.accum_steps, run.eval_batch_size, run.save_milestone_freq) == (1, 8, 2500)
    assert run.dataset.path == Path("/dclm" if "pretrain" in name else "/books")
    check_model(name, run)


@pytest.mark.parametrize(("name", "rate"), [(TINY, 6e-3), (TINY_SWA, 1.5e-3), (TINY_FA, 1.5e-3)])
def test_models_of_the_standard_library_have_the_rates_that_suit_them(name: str, rate: float) -> None:
    run = run_of(name)
    assert (run.optimizer.lr, run.optimizer.warmup_steps, run.total_steps) == (rate, 56, 560)


def test_every_size_has_every_kind() -> None:
    names = set(experiments())
    assert len(names) == 3 + 5 * 9
    for size in ("125m", "350m", "760m", "1b", "3b"):
        for kind in ("e2e", "fa", "swa"):
            assert f"{size}/pretrain/pretrain-{size}-{kind}" in names
            assert f"{size}/extension/ext-{size}-{kind}-32K" in names
            assert f"{size}/extension/ext-{size}-{kind}-128K" in names


@pytest.mark.parametrize("name", experiments())
def test_every_experiment_is_a_run(name: str) -> None:
    run, notices = run_from_config(experiment(name, **DATA))
    check_model(name, run)
    assert notices == []


@pytest.mark.slow
@pytest.mark.parametrize("name", experiments())
def test_hydra_composes_every_experiment(name: str) -> None:
    assert composed(f"+experiment={name}") == experiment(name)


def test_widths_and_thetas_of_the_baselines() -> None:
    full = run_of("125m/extension/ext-125m-fa-32K").model
    sliding = run_of("350m/extension/ext-350m-swa-32K").model
    assert (full.intermediate_size, full.rope_theta, full.window, full.suffix_layers) == (2048, 2e6, None, 0)
    assert (sliding.intermediate_size, sliding.rope_theta, sliding.window) == (2816, 5e5, 8192)


def test_an_official_command_line() -> None:
    cfg = composed(
        "+deploy=interactive",
        "+experiment=125m/pretrain/pretrain-125m-e2e",
        "training.wandb_entity=e",
        "training.wandb_project=p",
        "training.wandb_key=secret",
        "deploy_paths.data.dclm_filter_8k=/x",
        "training.checkpoint_path=/y",
    )
    run, notices = run_from_config(cfg)
    assert notices == []
    assert run.wandb == WandbOptions(entity="e", project="p", key="secret", mode="online")
    assert "secret" not in repr(run) + repr(run.raw)
    assert run.log_dir == Path("experiments/demo/pretrain-125m-e2e")
    assert run.checkpoint_dir == Path("/y/demo/pretrain-125m-e2e")
    assert (run.dataset.name, run.dataset.path) == ("dclm_filter_8k", Path("/x"))
    assert (run.dataset.split, run.dataset.eval_split) == ("train", "val")
    assert (run.load_part, run.resume_checkpoint_dir, run.break_step) == ("none", None, None)
    assert run.raw["checkpoint"]["checkpoint_dir"] == "/y/demo/pretrain-125m-e2e"


def test_an_official_command_line_of_slurm() -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    cfg = composed(
        "+deploy=submitit",
        "hydra.launcher.nodes=4",
        "hydra.launcher.partition=p",
        "+experiment=125m/extension/ext-125m-e2e-32K",
        "training.resume_exp_name=pretrain-125m-e2e",
        "training.load_part=params",
        "deploy_paths.data.books3=/books",
        hydra=True,
    )
    launcher = cfg.hydra.launcher
    assert (launcher.nodes, launcher.partition) == (4, "p")
    assert launcher.tasks_per_node == launcher.gpus_per_node == 8
    assert cfg.hydra.mode.name == "MULTIRUN"
    with open_dict(cfg):
        del cfg["hydra"]
    run, notices = run_from_config(cfg)
    assert notices == []
    assert (run.load_part, run.resume_step) == ("params", None)
    assert run.resume_checkpoint_dir == Path("checkpoints/demo/pretrain-125m-e2e")


def test_keys_without_a_meaning_are_named() -> None:
    cfg = experiment(
        TINY,
        training__loader_workers=4,
        training__n_state_parallel=2,
        training__tokenizer_name="other",
        training__optimizer_inner__weight_decay=0.5,
        backend__num_devices=8,
        checkpoint__float_dtype="fp32",
        model__remat_block="nothing_saveable",
        model__unroll_block_scan=True,
        model__force_flash=True,
    )
    _, (notice,) = run_from_config(cfg)
    assert notice.startswith("ignored")
    named = set(notice.partition(": ")[2].split(", "))
    assert named == {
        "training.loader_workers=4",
        "training.n_state_parallel=2",
        "training.tokenizer_name=other",
        "training.optimizer_inner.weight_decay=0.5",
        "backend.num_devices=8",
        "checkpoint.float_dtype=fp32",
        "model.remat_block=nothing_saveable",
        "model.unroll_block_scan=True",
        "model.force_flash=True",
    }


def test_keys_of_the_inner_loop_are_named_where_there_is_none() -> None:
    changes = {"training__truncate_steps": 2, "training__method": "graph", "model__suffix_len": 1}
    run, (notice,) = run_from_config(experiment(TINY_FA, **changes))
    assert run.model.suffix_layers == 0
    assert all(key.replace("__", ".") in notice for key in changes)
    _, notices = run_from_config(experiment(TINY, training__truncate_steps=2, training__method="graph"))
    assert notices == []


def test_an_unused_experiment_to_resume_is_named() -> None:
    _, (notice,) = run_from_config(experiment(TINY, training__resume_exp_name="other"))
    assert "other" in notice
    assert "training.load_part" in notice


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        (TINY, "model.qk_norm", False),
        (TINY, "model.pre_norm", False),
        (TINY, "model.post_norm", False),
        (TINY, "model.resid_pdrop", 0.1),
        (TINY, "model.embd_pdrop", 0.1),
        (TINY, "model.attn_pdrop", 0.1),
        (TINY, "model.feed_forward_prime", "gelu"),
        (TINY, "model.state_dtype", "bf16"),
        (TINY, "model.initializer_range", 0.01),
        (TINY, "model.prime", False),
        (TINY, "model.seq_modeling_block", "self_attention"),
        (TINY, "training.spec_inner", ["**"]),
        (TINY, "training.spec_outer", ["language_model.**"]),
        (TINY, "training.optimizer_inner.optimizer_type", "adamw"),
        (TINY, "training.optimizer_inner", None),
        (TINY, "training.optimizer_outer.optimizer_type", "sgd"),
        (TINY, "training.optimizer_outer.bf16_momentum", True),
        (TINY_FA, "model.prime", True),
        (TINY, "training.train_mode", "finetune"),
        (TINY_FA, "model.seq_modeling_block", "SWAFull"),
        (TINY, "training.seq_length", 2000),
        (TINY, "training.seq_length", 0),
        (TINY, "training.global_batch_size", 0),
        (TINY, "training.accum_steps", 0),
        (TINY, "training.eval_batch_size", 0),
        (TINY, "training.total_steps", 0),
        (TINY, "training.break_step", -2),
        (TINY, "training.save_milestone_freq", -1),
        (TINY, "training.model_seed", -1),
        (TINY, "training.resume_step", -1),
        (TINY, "training.load_part", "weights"),
        (TINY, "training.truncate_steps", 0),
        (TINY, "training.method", "magic"),
        (TINY, "training.device", "abacus"),
        (TINY, "training.ttt_backend", "abacus"),
        (TINY, "training.ttt_backend", "cuda"),
        (TINY, "training.wandb_mode", "later"),
        (TINY, "training.dataset_path", "/x"),
        (TINY, "training.checkpoint_path", "gs://bucket"),
        (TINY, "training.exp_dir", ""),
        (TINY, "training.optimizer_outer.lr", -1e-3),
        (TINY, "training.optimizer_outer.lr", float("nan")),
        (TINY, "training.optimizer_outer.end_lr", float("inf")),
        (TINY, "training.optimizer_outer.b1", 1.0),
        (TINY, "training.optimizer_outer.b2", -0.1),
        (TINY, "training.optimizer_outer.clip_gradient", 0.0),
        (TINY, "training.optimizer_outer.weight_decay", -0.1),
        (TINY, "training.optimizer_outer.lr_warmup_steps", -1),
        (TINY, "training.optimizer_outer.lr_decay_steps", 56),
        (TINY, "training.optimizer_inner.lr", -1.0),
        (TINY, "training.optimizer_inner.clip_gradient", -1.0),
        (TINY, "training.ilr_warmup_steps", -1),
        (TINY, "model.num_hidden_layers", 0),
        (TINY, "model.hidden_size", 191),
        (TINY, "model.suffix_len", 0),
        (TINY, "model.suffix_len", 9),
        (TINY, "model.mini_batch_size", 0),
        (TINY, "model.sliding_window_size", 0),
        (TINY, "model.bos_token_id", 256),
        (TINY, "model.compute_dtype", "int8"),
        (TINY, "model.param_dtype", "int8"),
    ],
)
def test_refused_values_are_named(name: str, key: str, value: Any) -> None:
    cfg = experiment(name)
    OmegaConf.update(cfg, key, value)
    # The checkpoint path is checked where its folder has been put together.
    named = "checkpoint.checkpoint_dir" if key == "training.checkpoint_path" else key
    with pytest.raises(ValueError, match=rf"^{named}[.=].* is not accepted.*: it must be "):
        run_from_config(cfg)


def test_batches_that_accumulation_does_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"global_batch_size=8 .* a multiple of training\.accum_steps=3"):
        run_of(TINY, training__accum_steps=3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training__exp_name": "???"}, r"training\.exp_name is missing"),
        ({"training__dataset_name": "???"}, r"training\.dataset_name is missing"),
        ({"training__dataset_name": "books3"}, r"set deploy_paths\.data\.books3=FOLDER"),
        ({"training__dataset_name": "mine"}, r"set \+deploy_paths\.data\.mine=FOLDER"),
        ({"training__load_part": "all"}, r"training\.resume_exp_name"),
        ({"training__log_wandb": True}, r"training\.wandb_project=None"),
    ],
)
def test_what_is_missing_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_from_config(experiment(TINY, **changes))


def test_data_sets() -> None:
    stdlib = run_of(TINY, training__tokenizer="bytes").dataset
    assert (stdlib.name, stdlib.path, stdlib.tokenizer, stdlib.dummy) == ("stdlib", None, "bytes", False)
    mine = run_of(TINY, training__dataset_name="mine", training__dataset_path="/mine").dataset
    assert (mine.name, mine.path) == ("mine", Path("/mine"))
    nameless = run_of(TINY, training__dataset_name="???", training__dataset_path="/a/b").dataset
    assert (nameless.name, nameless.path) == ("b", Path("/a/b"))
    dummy = run_of(TINY, training__dataset_name="???", training__dummy_dataset=True).dataset
    assert (dummy.path, dummy.dummy) == (None, True)


def test_where_to_resume_from() -> None:
    named = run_of(
        TINY, training__load_part="all", training__resume_exp_name="first", training__resume_step=7
    )
    assert named.resume_checkpoint_dir == Path("checkpoints/demo/first")
    assert (named.load_part, named.resume_step) == ("all", 7)
    folder = run_of(TINY, training__load_part="params", checkpoint__resume_checkpoint_dir="/elsewhere")
    assert folder.resume_checkpoint_dir == Path("/elsewhere")


def test_weights_and_biases_only_when_asked() -> None:
    assert run_of(TINY).wandb is None
    assert run_of(TINY, training__wandb_entity="e").wandb is None
    project = {"training__wandb_project": "p"}
    asked = run_of(TINY, **project, training__wandb_mode="offline").wandb
    assert asked == WandbOptions(entity=None, project="p", key=None, mode="offline")
    assert run_of(TINY, **project, training__log_wandb=False).wandb is None
    assert run_of(TINY, **project, training__wandb_mode="disabled").wandb is None


def test_options_of_this_package() -> None:
    run = run_of(
        TINY,
        training__truncate_steps=3,
        training__method="rollback",
        training__checkpoint_blocks=True,
        training__device="cpu",
        training__ttt_backend="reference",
        training__break_step=5,
        training__eval_mode=True,
        model__param_dtype="bf16",
        model__compute_dtype="fp16",
        training__optimizer_outer__emb_wd=False,
    )
    assert (run.truncate_steps, run.method, run.checkpoint_blocks) == (3, "rollback", True)
    assert (run.device, run.backend, run.break_step, run.eval_mode) == ("cpu", "reference", 5, True)
    assert (run.param_dtype, run.model.compute_dtype) == ("bfloat16", "float16")
    assert run.optimizer.decay_embeddings is False
    plain = run_of(TINY)
    assert (plain.truncate_steps, plain.method, plain.checkpoint_blocks) == (None, "auto", None)
    assert plain.device == ("cuda" if torch.cuda.is_available() else "cpu")
    assert plain.backend is None


def test_a_window_may_be_shorter_than_a_mini_batch() -> None:
    assert run_of(TINY, model__sliding_window_size=64).model.window == 64
