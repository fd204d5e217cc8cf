"""The published recipes, and one for this package's model of bytes, as options of Hydra's groups."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from engine.config import TTTConfig

KINDS = ("e2e", "fa", "swa")
"""TTT-E2E and its baselines: full attention and sliding-window attention, without fast MLPs."""

FAST_MLPS = "language_model.**.suffix_blocks.feed_forward_prime.**"
"""The parameters that the inner loop trains, as the official implementation spells them."""

Node = dict[str, Any]


@dataclass(frozen=True)
class Recipe:
    """What differs between the sizes in the published training (arXiv 2512.23675 and its configurations)."""

    pretrain_steps: int
    pretrain_lr: float
    pretrain_batch: int
    extension_steps: int
    extension_batch_32k: int


RECIPES = {
    "125m": Recipe(4800, 3e-3, 64, 120, 32),
    "350m": Recipe(13500, 1.5e-3, 64, 337, 32),
    "760m": Recipe(29000, 1.25e-3, 64, 725, 32),
    "1b": Recipe(50000, 1e-3, 64, 1250, 32),
    "3b": Recipe(52000, 8e-4, 128, 1300, 64),
}
PRETRAIN_LENGTH = 8192
EXTENSION_LR = 4e-4
# Published for 3b; the other sizes follow it.
EXTENSION_BATCH_128K = 16

TINY = "tiny-stdlib"
"""A model of bytes for two cores: narrower than the preset `tiny`, so that minutes are enough to train it."""
TINY_TRAINING: Node = {"total_steps": 560, "seq_length": 1024, "global_batch_size": 8}
TINY_LR = 6e-3
TINY_BASELINE_LR = 1.5e-3
"""The best of those measured for full attention and for a sliding window alike."""
TINY_DTYPE = "fp32"

ILR_INIT = 0.1
"""Inner learning rate at which its warm-up in pre-training starts; in an extension it stays what it is."""

_LLAMA3_EOS = 128001


def models() -> dict[str, Node]:
    """The group `model`: the shapes of the baselines, to which an experiment adds the rest."""
    return {size: _shapes(size) for size in (*RECIPES, TINY)}


def config_of(size: str) -> TTTConfig:
    """The TTT-E2E model of a size: the preset's, or the one that is trained on the standard library."""
    if size != TINY:
        return TTTConfig.preset(size)
    # A window of eight short lines, so that most of a file lies beyond it.
    return replace(
        TTTConfig.preset("tiny"), name=TINY, hidden_size=128, intermediate_size=256, num_heads=2, window=128,
        mini_batch_size=64,
    )  # fmt: skip


def _shapes(size: str) -> Node:
    config = config_of(size).as_sliding_window()
    return {
        "name": size,
        "vocab_size": config.vocab_size,
        "bos_token_id": config.bos_token_id,
        "eos_token_id": None if config.bos_token_id is None else _LLAMA3_EOS,
        "num_hidden_layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.intermediate_size,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
    } | ({"compute_dtype": TINY_DTYPE} if size == TINY else {})


def trainings() -> dict[str, Node]:
    """The group `training`: data and schedule of pre-training and of extension."""
    schedule = _schedule(TINY_TRAINING["total_steps"], TINY_LR)
    nodes = {f"{TINY}/pretrain-1K": {"dataset_name": "stdlib"} | TINY_TRAINING | schedule}
    for size, recipe in RECIPES.items():
        steps = recipe.pretrain_steps
        pretraining: Node = {
            "dataset_name": "dclm_filter_8k",
            "total_steps": steps,
            "seq_length": PRETRAIN_LENGTH,
            "global_batch_size": recipe.pretrain_batch,
        }
        nodes[f"{size}/pretrain-8K"] = pretraining | _schedule(steps, recipe.pretrain_lr)
        steps = recipe.extension_steps
        extension: Node = {"dataset_name": "books3", "total_steps": steps}
        nodes[f"{size}/ext"] = extension | _schedule(steps, EXTENSION_LR) | {"ilr_warmup_steps": 0}
    return nodes


def _schedule(steps: int, lr: float) -> Node:
    """Learning rates, the inner and the outer, that warm up over the first tenth of the steps."""
    return {
        "ilr_warmup_steps": steps // 10,
        "optimizer_outer": {
            "optimizer_type": "adamw",
            "init_lr": 0.0,
            "lr": lr,
            "end_lr": 1e-5,
            "lr_warmup_steps": steps // 10,
            "lr_decay_steps": steps,
            "b1": 0.9,
            "b2": 0.95,
            "clip_gradient": 1.0,
            "weight_decay": 0.1,
        },
    }


def experiments() -> dict[str, Node]:
    """The group `experiment`: pre-training, and extensions to 32K and 128K tokens, of every size and kind."""
    nodes = {}
    for kind in KINDS:
        node = _pretraining(TINY, kind, "pretrain-1K", TINY_TRAINING["seq_length"])
        if kind != "e2e":
            node["training"]["optimizer_outer"] = {"lr": TINY_BASELINE_LR}
        nodes[f"tiny/pretrain-{TINY}-{kind}"] = node
    for size, recipe in RECIPES.items():
        for kind in KINDS:
            nodes[f"{size}/pretrain/pretrain-{size}-{kind}"] = _pretraining(
                size, kind, "pretrain-8K", PRETRAIN_LENGTH
            )
        for length, batch in ((32, recipe.extension_batch_32k), (128, EXTENSION_BATCH_128K)):
            for kind in KINDS:
                nodes[f"{size}/extension/ext-{size}-{kind}-{length}K"] = _extension(size, kind, length, batch)
    return nodes


def _pretraining(size: str, kind: str, training: str, context: int) -> Node:
    node = _experiment(size, kind, training, context)
    node["training"]["exp_name"] = f"pretrain-{size}-{kind}"
    if kind == "e2e":
        node["training"]["ilr_init"] = ILR_INIT
    return node


def _extension(size: str, kind: str, length: int, batch: int) -> Node:
    node = _experiment(size, kind, "ext", length * 1024)
    node["training"] |= {
        "exp_name": f"ext-{size}-{kind}-{length}K",
        "seq_length": length * 1024,
        "global_batch_size": batch,
    }
    return node


def _experiment(size: str, kind: str, training: str, context: int) -> Node:
    config = config_of(size)
    if kind == "fa":
        config = config.as_full_attention(context)
    elif kind == "swa":
        config = config.as_sliding_window()
    return {
        "defaults": [{"override /training": f"{size}/{training}"}, {"override /model": size}, "_self_"],
        "training": _inner_loop(config) if config.suffix_layers else {"train_mode": "pretrain"},
        "model": {"name": config.name, "rope_theta": config.rope_theta} | _attention(config),
    }


def _inner_loop(config: TTTConfig) -> Node:
    return {
        "train_mode": "meta",
        "spec_inner": [FAST_MLPS],
        "optimizer_inner": {
            "optimizer_type": "sgd",
            "lr": config.inner_lr,
            "clip_gradient": config.inner_clip,
        },
    }


def _attention(config: TTTConfig) -> Node:
    node: Node = {
        "seq_modeling_block": "self_attention" if config.window is None else "SWA",
        "mini_batch_size": config.mini_batch_size,
        "intermediate_size": config.intermediate_size,
        "prime": config.suffix_layers > 0,
        "suffix_len": config.suffix_layers,
    }
    return node if config.window is None else node | {"sliding_window_size": config.window}
